"""Fixed, seeded corruption of training labels.

Which samples are corrupted, and to what, depends on the seed and on the sample, never on when or by which worker it is
read. A data set that draws noise when a sample is read is a noisy stream instead: a network sees another label each
epoch and can average it out.

With the same seed, more noise corrupts the same samples in the same way and adds others, so that runs at two noise
levels differ by those samples only.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from excessmtl_ext.data.multitask_data import IGNORED_CLASS
from excessmtl_ext.data.seeding import seeded_generator

ClassNoise = Literal["symmetric", "pair_flip", "instance"]
ValueNoise = Literal["gaussian", "heavy_tailed", "heteroscedastic"]
CLASS_NOISE: tuple[str, ...] = get_args(ClassNoise)
VALUE_NOISE: tuple[str, ...] = get_args(ValueNoise)

# Of the inputs' part against the Gumbel draw's: a sample one deviation further along is e^2 = 7 times as likely.
INSTANCE_STRENGTH = 2.0

STUDENT_T_FREEDOM = 3


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
    labels: Tensor,
    *,
    num_classes: int,
    fraction: float,
    seed: int,
    kind: ClassNoise = "symmetric",
    inputs: Tensor | None = None,
    stream: str = "",
) -> CorruptedLabels:
    """Replaces the labels of a fixed share of the samples.

    ==============  =============================================================================================
    kind            the samples, and their new labels
    ==============  =============================================================================================
    ``symmetric``   Any sample; a label drawn uniformly over all classes. The draw may hit the true class, as in
                    He et al. 2024, Sec. 5: of the corrupted labels ``1 / num_classes`` stay right by chance.
    ``pair_flip``   Any sample; the next class, and class 0 for the last (Han et al. 2018, "Co-teaching").
    ``instance``    Samples far along a random direction of their class are the likelier ones, and their new class is
                    the one whose random direction they lie along, softened by a Gumbel draw: labels are wrong where
                    inputs look alike (after Xia et al. 2020, "Part-dependent label noise"). Never the true class.
    ==============  =============================================================================================

    Args:
        labels: Class indices, int64 [N]. Not modified.
        num_classes: C, the number of classes.
        fraction: Share of samples to corrupt, from 0 to 1; exactly ``round(fraction * N)`` are.
        seed: Decides the samples and their new labels.
        kind: See above.
        inputs: With ``"instance"``: what the labels depend on, floating point [N, ...].
        stream: Names what is corrupted. Two noisy tasks of one data set have noise that is independent.

    Raises:
        ValueError: ``fraction`` is outside [0, 1], ``labels`` are not [N] class indices below ``num_classes``, ``kind``
            is unknown, or ``inputs`` are missing or not one per label.

    Example:
        >>> labels = torch.zeros(10, dtype=torch.int64)
        >>> noisy = corrupt_classes(labels, num_classes=3, fraction=0.4, seed=0)
        >>> len(noisy.corrupted)
        4
    """
    _check_fraction(fraction)
    _check_kind(kind, CLASS_NOISE)
    _check_labels(labels, num_classes)
    num_samples = len(labels)
    purpose = ("label_noise", "classes", *([stream] if stream else []))
    generator = seeded_generator(seed, *purpose)
    if kind == "instance":
        order, replacements = _instance_noise(labels, inputs, num_classes, generator)
    else:
        order = torch.randperm(num_samples, generator=generator)
        replacements = torch.randint(num_classes, (num_samples,), generator=generator)
        if kind == "pair_flip":
            replacements = (labels.cpu() + 1) % num_classes
    corrupted = order[: round(fraction * num_samples)].sort().values
    noisy_labels = labels.clone()
    noisy_labels[corrupted] = replacements[corrupted].to(labels.device)
    return CorruptedLabels(noisy_labels, corrupted)


def _instance_noise(
    labels: Tensor, inputs: Tensor | None, num_classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Returns the samples in the order in which they are corrupted, and every sample's wrong class."""
    if inputs is None or not inputs.is_floating_point() or len(inputs) != len(labels):
        found = None if inputs is None else f"{inputs.dtype} {list(inputs.shape)}"
        raise ValueError(
            f"Expected `inputs` to be floating point [{len(labels)}, ...] with instance-dependent noise, but got "
            f"{found}."
        )
    if num_classes < 2:
        raise ValueError(
            f"Expected `num_classes` of at least 2 with instance-dependent noise, but got {num_classes}."
        )
    true = labels.cpu()
    rows = inputs.detach().cpu().double().flatten(1)
    rows = _standardised(rows) / max(1, rows.shape[1]) ** 0.5
    hard, wrong = torch.randn(
        2, num_classes, rows.shape[1], generator=generator, dtype=torch.float64
    )
    gumbel = (
        -torch.empty(len(true), num_classes + 1, dtype=torch.float64)
        .exponential_(generator=generator)
        .log()
    )
    difficulty = _standardised((rows * hard[true]).sum(1))
    order = (INSTANCE_STRENGTH * difficulty + gumbel[:, 0]).argsort(descending=True)
    scores = INSTANCE_STRENGTH * _standardised(rows @ wrong.T) + gumbel[:, 1:]
    return order, scores.scatter(1, true[:, None], -torch.inf).argmax(1)


