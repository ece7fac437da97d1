"""Data files that are truncated, flipped, made up or made to harm: an error that names them, in bounded memory."""

from __future__ import annotations

import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _datasets import write_nyuv2, write_office_home
from PIL import Image, ImageFile
from scipy.io import savemat
from scipy.sparse import eye_array

from excessmtl_ext.data.multimnist import read_mnist
from excessmtl_ext.data.nyuv2 import load_nyuv2, read_frame
from excessmtl_ext.data.office_home import load_office_home, read_image
from excessmtl_ext.data.sarcos import load_sarcos

NUM_MUTATIONS = 60


def mutations(content: bytes) -> list[bytes]:
    """Truncated, with flipped bits (most in the header, which decides what is read), and with parts repeated."""
    draw = random.Random(0)
    results = [content[: draw.randrange(len(content))] for _ in range(NUM_MUTATIONS // 3)]
    for number in range(NUM_MUTATIONS // 3):
        flipped = bytearray(content)
        for _ in range(1 + number % 4):
            flipped[draw.randrange(min(len(content), 200 if number % 3 else len(content)))] ^= (
                1 << draw.randrange(8)
            )
        results.append(bytes(flipped))
    for _ in range(NUM_MUTATIONS // 3):
        start, stop = sorted(draw.randrange(len(content)) for _ in range(2))
        results.append(content[:stop] + content[start:])
    return [*results, b"", b"\0" * 100, b"<!DOCTYPE html><html>404</html>", b"PK\3\4" + content]


def write_mnist_part(folder: Path) -> None:
    header = bytes((0, 0, 8, 3)) + b"".join(size.to_bytes(4, "big") for size in (20, 28, 28))
    (folder / "t10k-images-idx3-ubyte").write_bytes(header + bytes(range(256)) * 61 + bytes(64))
    header = bytes((0, 0, 8, 1)) + (20).to_bytes(4, "big")
    (folder / "t10k-labels-idx1-ubyte").write_bytes(header + bytes(range(10)) * 2)


def write_sarcos_part(folder: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(60, 28))
    savemat(folder / "sarcos_inv.mat", {"sarcos_inv": rows[:40]}, do_compression=True)
    savemat(folder / "sarcos_inv_test.mat", {"sarcos_inv_test": rows[40:]})


def write_frame(folder: Path) -> None:
    write_nyuv2(folder, num_train=1, num_test=0, height=6, width=8)


def write_image(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=(24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "1.jpg")
    Image.fromarray(pixels).save(folder / "1.png")


FRAME = "nyuv2/train"
DATA_FILES: dict[str, tuple[Callable[[Path], None], str, Callable[[Path], Any]]] = {
    "mnist images": (write_mnist_part, "t10k-images-idx3-ubyte", lambda f: read_mnist(f, "t10k")),
    "mnist labels": (write_mnist_part, "t10k-labels-idx1-ubyte", lambda f: read_mnist(f, "t10k")),
    "sarcos, compressed": (write_sarcos_part, "sarcos_inv.mat", load_sarcos),
    "sarcos": (write_sarcos_part, "sarcos_inv_test.mat", load_sarcos),
    "nyuv2 image": (write_frame, f"{FRAME}/image/0.npy", lambda f: read_frame(f / FRAME, 0)),
    "nyuv2 label": (write_frame, f"{FRAME}/label/0.npy", lambda f: read_frame(f / FRAME, 0)),
    "jpeg": (write_image, "1.jpg", lambda f: read_image(f / "1.jpg", 16)),
    "png": (write_image, "1.png", lambda f: read_image(f / "1.png", 16)),
}


@pytest.mark.parametrize("name", DATA_FILES)
def test_a_damaged_data_file_is_read_or_is_an_error_that_names_it(
    tmp_path: Path, name: str
) -> None:
    write, file, read = DATA_FILES[name]
    write(tmp_path)
    path = tmp_path / file
    read(tmp_path)
    num_errors = 0
    for content in mutations(path.read_bytes()):
        path.write_bytes(content)
        try:
            read(tmp_path)
        except ValueError as error:
            num_errors += 1
            assert path.name in str(error), error
            assert str(error).startswith("Expected"), error
    assert num_errors > NUM_MUTATIONS // 3


def test_an_mnist_header_whose_size_overflows_is_an_error(tmp_path: Path) -> None:
    """2**32 - 2**16 and the like: products that are 0 modulo 2**64 would match an empty body."""
    write_mnist_part(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte"
    sizes = (1 << 31, 1 << 31, 4)
    path.write_bytes(bytes((0, 0, 8, 3)) + b"".join(size.to_bytes(4, "big") for size in sizes))
    with pytest.raises(
        ValueError, match=rf"Expected {path} to have 18,446,744,073,709,551,632 bytes"
    ):
        read_mnist(tmp_path, "t10k")


def test_mnist_labels_out_of_range_are_an_error(tmp_path: Path) -> None:
    write_mnist_part(tmp_path)
    path = tmp_path / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match=rf"labels from 0 to 9 in {path}, but got up to 255"):
        read_mnist(tmp_path, "t10k")


def test_a_sparse_matrix_in_a_mat_file_is_an_error(tmp_path: Path) -> None:
    write_sarcos_part(tmp_path)
    savemat(tmp_path / "sarcos_inv.mat", {"sarcos_inv": eye_array(28, format="csc")})
    with pytest.raises(ValueError, match=r"sarcos_inv.mat to be floating point \[N, 28\], but got"):
        load_sarcos(tmp_path)


@pytest.mark.parametrize("name", ["sarcos_inv", "sarcos_inv_test"])
def test_numbers_that_float32_cannot_hold_are_an_error_that_names_the_file(
    tmp_path: Path, name: str
) -> None:
    write_sarcos_part(tmp_path)
    for value in (1e39, -1e300, 1.7e308):
        rows = np.random.default_rng(0).normal(size=(40, 28))
        rows[3, 5] = value
        savemat(tmp_path / f"{name}.mat", {name: rows})
        with pytest.raises(
            ValueError, match=rf"within the range of float32 in .*{name}\.mat, but 1"
        ):
            load_sarcos(tmp_path)


def test_test_rows_beyond_what_training_rows_can_standardise_are_an_error(tmp_path: Path) -> None:
    train, test = np.random.default_rng(0).normal(size=(2, 40, 28))
    train[:, 3] = np.linspace(0, 1e-150, 40)
    test[0, 3] = 1e30
    savemat(tmp_path / "sarcos_inv.mat", {"sarcos_inv": train})
    savemat(tmp_path / "sarcos_inv_test.mat", {"sarcos_inv_test": test})
    with pytest.raises(ValueError, match=r"sarcos_inv_test\.mat to be finite when .* standardised"):
        load_sarcos(tmp_path)


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000, 3), }\n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-6, 8, 3), }\n",
        "{'descr': '|O', 'fortran_order': False, 'shape': (6, 8, 3), }\n",
        "__import__('os').mkdir('ran')\n",
    ],
    ids=["huge", "negative", "objects", "code"],
)
def test_a_hostile_npy_header_allocates_and_executes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_frame(tmp_path)
    path = tmp_path / FRAME / "image" / "0.npy"
    path.write_bytes(npy_header(header) + bytes(6 * 8 * 3 * 4))
    with pytest.raises(ValueError, match=rf"Expected {path} to be an array of numbers"):
        read_frame(tmp_path / FRAME, 0)
    assert not (tmp_path / "ran").exists()


