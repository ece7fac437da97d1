"""Opens files that are files: a pipe or a device under a file's name would block, or never end."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

# Not on every system: Windows has no pipes in folders, and opens text files by default.
_NONBLOCKING = getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading.

    Raises:
        FileNotFoundError: there is none.
        ValueError: ``path`` is a folder, a pipe, a socket or a device.
    """
    if path.is_dir():
        raise ValueError(f"Expected {path} to be a file, but it is a folder. Move it elsewhere.")
    # Not blocking: opening a pipe would otherwise wait for somebody who writes to it.
    descriptor = os.open(path, os.O_RDONLY | _NONBLOCKING | _BINARY)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(
            f"Expected {path} to be a file, but it is a pipe or a device. Move it elsewhere."
        )
    return os.fdopen(descriptor, "rb")


def read_bounded(path: Path, max_bytes: int, what: str) -> bytes:
    """Reads a whole file.

    Args:
        path: Of the file.
        max_bytes: A larger file is refused before it is read.
        what: The content, for the error message.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no regular file, or too large.
    """
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > max_bytes:
            raise ValueError(
                f"Expected {path} to be {what} of at most {max_bytes:,} bytes, but it has {num_bytes:,}."
            )
        return file.read()
