"""Reads a user's Python file that adds methods or data sets to the benchmark."""

from __future__ import annotations

import hashlib
import runpy
from pathlib import Path
from typing import Any, TypeVar

Kind = TypeVar("Kind")


def read_list(path: Path, name: str, kind: type[Kind]) -> list[Kind]:
    """Runs a file and returns the list that it gives.

    Args:
        path: Of the file. It is run as Python: name none that is not trusted.
        name: Of the list.
        kind: Of its members.

    Raises:
        ValueError: there is no such file, it cannot be run, or it gives no such list; says which.
    """
    if not path.is_file():
        raise ValueError(f"Expected a Python file at {path}, but there is none.")
    try:
        content: dict[str, Any] = runpy.run_path(str(path), run_name=module_name(path))
    except Exception as error:  # whatever the user's file raises
        raise ValueError(
            f"Expected {path} to run, but it raised {type(error).__name__}: {error}."
        ) from error
    found = content.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(one, kind) for one in found):
        raise ValueError(
            f"Expected {path} to give {name}, a list of {kind.__name__}, but got {type(found).__name__}."
        )
    return found


def module_name(path: Path) -> str:
    """Returns the name under which a file is run: never ``__main__``."""
    return f"excessmtl_benchmark_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"


def content_hash(path: Path) -> str:
    """Returns what tells apart two contents of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