def test_an_archive_in_place_of_an_array_is_an_error(tmp_path: Path) -> None:
    write_frame(tmp_path)
    path = tmp_path / FRAME / "image" / "0.npy"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../outside.npy", b"0" * 100)
    with pytest.raises(ValueError, match=rf"Expected {path} to be an array of numbers"):
        read_frame(tmp_path / FRAME, 0)


def test_nan_in_a_frame_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    write_frame(tmp_path)
    path = tmp_path / FRAME / "depth" / "0.npy"
    depth = np.load(path)
    depth[0, 0] = np.nan
    np.save(path, depth)
    with pytest.raises(ValueError, match=rf"Expected finite numbers in {path}, but 1 are not"):
        read_frame(tmp_path / FRAME, 0)


def test_a_number_in_a_frame_that_float32_cannot_hold_is_an_error(tmp_path: Path) -> None:
    write_frame(tmp_path)
    path = tmp_path / FRAME / "depth" / "0.npy"
    depth = np.load(path).astype(np.float64)
    depth[0, 0] = 1e200
    np.save(path, depth)
    with pytest.raises(
        ValueError, match=rf"Expected numbers that float32 holds in {path}, but 1 are not"
    ):
        read_frame(tmp_path / FRAME, 0)


@pytest.mark.parametrize("part", ["train", "val"])
def test_frames_of_other_sizes_are_an_error_that_names_one_unless_they_are_resized(
    tmp_path: Path, part: str
) -> None:
    write_nyuv2(tmp_path, num_train=4, num_test=3, height=16, width=32)
    write_nyuv2(tmp_path / "other", num_train=1, num_test=1, height=32, width=32)
    last = 3 if part == "train" else 2
    for kind in ("image", "label", "depth", "normal"):
        frame = tmp_path / "other/nyuv2" / part / kind / "0.npy"
        shutil.copy(frame, tmp_path / "nyuv2" / part / kind / f"{last}.npy")
    path = tmp_path / f"nyuv2/{part}/image/{last}.npy"
    with pytest.raises(
        ValueError, match=rf"one size, \[16, 32, 3\] as in 0\.npy, but got \[32, 32, 3\] in {path}"
    ):
        load_nyuv2(tmp_path)
    data = load_nyuv2(tmp_path, size=(16, 16))
    for split in (data.train, data.validation, data.test):
        assert split.batch(torch.arange(len(split))).inputs.shape[1:] == (3, 16, 16)


