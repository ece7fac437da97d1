"""Reads one matrix of a MATLAB 5 file, in as much memory as its header promises and the caller allows.

A file of a few megabytes can unpack to many gigabytes: sizes are compared with what the caller expects before anything
is unpacked. The format: https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from excessmtl_ext.data.regular_file import open_regular

_HEADER_BYTES = 128
_VERSION = 0x0100

# Types of elements.
_MATRIX, _COMPRESSED = 14, 15
_INT8, _INT32, _UINT32 = 1, 5, 6

# Types of numbers, as numpy names them. MATLAB stores a double matrix in the smallest type that holds it.
_NUMBERS = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
}  # fmt: skip
_CLASSES = {6: "float64", 7: "float32"}  # of arrays: double and single
_CLASS_NAMES = {
    1: "a cell array", 2: "a structure", 3: "an object", 4: "text", 5: "a sparse matrix",
    8: "int8", 9: "uint8", 10: "int16", 11: "uint16", 12: "int32", 13: "uint32", 14: "int64", 15: "uint64",
}  # fmt: skip
_COMPLEX_FLAG = 0x0800

# Dimensions and name of a variable come first; MATLAB's names have at most 63 letters.
_MAX_DIMENSIONS = 32
_MAX_NAME_BYTES = 256
_CHUNK_BYTES = 1 << 16


class MatFileError(ValueError):
    """A file that is no MATLAB 5 file, or whose parts do not fit together."""


@dataclass(frozen=True)
class _Variable:
    """What the head of a matrix says.

    Attributes:
        name: Of the variable.
        kind: Number of its class.
        is_complex: It has an imaginary part.
        shape: Its dimensions.
    """

    name: str
    kind: int
    is_complex: bool
    shape: tuple[int, ...]

    def __str__(self) -> str:
        kind = _CLASSES.get(self.kind) or _CLASS_NAMES.get(self.kind, f"class {self.kind}")
        return f"{'complex ' if self.is_complex else ''}{kind} {list(self.shape)}"


def read_matrix(
    path: Path, name: str, check: Callable[[tuple[int, ...]], bool], expected: str
) -> NDArray[np.floating]:
    """Reads a variable of single or double precision.

    Args:
        path: Of the file.
        name: Of the variable.
        check: Returns whether a variable of this shape is to be read; asked before memory is taken for it.
        expected: What ``check`` asks for, for the error message.

    Raises:
        MatFileError: the file is damaged, or of another format.
        LookupError: it has no such variable; names those that it has.
        TypeError: the variable is of another type or shape; says of which.
    """
    names: list[str] = []
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        order = _read_order(file)
        while file.tell() < num_bytes:
            kind, size = _tag(_exactly(file, 8), order)
            end = file.tell() + size
            if end > num_bytes:
                raise MatFileError(f"an element ends {end - num_bytes:,} bytes behind the file")
            if kind in (_MATRIX, _COMPRESSED):
                stream = _Stream(file, size, is_packed=kind == _COMPRESSED)
                if kind == _COMPRESSED and _tag(stream.read(8), order)[0] != _MATRIX:
                    raise MatFileError("a compressed element is no matrix")
                variable = _read_head(stream, order)
                names.append(variable.name)
                if variable.name == name:
                    if (
                        variable.kind not in _CLASSES
                        or variable.is_complex
                        or not check(variable.shape)
                    ):
                        raise TypeError(f"{expected}, but got {variable}")
                    numbers = _read_numbers(stream, order, variable)
                    stream.finish()
                    return numbers
            file.seek(end)
    raise LookupError(", ".join(names) or "none")


class _Stream:
    """The bytes of one element, unpacked as far as they are asked for."""

    def __init__(self, file: BinaryIO, size: int, *, is_packed: bool) -> None:
        self._file = file
        self._left = size
        self._unpacker = zlib.decompressobj() if is_packed else None
        self._packed = b""

    def read(self, size: int) -> bytes:
        """Returns exactly ``size`` bytes."""
        parts: list[bytes] = []
        missing = size
        while missing > 0:
            part = self._some(missing)
            if not part:
                raise MatFileError("an element ends in its middle")
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def finish(self) -> None:
        """Checks that the element ends here, but for padding, and has the checksum that it was packed with."""
        if len(self._some(_CHUNK_BYTES)) > 8 or self._some(1):
            raise MatFileError("an element goes on behind its numbers")
        if self._unpacker is not None and not self._unpacker.eof:
            raise MatFileError("a compressed element ends in its middle")

    def _some(self, size: int) -> bytes:
        """Returns up to ``size`` bytes, none at the end."""
        if self._unpacker is None:
            part = self._file.read(min(size, self._left))
            self._left -= len(part)
            return part
        while True:
            if not self._packed:
                self._packed = self._file.read(min(_CHUNK_BYTES, self._left))
                self._left -= len(self._packed)
            try:
                part = self._unpacker.decompress(self._packed, size)
            except zlib.error as error:
                raise MatFileError(f"a compressed element is damaged: {error}") from error
            had_input = bool(self._packed)
            self._packed = self._unpacker.unconsumed_tail
            if part or not had_input:
                return part


def _read_order(file: BinaryIO) -> str:
    """Returns the byte order of a MATLAB 5 file, ``"<"`` or ``">"``, after its header."""
    header = file.read(_HEADER_BYTES)
    order = {b"IM": "<", b"MI": ">"}.get(header[126:])
    if order is None or struct.unpack(f"{order}H", header[124:126])[0] != _VERSION:
        raise MatFileError(f"it begins with {header[:20]!r}")
    return order


def _exactly(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise MatFileError("it ends in the middle of an element")
    return content


def _tag(content: bytes, order: str) -> tuple[int, int]:
    """Returns the type and the size of an element."""
    kind, size = struct.unpack(f"{order}II", content)
    return kind, size


def _read_element(stream: _Stream, order: str, max_bytes: int) -> tuple[int, bytes]:
    """Reads a small element within a matrix: type and content. Up to 4 bytes lie within the tag itself."""
    tag = stream.read(8)
    kind, size = _tag(tag, order)
    if kind >> 16:
        size, kind = kind >> 16, kind & 0xFFFF
        if size > 4:
            raise MatFileError("a short element is too long")
        return kind, tag[4 : 4 + size]
    if size > max_bytes:
        raise MatFileError(f"an element of {size:,} bytes where {max_bytes} are the most")
    content = stream.read(size)
    stream.read(-size % 8)
    return kind, content


def _read_head(stream: _Stream, order: str) -> _Variable:
    kind, flags = _read_element(stream, order, 8)
    if kind != _UINT32 or len(flags) != 8:
        raise MatFileError("a matrix begins without its class")
    first = struct.unpack(f"{order}I", flags[:4])[0]
    kind, dimensions = _read_element(stream, order, 4 * _MAX_DIMENSIONS)
    if kind != _INT32 or len(dimensions) < 8 or len(dimensions) % 4:
        raise MatFileError("a matrix has no dimensions")
    shape = struct.unpack(f"{order}{len(dimensions) // 4}i", dimensions)
    if min(shape) < 0:
        raise MatFileError(f"a matrix has dimensions {list(shape)}")
    kind, name = _read_element(stream, order, _MAX_NAME_BYTES)
    if kind != _INT8:
        raise MatFileError("a matrix has no name")
    return _Variable(
        name.decode("ascii", "replace"), first & 0xFF, bool(first & _COMPLEX_FLAG), shape
    )


def _read_numbers(stream: _Stream, order: str, variable: _Variable) -> NDArray[np.floating]:
    tag = stream.read(8)
    kind, size = _tag(tag, order)
    short = None
    if kind >> 16:
        size, kind = kind >> 16, kind & 0xFFFF
        short = tag[4:]
    if kind not in _NUMBERS:
        raise MatFileError(f"its numbers are of type {kind}")
    stored = np.dtype(order + _NUMBERS[kind])
    expected = math.prod(variable.shape) * stored.itemsize
    if size != expected or (short is not None and size > 4):
        raise MatFileError(f"{size:,} bytes of numbers for {variable}")
    content = stream.read(size) if short is None else short[:size]
    numbers = np.frombuffer(content, dtype=stored).astype(_CLASSES[variable.kind])
    return numbers.reshape(variable.shape, order="F")
