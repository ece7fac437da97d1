"""MultiMNIST: pairs of MNIST digits, the first benchmark of He et al. 2024 (Sec. 5)."""

import math
import os
from pathlib import Path

import torch

from excessmtl_ext.data.digit_pairs import (
    NUM_DIGITS,
    TEST_PAIRING_SEED,
    LabelledDigits,
    PairGeometry,
    make_digit_pair_data,
    pair_digits,
    split_digits,
)
from excessmtl_ext.data.folder_search import find_folder, listing
from excessmtl_ext.data.multitask_data import MultiTaskData
from excessmtl_ext.data.regular_file import open_regular
from excessmtl_ext.data.seeding import seeded_generator

# Geometry of Sener & Koltun 2018 (their multi_mnist_loader.py): a 36 x 36 canvas, the second digit shifted by 6
# pixels, scaled back to 28 x 28 by nearest neighbour.
OFFSET = 6
CANVAS = 36
SIZE = 28

# 6,000 of the 60,000 training digits: an accuracy of 0.9 has a standard error of 0.4 % on them.
VALIDATION_SHARE = 0.1

# Ten times the largest of the four files.
MAX_BYTES = 470_000_000

_DOWNLOAD = (
    "Download it with "
    "`python -c \"from torchvision.datasets import MNIST; MNIST('{root}', download=True)\"`."
)
_LAYOUTS = ("mnist/MNIST/raw", "MNIST/raw", "raw", ".")
_UINT8_CODE = 0x08  # third byte of an idx file: its values are unsigned bytes


def load_multimnist(
    data_root: str | Path, *, noise: float = 0.0, seed: int = 0, num_train: int | None = None
) -> MultiTaskData:
    """Makes MultiMNIST from the four MNIST files, in memory.

    Two tasks, ``top_left`` and ``bottom_right``, of ten classes each. The training digits are split 90 : 10 into
    training and validation digits before pairing, so that no digit is in both; the 10,000 test pairs are the same for
    every seed. Only the bottom-right *training* labels carry noise.

    Args:
        data_root: Folder with MNIST in the layout of torchvision (``MNIST/raw/train-images-idx3-ubyte``, ...), or the
            folder above it where MNIST lies in ``mnist``.
        noise: Share of the bottom-right training labels that is replaced, see `corrupt_classes`.
        seed: Decides the split, the pairing and the noise.
        num_train: Number of training pairs; 54,000 when None. Fewer pairs also means fewer distinct digits.

    Raises:
        FileNotFoundError: the folder or one of its files is missing; says which, and how to download them.
        ValueError: a file is truncated or is no MNIST file, or ``num_train`` is out of range.

    Cost: 50 MB of memory and about a second for all 60,000 + 10,000 digits.
    """
    data_root = Path(data_root)
    raw = find_folder(
        data_root,
        _LAYOUTS,
        marker="*-ubyte",
        holds="MNIST",
        example="train-images-idx3-ubyte",
        download=_DOWNLOAD.format(root=data_root),
    )
    train_digits = read_mnist(raw, "train")
    test_digits = read_mnist(raw, "t10k")
    num_validation = round(VALIDATION_SHARE * len(train_digits.labels))
    train_digits, validation_digits = split_digits(train_digits, num_validation, seed, "multimnist")
    available = len(train_digits.labels)
    num_train = available if num_train is None else num_train
    if not 1 <= num_train <= available:
        raise ValueError(f"Expected `num_train` in [1, {available}], but got {num_train}.")

    geometry = PairGeometry(offset=OFFSET, canvas=CANVAS, size=SIZE)
    return make_digit_pair_data(
        pair_digits(train_digits, num_train, geometry, seeded_generator(seed, "pairs", "train")),
        pair_digits(
            validation_digits,
            num_validation,
            geometry,
            seeded_generator(seed, "pairs", "validation"),
        ),
        pair_digits(
            test_digits,
            len(test_digits.labels),
            geometry,
            seeded_generator(TEST_PAIRING_SEED, "pairs", "test"),
        ),
        noise=noise,
        seed=seed,
    )


def read_mnist(raw: Path, part: str) -> LabelledDigits:
    """Reads the images and labels of one part of MNIST, after checking both files.

    Args:
        raw: The folder that holds the uncompressed idx files.
        part: ``"train"`` or ``"t10k"``, as the files are named.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated, or is not what its name says, or the two do not belong together.
    """
    image_path, label_path = raw / f"{part}-images-idx3-ubyte", raw / f"{part}-labels-idx1-ubyte"
    images = _read_idx(image_path, num_dims=3)
    labels = _read_idx(label_path, num_dims=1)
    if len(images) != len(labels):
        raise ValueError(
            f"Expected as many labels in {label_path} as images in {image_path}, {len(images)}, "
            f"but got {len(labels)}."
        )
    if images.shape[1:] != (SIZE, SIZE):
        raise ValueError(
            f"Expected images of {SIZE} x {SIZE} pixels in {image_path}, but got {list(images.shape[1:])}."
        )
    if not len(labels) or labels.max() >= NUM_DIGITS:
        raise ValueError(
            f"Expected labels from 0 to {NUM_DIGITS - 1} in {label_path}, "
            f"but got {f'up to {int(labels.max())}' if len(labels) else 'none'}. Delete it and download MNIST again."
        )
    return LabelledDigits(images, labels.long())


def _read_idx(path: Path, num_dims: int) -> torch.Tensor:
    """Reads an idx file of unsigned bytes: two zero bytes, type, number of dimensions, big-endian sizes, values.

    Read here, not by torchvision, which reports a truncated file as a failed reshape without a file name.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected {path}, but {path.parent} is: {listing(path.parent)}. "
            + _DOWNLOAD.format(root=path.parents[2] if path.parent.name == "raw" else path.parent)
        )
    header_bytes = 4 + 4 * num_dims
    magic = bytes((0, 0, _UINT8_CODE, num_dims))
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        header = file.read(header_bytes)
        if header[:4] != magic or len(header) < header_bytes:
            raise ValueError(
                f"Expected {path} to start with the idx header {magic.hex(' ')} and {num_dims} sizes, but got "
                f"{header[:4].hex(' ') or 'nothing'} in a file of {num_bytes:,} bytes. "
                "Is it still compressed, or an error page? Delete it and download MNIST again."
            )
        shape = [
            int.from_bytes(header[start : start + 4], "big") for start in range(4, header_bytes, 4)
        ]
        # In Python's integers: a hostile header cannot overflow them.
        expected_bytes = header_bytes + math.prod(shape)
        if num_bytes != expected_bytes:
            raise ValueError(
                f"Expected {path} to have {expected_bytes:,} bytes for {shape}, but got {num_bytes:,}: "
                "the download is incomplete or damaged. Delete it and download MNIST again."
            )
        if num_bytes > MAX_BYTES:
            raise ValueError(
                f"Expected {path} to have at most {MAX_BYTES:,} bytes, but got {num_bytes:,} for {shape}. "
                "Delete it and download MNIST again."
            )
        # bytearray: a tensor over read-only memory would warn.
        values = bytearray(file.read(num_bytes - header_bytes))
    if not values:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(values, dtype=torch.uint8).reshape(shape)