@pytest.mark.parametrize("name", ["01", "000", "00", "-1", "1.0", "\u0661", "x"])
def test_a_frame_that_is_not_named_by_its_number_is_an_error_that_names_it(
    tmp_path: Path, name: str
) -> None:
    write_nyuv2(tmp_path, num_train=3, num_test=1, height=16, width=16)
    for kind in ("image", "label", "depth", "normal"):
        folder = tmp_path / FRAME / kind
        shutil.copy(folder / "1.npy", folder / f"{name}.npy")
    with pytest.raises(
        ValueError, match=rf"without leading zeros.*but got {name}\.npy\. Rename it"
    ):
        load_nyuv2(tmp_path)


def test_a_frame_as_large_as_a_sparse_file_allows_is_refused_before_it_is_read(
    tmp_path: Path,
) -> None:
    write_frame(tmp_path)
    path = tmp_path / FRAME / "image" / "0.npy"
    header = npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (90000, 90000, 3), }\n")
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 90_000**2 * 12)
    with pytest.raises(ValueError, match=rf"{path} to be a frame of at most 16,777,216 pixels"):
        read_frame(tmp_path / FRAME, 0)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "EPS"])
def test_an_image_of_another_format_is_refused_whatever_its_name_says(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "1.jpg"
    Image.new("RGB", (9, 9)).save(path, format=kind)
    with pytest.raises(ValueError, match=f"Expected {path} to be a JPEG or PNG image"):
        read_image(path, 8)


def test_an_image_that_unpacks_to_gigabytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)  # as a bomb is to the real limit
    path = tmp_path / "1.png"
    Image.new("L", (100, 100)).save(path)
    with pytest.raises(ValueError, match=f"Expected {path} to be a JPEG.*decompression bomb"):
        read_image(path, 8)


def test_an_image_of_more_pixels_than_an_image_has_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "1.png"
    Image.new("1", (6_000, 6_000)).save(path)  # 6 KB; as RGB 108 MB
    assert path.stat().st_size < 20_000

    def decoded(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    with pytest.raises(
        ValueError, match=rf"{path} to be .*6,000 x 6,000 pixels, more than 33,554,432"
    ):
        read_image(path, 8)


def test_a_large_photograph_is_shrunk_while_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "1.jpg"
    Image.new("RGB", (6_000, 6_000), (200, 100, 0)).save(path)
    assert read_image(path, 8).mean((1, 2)).tolist() == pytest.approx([0.78, 0.39, 0], abs=0.02)


def test_an_image_of_16_bits_is_an_error_and_not_white(tmp_path: Path) -> None:
    path = tmp_path / "1.png"
    Image.new("I;16", (8, 8), 1_000).save(path)
    with pytest.raises(ValueError, match=rf"{path} to be .*mode 'I;16', and not of 8 bits"):
        read_image(path, 8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_images_of_8_bits_or_less_are_read(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "1.png"
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(path)
    assert (read_image(path, 8) == 1).all()


PIPES: dict[str, tuple[Callable[[Path], None], str, Callable[[Path], Any]]] = {
    **{name: entry for name, entry in DATA_FILES.items() if "compressed" not in name},
    "office-home list": (
        lambda folder: write_office_home(folder / "images"),
        "lists/Art_train.txt",
        lambda f: load_office_home(f / "images", split_lists=f / "lists", image_size=8),
    ),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_in_place_of_a_data_file_is_an_error_that_names_it_and_is_not_waited_for(
    tmp_path: Path, name: str
) -> None:
    write, file, read = PIPES[name]
    write(tmp_path)
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises((ValueError, FileNotFoundError), match=path.name):
        read(tmp_path)


def test_an_mnist_file_is_not_read_before_its_header_fits_its_size(tmp_path: Path) -> None:
    write_mnist_part(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte"
    header = path.read_bytes()[:16]
    with path.open("wb") as file:  # sparse: it takes no space
        file.write(header)
        file.truncate(1 << 40)
    with pytest.raises(
        ValueError, match=rf"{path} to have 15,696 bytes .*, but got 1,099,511,627,776"
    ):
        read_mnist(tmp_path, "t10k")
    with path.open("wb") as file:
        sizes = (1 << 30, 28, 28)
        file.write(header[:4] + b"".join(size.to_bytes(4, "big") for size in sizes))
        file.truncate(16 + (1 << 30) * 28 * 28)
    with pytest.raises(ValueError, match=rf"{path} to have at most 470,000,000 bytes"):
        read_mnist(tmp_path, "t10k")


@pytest.mark.parametrize(
    "line", [b"Art/../../secret.jpg 0", b"Art/Bed/\xff.jpg 0", b"Art/Bed/00000.jpg " + b"9" * 5000]
)
def test_a_hostile_split_list_is_an_error(tmp_path: Path, line: bytes) -> None:
    write_office_home(tmp_path / "images")
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "Art_train.txt").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=rf"Expected .*{lists / 'Art_train.txt'}"):
        load_office_home(tmp_path / "images", split_lists=lists, image_size=8)
