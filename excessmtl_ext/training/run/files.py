"""Reads and writes the files of runs: whole or not at all, never through a link, and an error names the file."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from excessmtl_ext.data.regular_file import open_regular, read_bounded
from excessmtl_ext.training.run.schema import Schema, find_mismatch

# A settings file of a run has some kilobytes, of a sweep with many commands some hundred.
MAX_JSON_BYTES = 1 << 26

# Names no user gives: such a file is a leftover of a process that was killed.
TEMPORARY_SUFFIX = ".excessmtl.tmp"

WAY_OUT = "Was it edited, or cut off? Take it from a copy, or run again into another folder."


def read_table(
    path: Path,
    text: Iterable[str] = (),
    *,
    needs: Iterable[str] = (),
    has_gaps: bool = False,
    content: bytes | None = None,
) -> list[dict[str, Any]]:
    """Reads a table of numbers: a dict from column to value per row.

    Args:
        path: Of the CSV file.
        text: Columns that hold text.
        needs: Columns that it must have.
        has_gaps: Numbers may be missing: such a column is left out of the row.
        content: What to read instead of the file, which is then only named.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such table; says where.
    """
    texts = set(text)
    rows: list[dict[str, Any]] = []
    line = 1
    with open_regular(path) if content is None else io.BytesIO(content) as file:
        try:
            reader = csv.DictReader(
                io.TextIOWrapper(file, encoding="utf-8", newline=""), strict=True
            )
            columns = list(reader.fieldnames or ())
            missing = [name for name in needs if name not in columns]
            if missing:
                raise ValueError(f"it has no column {', '.join(missing)}")
            if len(set(columns)) < len(columns):
                raise ValueError("two of its columns have one name")
            for row in reader:
                line = reader.line_num
                if None in row or None in row.values():
                    raise ValueError(f"{len(columns)} columns, a row of another length")
                rows.append(
                    {
                        name: value if name in texts else float(value)
                        for name, value in row.items()
                        if value or name in texts or not has_gaps
                    }
                )
        except (ValueError, csv.Error) as error:
            raise ValueError(
                f"Expected {path} to be a table that a run has written, but after line {line} it is not ({error}). "
                f"{WAY_OUT}"
            ) from error
    return rows


def read_columns(path: Path) -> list[str]:
    """Returns the names of a table's columns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no line that names them.
    """
    with open_regular(path) as file:
        try:
            # A header of many tasks has some kilobytes.
            header = file.readline(1 << 20).decode("utf-8")
            names = next(csv.reader([header], strict=True), [])
        except (ValueError, csv.Error) as error:
            raise ValueError(
                f"Expected {path} to begin with the names of its columns, but got {error}. {WAY_OUT}"
            ) from error
    if not names:
        raise ValueError(
            f"Expected {path} to begin with the names of its columns, but it is empty. {WAY_OUT}"
        )
    return names


def read_json(path: Path, *names: str, schema: Schema = dict) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: Of the file.
        *names: Entries that it must have, whatever they hold.
        schema: What it must hold, see `find_mismatch`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else; says what.
    """
    content: Any = None
    try:
        content = json.loads(read_bounded(path, MAX_JSON_BYTES, "JSON that a run has written"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"Expected {path} to be JSON that a run has written, but it cannot be read ({error}). {WAY_OUT}"
        ) from error
    missing = [name for name in names if not isinstance(content, dict) or name not in content]
    if missing or not isinstance(content, dict):
        raise ValueError(
            f"Expected {path} to hold {', '.join(missing) or 'a JSON object'}, but got "
            f"{', '.join(content) if isinstance(content, dict) else type(content).__name__}. {WAY_OUT}"
        )
    mismatch = find_mismatch(content, schema)
    if mismatch is not None:
        raise ValueError(
            f"Expected {path} to be as a run has written it, with {mismatch}. {WAY_OUT}"
        )
    return content


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns what a damaged file makes of its reader's arithmetic into an error that names the file.

    Raises:
        ValueError: the body divided by a zero of the file, missed an entry of it, or the like.
    """
    try:
        yield
    except (LookupError, ArithmeticError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Expected {path} to be as a run has written it, but got {type(error).__name__}: {error}. {WAY_OUT}"
        ) from error


def finite_or_none(content: Any) -> Any:
    """Returns ``content`` with None for every number that JSON cannot hold: NaN and the infinities."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {name: finite_or_none(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite_or_none(value) for value in content]
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an indented JSON file, as a whole or not at all.

    Raises:
        ValueError: ``content`` holds NaN or infinity, see `finite_or_none`.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes beside the file and renames: a reader, or a run after a crash, sees the old file or the new one.

    A link at ``path`` is replaced, what it points to is left alone.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    try:
        with _create(temporary) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk, half a file takes the space of others
        raise
    os.replace(temporary, path)
    _sync_folder(path.parent)


def append_bytes(path: Path, content: bytes) -> None:
    """Adds to the end of a file, which is made if there is none, and waits until it is on the disk.

    Raises:
        OSError: ``path`` is a link, or no file.
    """
    with os.fdopen(open_own(path, os.O_WRONLY | os.O_APPEND), "ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def open_own(path: Path, flags: int) -> int:
    """Opens a file to write to, or makes it, and returns its descriptor.

    Raises:
        OSError: ``path`` is a link, symbolic or hard, through which something else would be written, or no file.
    """
    mode = None if not os.path.lexists(path) else path.lstat()
    if mode is None or (stat.S_ISREG(mode.st_mode) and mode.st_nlink == 1):
        # The link could have been made since: the kernel looks again.
        flags |= os.O_CREAT | _flag("O_NOFOLLOW") | _flag("O_CLOEXEC") | _flag("O_BINARY")
        return os.open(path, flags, 0o666)
    what = (
        "a symbolic link"
        if stat.S_ISLNK(mode.st_mode)
        else "a file with another name elsewhere (a hard link)"
        if stat.S_ISREG(mode.st_mode)
        else "no file"
    )
    raise OSError(
        f"Expected {path} to be a file of this folder alone, but it is {what}: writing to it would change something "
        "else. Move it elsewhere, or name another folder."
    )


def check_disk_space(folder: Path, file_sizes: Sequence[int]) -> None:
    """Raises OSError unless files of these sizes, in bytes, can be written to ``folder`` together.

    They are allocated and removed: so a quota or a limit on the size of files counts as a full disk does.
    """
    paths = [folder / f".space_{number}{TEMPORARY_SUFFIX}" for number in range(len(file_sizes))]
    try:
        for path, size in zip(paths, file_sizes, strict=True):
            with _create(path) as file:
                _allocate(file, size)
    except OSError as error:
        raise OSError(
            f"Expected space for {sum(file_sizes) / 2**20:,.1f} MiB in {folder}, which this run will write, but got: "
            f"{error.strerror}. Free some space, or name another folder."
        ) from error
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def check_replaceable(path: Path, mark: bytes) -> None:
    """Raises FileExistsError where ``path`` is something that this package has not written.

    Args:
        path: What will be replaced.
        mark: Bytes that each such file of this package has among its first 4,096.
    """
    if not os.path.lexists(path):
        return
    head = b""
    if path.is_file():
        with open_regular(path) as file:
            head = file.read(4096)
    if mark not in head:
        raise FileExistsError(
            f"Expected {path} to be absent or written by this command, but it is something else. "
            "Move it elsewhere, or name another output."
        )


def _create(path: Path) -> BinaryIO:
    """Opens a new file; what lies there is the leftover of a process that was killed, by its name."""
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _flag("O_CLOEXEC") | _flag("O_BINARY")
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def _allocate(file: IO[bytes], size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    elif shutil.disk_usage(file.name).free < size:  # macOS, Windows
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _sync_folder(folder: Path) -> None:
    """Waits until a rename is on the disk: a loss of power must not undo it after later writes."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flag(name: str) -> int:
    """Returns a flag of ``os.open`` where this system has it."""
    return getattr(os, name, 0)