def _standardised(values: Tensor) -> Tensor:
    """Returns values of mean 0 and deviation 1 over the samples; 0 where they are all equal."""
    if not len(values):
        return values
    centred = values - values.mean(0)
    std = centred.square().mean(0).sqrt()
    return centred / torch.where(std > 0, std, torch.ones_like(std))


def corrupt_values(
    values: Tensor,
    *,
    fraction: float,
    seed: int,
    stream: str = "",
    kind: ValueNoise = "gaussian",
) -> CorruptedLabels:
    """Adds noise with the targets' own variance to a fixed share of the targets.

    ===================  ==========================================================================================
    kind                 the noise; of all three the variance is that of the targets
    ===================  ==========================================================================================
    ``gaussian``         The same normal distribution for every target (He et al. 2024, Sec. 5).
    ``heavy_tailed``     Student's t with 3 degrees of freedom, the fewest that have a variance: now and then a target
                         is far off.
    ``heteroscedastic``  Normal, with a deviation that is proportional to the target's distance from the mean: large
                         values are measured less well.
    ===================  ==========================================================================================

    Args:
        values: Regression targets, floating point [N]. Not modified.
        fraction: Share of samples to corrupt, from 0 to 1; exactly ``round(fraction * N)`` are.
        seed: Decides the samples and the noise on each.
        stream: Names what is corrupted. Two noisy tasks of one data set have noise that is independent.
        kind: See above.

    Raises:
        ValueError: ``fraction`` is outside [0, 1], ``values`` are not floating point [N], or ``kind`` is unknown.

    Example:
        >>> noisy = corrupt_values(torch.arange(10.0), fraction=0.4, seed=0)
        >>> int((noisy.labels != torch.arange(10.0)).sum())
        4
    """
    _check_fraction(fraction)
    _check_kind(kind, VALUE_NOISE)
    if not values.is_floating_point() or values.dim() != 1:
        raise ValueError(
            f"Expected `values` to be floating point [N], but got {values.dtype} {list(values.shape)}."
        )
    num_samples = len(values)
    generator = seeded_generator(seed, "label_noise", "values", stream)
    order = torch.randperm(num_samples, generator=generator)
    noise = torch.randn(num_samples, generator=generator, dtype=torch.float64)
    # Mean and variance of all targets before any of them is corrupted.
    wide = values.double().cpu()
    if kind == "heavy_tailed":
        normals = torch.randn(
            STUDENT_T_FREEDOM, num_samples, generator=generator, dtype=torch.float64
        )
        student = noise / normals.square().mean(0).sqrt()
        noise = student * ((STUDENT_T_FREEDOM - 2) / STUDENT_T_FREEDOM) ** 0.5
    elif kind == "heteroscedastic":
        noise = noise * _standardised(wide).abs()
    corrupted = order[: round(fraction * num_samples)].sort().values
    noisy_values = values.clone()
    if len(corrupted):
        std = float(wide.std(correction=0))
        noisy_values[corrupted] += (noise[corrupted] * std).to(values)
    return CorruptedLabels(noisy_values, corrupted)


def noise_share(labels: Tensor, clean: Tensor) -> float:
    """Returns how noisy labels are: of classes the share that is wrong, of values the noise's share of the variance.

    Args:
        labels: int64 class indices or floating point values [N], with noise.
        clean: The same without.

    Returns:
        A number in [0, 1]; for values var(labels - clean) / (var(labels - clean) + var(clean)), 0 where nothing varies.
    """
    if not labels.is_floating_point():
        return float((labels != clean).double().mean())
    noise = float((labels.double() - clean.double()).var(correction=0))
    signal = float(clean.double().var(correction=0))
    return noise / (noise + signal) if noise + signal > 0 else 0.0


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


def _check_kind(kind: str, known: tuple[str, ...]) -> None:
    if kind not in known:
        raise ValueError(f"Expected `kind` to be one of {', '.join(known)}, but got {kind!r}.")


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise ValueError(
            f"Expected `labels` to be class indices, int64 [N], but got {labels.dtype} {list(labels.shape)}."
        )
    if len(labels):
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= num_classes:
            raise ValueError(
                f"Expected `labels` in [0, {num_classes}), but got values from {lowest} to {highest}."
            )
