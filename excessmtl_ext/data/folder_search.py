"""Finds a data set below the folder that a user names, or says what is there instead."""

from collections.abc import Sequence
from pathlib import Path


def find_folder(
    data_root: Path, layouts: Sequence[str], *, marker: str, holds: str, example: str, download: str
) -> Path:
    """Returns the first of the known layouts that has any file of the data set.

    Args:
        data_root: The folder that the user named.
        layouts: Folders below it, in the order in which they are tried; ``"."`` is the folder itself.
        marker: Pattern that a file or folder of the data set matches.
        holds: The data set, for the error message.
        example: A file that would be there, for the error message.
        download: How to get the data, for the error message.

    Raises:
        FileNotFoundError: none of the layouts has the data set.
    """
    candidates = [data_root / layout for layout in layouts]
    for candidate in candidates:
        if any(candidate.glob(marker)):
            return candidate
    tried = ", ".join(str(candidate / example) for candidate in candidates)
    found = "no such folder" if not data_root.is_dir() else listing(data_root)
    raise FileNotFoundError(
        f"Expected `data_root` to hold {holds}, one of {tried}; but {data_root} is: {found}. {download}"
    )


def listing(folder: Path, limit: int = 8) -> str:
    """Returns the first names in a folder, for an error message."""
    if not folder.is_dir():
        return "no folder"
    all_names = sorted(entry.name for entry in folder.iterdir())
    if not all_names:
        return "an empty folder"
    more = f" and {len(all_names) - limit} more" if len(all_names) > limit else ""
    return "a folder with " + ", ".join(all_names[:limit]) + more
