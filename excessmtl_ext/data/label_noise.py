"""Fixed, seeded corruption of training labels.

Which samples are corrupted, and to what, depends on the seed and on the sample, never on when or by which worker it is
read. A data set that draws noise when a sample is read is a noisy stream instead: a network sees another label each
epoch and can average it out.

With the same seed, more noise corrupts the same samples in the same way and adds others, so that runs at two noise
levels differ by those samples only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from excessmtl_ext.data.multitask_data import IGNORED_CLASS
from excessmtl_ext.data.seeding import seeded_generator


@dataclass(frozen=True)
class CorruptedLabels:
    """Labels after corruption, and which samples it touched.

    Attributes:
        labels: All labels or regression targets, the corrupted ones replaced, [N].
        corrupted: Indices of the corrupted samples in ascending order, int64 [round(fraction * N)]. A label that
            was replaced by its own value is among them.
    """

    labels: Tensor
    corrupted: Tensor


def corrupt_classes(
    labels: Tensor, *, num_classes: int, fraction: float, seed: int
) -> CorruptedLabels:
    """Replaces the labels of a fixed share of the samples by labels drawn uniformly over all classes.

    The draw may hit the true class, as in He et al. 2024, Sec. 5: of the corrupted labels ``1 / num_classes`` stay
    right by chance.

    Args:
        labels: Class indices, int64 [N]. Not modified.
        num_classes: C, the number of classes.
        fraction: Share of samples to corrupt, from 0 to 1; exactly ``round(fraction * N)`` are.
        seed: Decides the samples and their new labels.

    Raises:
        ValueError: ``fraction`` is outside [0, 1], or ``labels`` are not [N] class indices below ``num_classes``.

    Example:
        >>> labels = torch.zeros(10, dtype=torch.int64)
        >>> noisy = corrupt_classes(labels, num_classes=3, fraction=0.4, seed=0)
        >>> len(noisy.corrupted)
        4
    """
    _check_fraction(fraction)
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise ValueError(
            f"Expected `labels` to be class indices, int64 [N], but got {labels.dtype} {list(labels.shape)}."
        )
    num_samples = len(labels)
    if num_samples:
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= num_classes:
            raise ValueError(
                f"Expected `labels` in [0, {num_classes}), but got values from {lowest} to {highest}."
            )
    generator = seeded_generator(seed, "label_noise", "classes")
    order = torch.randperm(num_samples, generator=generator)
    replacements = torch.randint(num_classes, (num_samples,), generator=generator)
    corrupted = order[: round(fraction * num_samples)].sort().values
    noisy_labels = labels.clone()
    noisy_labels[corrupted] = replacements[corrupted].to(labels.device)
    return CorruptedLabels(noisy_labels, corrupted)


def corrupt_values(
    values: Tensor, *, fraction: float, seed: int, stream: str = ""
) -> CorruptedLabels:
    """Adds Gaussian noise to a fixed share of the targets, with the targets' own variance (He et al. 2024, Sec. 5).

    Args:
        values: Regression targets, floating point [N]. Not modified.
        fraction: Share of samples to corrupt, from 0 to 1; exactly ``round(fraction * N)`` are.
        seed: Decides the samples and the noise on each.
        stream: Names what is corrupted. Two noisy tasks of one data set have noise that is independent.

    Raises:
        ValueError: ``fraction`` is outside [0, 1], or ``values`` are not floating point [N].

    Example:
        >>> noisy = corrupt_values(torch.arange(10.0), fraction=0.4, seed=0)
        >>> int((noisy.labels != torch.arange(10.0)).sum())
        4
    """
    _check_fraction(fraction)
    if not values.is_floating_point() or values.dim() != 1:
        raise ValueError(
            f"Expected `values` to be floating point [N], but got {values.dtype} {list(values.shape)}."
        )
    num_samples = len(values)
    generator = seeded_generator(seed, "label_noise", "values", stream)
    order = torch.randperm(num_samples, generator=generator)
    noise = torch.randn(num_samples, generator=generator, dtype=torch.float64)
    corrupted = order[: round(fraction * num_samples)].sort().values
    noisy_values = values.clone()
    if len(corrupted):
        # The variance of all targets before any of them is corrupted.
        std = float(values.double().std(correction=0))
        noisy_values[corrupted] += (noise[corrupted] * std).to(values)
    return CorruptedLabels(noisy_values, corrupted)


def choose_corrupted(num_samples: int, *, fraction: float, seed: int) -> Tensor:
    """Chooses the samples whose dense labels are corrupted, see `corrupt_pixels`.

    Args:
        num_samples: N.
        fraction: Share of samples to choose, from 0 to 1; exactly ``round(fraction * N)`` are.
        seed: Decides which.

    Returns:
        Indices in ascending order, int64 [round(fraction * N)].

    Raises:
        ValueError: ``fraction`` is outside [0, 1].
    """
    _check_fraction(fraction)
    order = torch.randperm(num_samples, generator=seeded_generator(seed, "label_noise", "dense"))
    return order[: round(fraction * num_samples)].sort().values


def corrupt_pixels(labels: Tensor, *, num_classes: int, seed: int, sample: int) -> Tensor:
    """Replaces the label of every pixel of a sample by one drawn uniformly over all classes.

    Dense labels are too large to keep: they are corrupted each time they are read, each time in the same way.

    Args:
        labels: int64 [H, W]; `IGNORED_CLASS` marks pixels without a label, which stay without. Not modified.
        num_classes: C, the number of classes.
        seed: Decides the new labels,
        sample: together with the number of the sample.

    Shape:
        Returns int64 [H, W].
    """
    generator = seeded_generator(seed, "label_noise", "pixels", sample)
    drawn = torch.randint(num_classes, labels.shape, generator=generator)
    return torch.where(labels == IGNORED_CLASS, labels, drawn)


def _check_fraction(fraction: float) -> None:
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"Expected `fraction` in [0, 1], but got {fraction}.")
