"""Fixed, seeded corruption of training labels.

Which samples are corrupted, and to what, is decided once from the seed and kept in memory. A data set that draws
noise when a sample is read is a noisy stream instead: a network sees another label each epoch and can average it out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from excessmtl_ext.data.seeding import seeded_generator


@dataclass(frozen=True)
class CorruptedLabels:
    """Labels after corruption, and which samples it touched.

    Attributes:
        labels: All labels, the corrupted ones replaced, [N].
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
    right by chance. With the same seed a larger fraction corrupts the same samples in the same way and adds others,
    so that runs at two noise levels differ by those samples only.

    Args:
        labels: Class indices, int64 [N]. Not modified.
        num_classes: C, the number of classes.
        fraction: Share of samples to corrupt, from 0 to 1; exactly ``round(fraction * N)`` are.
        seed: Decides the samples and their new labels.

    Raises:
        ValueError: ``fraction`` is outside [0, 1], or ``labels`` are not [N] class indices below ``num_classes``.

    Example:
        >>> noisy = corrupt_classes(torch.zeros(10, dtype=torch.int64), num_classes=3, fraction=0.4, seed=0)
        >>> len(noisy.corrupted)
        4
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"Expected `fraction` in [0, 1], but got {fraction}.")
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
