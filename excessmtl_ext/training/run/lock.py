"""One process at a time works in a folder of runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# A child that lost its parent ends after the step, and the evaluation, that it is in.
SECONDS_TO_WAIT_FOR_LOST_CHILDREN = 60


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
        is_required: Whether a system without file locks is an error. If not, nothing is held there and -1 yielded.

    Raises:
        BlockingIOError: another process works in the folder.
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f"{what}.lock").open("a+")
    except OSError as error:
        raise OSError(
            f"Expected `output` to be a folder that can be written to, but got: {error}. Name another one."
        ) from error
    with lock as file:
        deadline = time.monotonic() + SECONDS_TO_WAIT_FOR_LOST_CHILDREN
        has_announced = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip()
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
            file.seek(0)
            file.truncate()
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield file.fileno()
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
