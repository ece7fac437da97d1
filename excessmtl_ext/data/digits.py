"""Pairs of the 8 x 8 handwritten digits that ship inside scikit-learn: real data without a download."""

import torch

from excessmtl_ext.data.digit_pairs import (
    TEST_PAIRING_SEED,
    LabelledDigits,
    PairGeometry,
    make_digit_pair_data,
    pair_digits,
    split_digits,
)
from excessmtl_ext.data.multitask_data import MultiTaskData
from excessmtl_ext.data.seeding import seeded_generator

# A digit fills its 8 x 8 box, where an MNIST digit fills 20 x 20 of 28 x 28: shifting by half a box keeps both
# readable and still overlaps a quarter of each.
DIGIT_SIZE = 8
OFFSET = 4
SIZE = DIGIT_SIZE + OFFSET

# 1,797 digits: three fifths to train on, a fifth each to select and to test on.
NUM_VALIDATION_DIGITS = 360
NUM_TEST_DIGITS = 360

# Pairs, not digits, are the samples: each digit meets several partners.
DEFAULT_NUM_TRAIN = 8_000
MAX_NUM_TRAIN = 1_077 * 1_077  # each training digit with each: 170 MB
NUM_VALIDATION_PAIRS = 2_000
NUM_TEST_PAIRS = 4_000


def load_digit_pairs(
    *, noise: float = 0.0, seed: int = 0, num_train: int | None = None
) -> MultiTaskData:
    """Makes pairs of scikit-learn's digits: MultiMNIST in small, two tasks of ten classes.

    The UCI test set of optical digits (Alpaydin & Kaynak 1998), 1,797 images of 8 x 8 pixels with 17 grey levels.
    A fifth of the digits, always the same, makes the test pairs.

    Args:
        noise: Share of the bottom-right training labels that is replaced, see `corrupt_classes`.
        seed: Decides the training and validation split, the pairing and the noise.
        num_train: Number of training pairs; 8,000 when None.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: ``num_train`` is out of range.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'The digits come with scikit-learn, which is not installed: pip install ".[train]" in a clone.',
            name=error.name,
        ) from error
    num_train = DEFAULT_NUM_TRAIN if num_train is None else num_train
    if not 1 <= num_train <= MAX_NUM_TRAIN:
        raise ValueError(f"Expected `num_train` in [1, {MAX_NUM_TRAIN:,}], but got {num_train}.")
    images, labels = load_digits(return_X_y=True)
    # Grey levels 0 to 16, exact in float64, fit into uint8.
    digits = LabelledDigits(
        torch.as_tensor(images, dtype=torch.uint8).reshape(-1, DIGIT_SIZE, DIGIT_SIZE),
        torch.as_tensor(labels, dtype=torch.int64),
    )
    rest, test = split_digits(digits, NUM_TEST_DIGITS, TEST_PAIRING_SEED, "digits/test")
    train, validation = split_digits(rest, NUM_VALIDATION_DIGITS, seed, "digits/validation")

    geometry = PairGeometry(offset=OFFSET, canvas=SIZE, size=SIZE)
    return make_digit_pair_data(
        pair_digits(train, num_train, geometry, seeded_generator(seed, "pairs", "train")),
        pair_digits(
            validation,
            NUM_VALIDATION_PAIRS,
            geometry,
            seeded_generator(seed, "pairs", "validation"),
        ),
        pair_digits(
            test, NUM_TEST_PAIRS, geometry, seeded_generator(TEST_PAIRING_SEED, "pairs", "test")
        ),
        noise=noise,
        seed=seed,
    )
