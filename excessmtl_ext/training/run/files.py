"""Reads and writes the files of runs: whole or not at all, and an error names the file and the way out."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any


def read_table(
    path: Path, text: Iterable[str] = (), *, needs: Iterable[str] = (), has_gaps: bool = False
) -> list[dict[str, Any]]:
    """Reads a table of numbers: a dict from column to value per row.

    Args:
        path: Of the CSV file.
        text: Columns that hold text.
        needs: Columns that it must have.
        has_gaps: Numbers may be missing: such a column is left out of the row.

    Raises:
        ValueError: the file is no such table; says where.
    """
    texts = set(text)
    rows: list[dict[str, Any]] = []
    line = 1
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [name for name in needs if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"it has no column {', '.join(missing)}")
            for row in reader:
                line = reader.line_num
                if None in row or None in row.values():
                    raise ValueError(
                        f"{len(reader.fieldnames or ())} columns, a row of another length"
                    )
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
            "Was it edited, or cut off? Take it from a copy, or run again into another folder."
        ) from error
    return rows


def read_json(path: Path, *names: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: Of the file.
        *names: Entries that it must have.

    Raises:
        ValueError: the file holds something else; says what.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"Expected {path} to be JSON that a run has written, but it cannot be read ({error}). "
            "Was it edited, or cut off? Take it from a copy, or run again into another folder."
        ) from error
    missing = [name for name in names if not isinstance(content, dict) or name not in content]
    if missing or not isinstance(content, dict):
        raise ValueError(
            f"Expected {path} to hold {', '.join(missing) or 'a JSON object'}, but got "
            f"{', '.join(content) if isinstance(content, dict) else type(content).__name__}. "
            "Was it edited? Take it from a copy, or run again into another folder."
        )
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an indented JSON file, as a whole or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes beside the file and renames: a reader, or a run after a crash, sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk, half a file takes the space of others
        raise
    os.replace(temporary, path)


def check_disk_space(folder: Path, file_sizes: Sequence[int]) -> None:
    """Raises OSError unless files of these sizes, in bytes, can be written to ``folder`` together.

    They are allocated and removed: so a quota or a limit on the size of files counts as a full disk does.
    """
    paths = [folder / f"space_{number}.tmp" for number in range(len(file_sizes))]
    try:
        for path, size in zip(paths, file_sizes, strict=True):
            with path.open("wb") as file:
                _allocate(file, size)
    except OSError as error:
        raise OSError(
            f"Expected space for {sum(file_sizes) / 2**20:,.1f} MiB in {folder}, which this run will write, but got: "
            f"{error.strerror}. Free some space, or name another folder."
        ) from error
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def _allocate(file: IO[bytes], size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    elif shutil.disk_usage(file.name).free < size:  # macOS, Windows
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
