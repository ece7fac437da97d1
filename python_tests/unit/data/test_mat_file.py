"""Matrices are read as MATLAB and SciPy write them, and nothing is unpacked that was not expected."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat, savemat
from scipy.sparse import eye_array

from excessmtl_ext.data import mat_file
from excessmtl_ext.data.mat_file import MatFileError, read_matrix


def is_small(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] * shape[1] <= 10_000


def read(path: Path, name: str = "m") -> np.ndarray:
    return read_matrix(path, name, is_small, "a small matrix")


@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(
    "matrix",
    [
        np.random.default_rng(0).normal(size=(7, 5)),
        np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32),
        np.zeros((0, 5)),
        np.array([[0.5]]),
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    ],
    ids=["double", "single", "empty", "scalar", "fortran"],
)
def test_a_matrix_is_what_scipy_reads(tmp_path: Path, matrix: np.ndarray, is_packed: bool) -> None:
    path = tmp_path / "a.mat"
    others = {"aa": np.ones((2, 2)), "z": "text", "s": {"x": 1.0}, "c": np.ones(2) * 1j}
    savemat(path, {**others, "m": matrix, "zz": np.ones(3)}, do_compression=is_packed)
    ours = read(path)
    theirs = loadmat(path)["m"]
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


def element(kind: int, content: bytes, order: str = "<") -> bytes:
    return struct.pack(f"{order}II", kind, len(content)) + content + bytes(-len(content) % 8)


def matrix_element(
    numbers: bytes,
    *,
    kind: int = 9,
    shape: tuple[int, ...] = (2, 3),
    name: bytes = b"m",
    array_class: int = 6,
    order: str = "<",
) -> bytes:
    head = element(6, struct.pack(f"{order}II", array_class, 0), order)
    head += element(5, struct.pack(f"{order}{len(shape)}i", *shape), order)
    return head + element(1, name, order) + numbers


def mat_file_of(*elements: tuple[int, bytes], order: str = "<") -> bytes:
    mark = b"IM" if order == "<" else b"MI"
    header = b"MATLAB 5.0".ljust(124) + struct.pack(f"{order}H", 0x0100) + mark
    parts = [struct.pack(f"{order}II", kind, len(content)) + content for kind, content in elements]
    return header + b"".join(parts)


@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
@pytest.mark.parametrize(
    ("kind", "code"), [(1, "b"), (2, "B"), (3, "h"), (4, "H"), (5, "i"), (6, "I"), (7, "f")]
)
def test_whole_numbers_may_be_stored_in_fewer_bytes_and_in_any_order(
    tmp_path: Path, order: str, kind: int, code: str
) -> None:
    """As MATLAB stores a double matrix of small whole numbers; columns first."""
    numbers = element(kind, struct.pack(f"{order}6{code}", 1, 2, 3, 4, 5, 6), order)
    path = tmp_path / "a.mat"
    path.write_bytes(mat_file_of((14, matrix_element(numbers, order=order)), order=order))
    assert read(path).tolist() == [[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]
    assert read(path).dtype == np.float64


def test_up_to_four_bytes_may_lie_in_the_tag(tmp_path: Path) -> None:
    numbers = struct.pack("<HH4B", 2, 4, 7, 8, 9, 10)
    path = tmp_path / "a.mat"
    path.write_bytes(mat_file_of((14, matrix_element(numbers, shape=(2, 2)))))
    assert read(path).tolist() == [[7.0, 9.0], [8.0, 10.0]]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (np.arange(6, dtype=np.int32).reshape(2, 3), r"int32 \[2, 3\]"),
        (np.ones((2, 3)) * 1j, r"complex float64 \[2, 3\]"),
        (np.ones((2, 3, 4)), r"float64 \[2, 3, 4\]"),
        (np.ones((200, 300)), r"float64 \[200, 300\]"),
        (eye_array(3, format="csc"), r"a sparse matrix \[3, 3\]"),
        ("text", r"text \[1"),
        ({"x": 1.0}, r"a structure \[1, 1\]"),
    ],
)
def test_a_variable_of_another_kind_or_shape_is_an_error_that_describes_it(
    tmp_path: Path, value: Any, found: str
) -> None:
    savemat(tmp_path / "a.mat", {"m": value})
    with pytest.raises(TypeError, match=f"a small matrix, but got {found}"):
        read(tmp_path / "a.mat")


def test_a_missing_variable_is_an_error_that_names_the_others(tmp_path: Path) -> None:
    savemat(tmp_path / "a.mat", {"b": np.ones(2), "c": "text"})
    with pytest.raises(LookupError, match="b, c"):
        read(tmp_path / "a.mat")


# ---- files that promise more than they hold, or hold more than they promise


class CountingUnpacker:
    """An unpacker that adds up what it has given."""

    given = 0

    def __init__(self, make: Callable[[], Any]) -> None:
        self._unpacker = make()

    def decompress(self, content: bytes, size: int) -> bytes:
        part = self._unpacker.decompress(content, size)
        CountingUnpacker.given += len(part)
        return part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unpacker, name)


def packed(content: bytes) -> tuple[int, bytes]:
    return 15, zlib.compress(element(14, content))


MEGABYTES = bytes(20_000_000)
HUGE = {
    "rows": packed(matrix_element(element(9, MEGABYTES), shape=(2_500_000, 1))),
    "numbers": packed(matrix_element(element(9, MEGABYTES))),
    "numbers that are not there": packed(matrix_element(struct.pack("<II", 9, 4_000_000_000))),
    "name": packed(matrix_element(b"", name=MEGABYTES)),
    "behind": packed(matrix_element(element(9, bytes(48)) + MEGABYTES)),
    "another variable": packed(
        matrix_element(element(9, MEGABYTES), shape=(2_500_000, 1), name=b"n")
    ),
}


@pytest.mark.parametrize("where", HUGE)
def test_a_small_file_that_unpacks_to_much_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    make = zlib.decompressobj
    monkeypatch.setattr(mat_file.zlib, "decompressobj", lambda: CountingUnpacker(make))
    CountingUnpacker.given = 0
    path = tmp_path / "a.mat"
    path.write_bytes(mat_file_of(HUGE[where]))
    with pytest.raises((MatFileError, TypeError, LookupError)):
        read(path)
    assert CountingUnpacker.given < 200_000


def test_a_flipped_bit_of_a_packed_matrix_is_an_error(tmp_path: Path) -> None:
    """The checksum tells, where the numbers can be unpacked all the same."""
    path = tmp_path / "a.mat"
    content = bytearray(
        mat_file_of((15, zlib.compress(element(14, matrix_element(element(9, bytes(48)))), 0)))
    )
    content[-20] ^= 1  # stored, not packed: one number is another one
    path.write_bytes(content)
    with pytest.raises(MatFileError, match="incorrect data check"):
        read(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"MATLAB 5.0",
        b"<!DOCTYPE html>".ljust(200),
        mat_file_of((14, b"")),
        mat_file_of((14, matrix_element(b""))),
        mat_file_of((14, matrix_element(element(9, bytes(40))))),
        mat_file_of((14, matrix_element(element(9, bytes(48))) + bytes(80))),
        mat_file_of((14, matrix_element(element(99, bytes(48))))),
        mat_file_of((14, matrix_element(element(9, bytes(48)), shape=(-2, -3)))),
        mat_file_of((14, matrix_element(element(9, bytes(48)), shape=(6,)))),
        mat_file_of((15, b"no zlib")),
        mat_file_of((15, zlib.compress(b"short"))),
        mat_file_of((14, matrix_element(element(9, bytes(48)))))[:-9],
    ],
)
def test_a_damaged_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.mat"
    path.write_bytes(content)
    with pytest.raises((MatFileError, LookupError)):
        read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_is_an_error_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mat")
    with pytest.raises(ValueError, match=r"a\.mat to be a file, but it is a pipe"):
        read(tmp_path / "a.mat")
