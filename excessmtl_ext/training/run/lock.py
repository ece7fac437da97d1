"""One process at a time works in a folder of runs."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from excessmtl_ext.training.run.files import open_own

# A child that lost its parent ends after the step, and the evaluation, that it is in.
SECONDS_TO_WAIT_FOR_LOST_CHILDREN = 60

# What the file of a lock holds: the number of a process, or nothing where it was killed before writing it.
_CONTENT = re.compile(rb"\d{0,20}\n?")


@contextmanager
def hold_folder(
    folder: Path,
    what: str,
    announce: Callable[[str], None] = lambda line: None,
    *,
    is_required: bool = True,
) -> Iterator[int]:
    """Holds the lock of ``folder``, which child processes inherit; yields its file descriptor.

    The lock is the kernel's: it ends with the last process that holds it, however that ends. A process that was killed
    may leave children that end a little later; they are waited for.

    Args:
        folder: Made if it does not exist.
        what: What works there: ``"run"`` or ``"sweep"``. Names the lock's file.
        announce: Called with a line before a wait.
        is_required: A system without file locks is an error. If False, nothing is held there and -1 yielded.

    Raises:
        BlockingIOError: another process works in the folder.
        FileExistsError: the lock's file holds something else.
        ModuleNotFoundError: this system has no file locks, and they are required.
        OSError: the folder cannot be made or written to.
    """
    try:
        import fcntl
    except ModuleNotFoundError as error:
        if not is_required:
            yield -1
            return
        raise ModuleNotFoundError(
            f"A {what} needs the file locks of Linux or macOS; `excessmtl train` runs single cells everywhere.",
            name=error.name,
        ) from error
    path = folder / f"{what}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = open_own(path, os.O_RDWR)
    except OSError as error:
        raise OSError(
            f"Expected `output` to be a folder that can be written to, but got: {error}. Name another one."
        ) from error
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        deadline = time.monotonic() + SECONDS_TO_WAIT_FOR_LOST_CHILDREN
        has_announced = False
        while True:
            content = os.pread(descriptor, 64, 0)
            if not _CONTENT.fullmatch(content):
                raise FileExistsError(
                    f"Expected {path} to be the lock of a {what}, but it holds something else. "
                    "Move it elsewhere, or name another folder."
                )
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = content.decode().strip()
                if _is_alive(holder):
                    raise BlockingIOError(
                        f"Expected no other {what} in {folder}, but process {holder} works there."
                    ) from None
                if time.monotonic() > deadline:
                    raise BlockingIOError(
                        f"Expected no other {what} in {folder}, but workers of one that was killed still run. "
                        "They end after the step that they are in: try again later."
                    ) from None
                if not has_announced:
                    announce(f"Waiting for the workers of a {what} that was killed.")
                    has_announced = True
                time.sleep(0.2)
        try:
            file.truncate(0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield descriptor
        finally:
            # Closing is not enough while a child still has the descriptor.
            fcntl.flock(file, fcntl.LOCK_UN)


def _is_alive(pid: str) -> bool:
    if not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # another user's
    return True
