"""Two overlapping digits in one image, as in MultiMNIST (Sabour et al. 2017; Sener & Koltun 2018)."""

from typing import NamedTuple

import torch
from torch import Tensor

from excessmtl_ext.data.label_noise import corrupt_classes, noise_share
from excessmtl_ext.data.multitask_data import MultiTaskData, Task, TensorSplit
from excessmtl_ext.data.seeding import seeded_generator

NUM_DIGITS = 10

# The test pairs do not depend on the seed of a run: results of different seeds are about the same test set.
TEST_PAIRING_SEED = 0


class LabelledDigits(NamedTuple):
    """Single digits: images uint8 [N, H, W], labels int64 [N]."""

    images: Tensor
    labels: Tensor


class DigitPairs(NamedTuple):
    """Overlaid digits: images uint8 [N, 1, H, W], labels of the top-left and of the bottom-right digit, int64 [N]."""

    images: Tensor
    top_left: Tensor
    bottom_right: Tensor


class PairGeometry(NamedTuple):
    """Positions of two digits: the first at (0, 0), the second at (``offset``, ``offset``) of a square canvas.

    Attributes:
        offset: Shift of the second digit in pixels, right and down.
        canvas: Height and width of the canvas, at least those of a digit plus ``offset``.
        size: Height and width that the canvas is scaled to, by nearest neighbour.
    """

    offset: int
    canvas: int
    size: int


def overlay(top_left: Tensor, bottom_right: Tensor, geometry: PairGeometry) -> Tensor:
    """Lays two digits over each other; where they overlap the brighter pixel wins.

    Args:
        top_left: uint8 [N, H, W].
        bottom_right: uint8 [N, H, W].
        geometry: Their positions.

    Shape:
        Returns uint8 [N, 1, size, size].
    """
    offset, canvas, size = geometry
    num_images, height, width = top_left.shape
    # A source pixel is the one under the centre of the target pixel. Each digit is read at these positions directly,
    # so that the full canvas of 60,000 images is never made.
    source = ((torch.arange(size) + 0.5) * canvas / size).long()

    def on_canvas(digits: Tensor, shift: int) -> Tensor:
        placed = digits.new_zeros(num_images, size, size)
        rows = (source >= shift) & (source < shift + height)
        columns = (source >= shift) & (source < shift + width)
        cut = digits[:, source[rows] - shift][:, :, source[columns] - shift]
        first_row, first_column = int(rows.nonzero()[0]), int(columns.nonzero()[0])
        placed[
            :, first_row : first_row + cut.shape[1], first_column : first_column + cut.shape[2]
        ] = cut
        return placed

    return torch.maximum(on_canvas(top_left, 0), on_canvas(bottom_right, offset)).unsqueeze(1)


def pair_digits(
    digits: LabelledDigits, num_pairs: int, geometry: PairGeometry, generator: torch.Generator
) -> DigitPairs:
    """Makes ``num_pairs`` images of two random digits.

    The digits of each side are those of independent permutations, so that on each side no digit appears twice before
    all have appeared once.

    Args:
        digits: The digits to pair.
        num_pairs: N, may exceed the number of digits.
        geometry: The positions of the two.
        generator: Decides the pairing.
    """
    num_digits = len(digits.labels)

    def picks() -> Tensor:
        rounds = -(-num_pairs // num_digits)
        permutations = [torch.randperm(num_digits, generator=generator) for _ in range(rounds)]
        return torch.cat(permutations)[:num_pairs]

    left, right = picks(), picks()
    images = overlay(digits.images[left], digits.images[right], geometry)
    return DigitPairs(images, digits.labels[left], digits.labels[right])


def split_digits(
    digits: LabelledDigits, held_out: int, seed: int, purpose: str
) -> tuple[LabelledDigits, LabelledDigits]:
    """Splits off ``held_out`` digits at random. No digit of one part appears in a pair of the other."""
    order = torch.randperm(len(digits.labels), generator=seeded_generator(seed, "split", purpose))
    kept, cut = order[held_out:], order[:held_out]
    return (
        LabelledDigits(digits.images[kept], digits.labels[kept]),
        LabelledDigits(digits.images[cut], digits.labels[cut]),
    )


def make_digit_pair_data(
    train: DigitPairs, validation: DigitPairs, test: DigitPairs, *, noise: float, seed: int
) -> MultiTaskData:
    """Joins three sets of pairs to a data set of two tasks, with noise on the bottom-right training labels.

    Args:
        train: Training pairs; their pixels give the mean and the deviation that standardise all three sets.
        validation: Pairs to select models on.
        test: Pairs to report.
        noise: Share of the bottom-right training labels to replace, see `corrupt_classes`.
        seed: Decides which.
    """
    noisy, observed = (
        corrupt_classes(
            pairs.bottom_right, num_classes=NUM_DIGITS, fraction=noise, seed=seed, stream=stream
        )
        for pairs, stream in ((train, ""), (validation, "validation"))
    )
    # From the histogram: exact, and no float copy of all images.
    counts = torch.bincount(train.images.flatten(), minlength=256).double()
    values = torch.arange(256, dtype=torch.float64)
    mean = float((counts * values).sum() / counts.sum())
    std = float(((counts * (values - mean) ** 2).sum() / counts.sum()).sqrt())

    def split(pairs: DigitPairs, bottom_right: Tensor) -> TensorSplit:
        return TensorSplit(pairs.images, (pairs.top_left, bottom_right), mean, std)

    return MultiTaskData(
        tasks=(
            Task("top_left", NUM_DIGITS),
            Task("bottom_right", NUM_DIGITS, is_noisy=True),
        ),
        train=split(train, noisy.labels),
        validation=split(validation, validation.bottom_right),
        test=split(test, test.bottom_right),
        clean_train=split(train, train.bottom_right),
        corrupted={"bottom_right": noisy.corrupted},
        observed_validation=split(validation, observed.labels),
        noise_shares={"bottom_right": noise_share(noisy.labels, train.bottom_right)},
    )
