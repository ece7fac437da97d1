"""Means with intervals over seeds, and ranks over data sets with their confidence (Demšar, JMLR 2006)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean and half the width of its 95 % interval; NaN where one value tells of no spread."""

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        """Returns both with three decimals."""
        spread = "" if math.isnan(self.half_width) else f" ± {self.half_width:.3f}"
        return f"{self.mean:.3f}{spread}"


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean and its 95 % interval by Student's t.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("Expected at least one of `values`, but got none.")
    from scipy.stats import t

    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(mean, math.nan, count)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, float(t.ppf(0.975, count - 1)) * math.sqrt(variance / count), count)


def ranks(scores: Array) -> Array:
    """Returns ranks within each row, 1 for the highest score; equal scores share the mean of theirs.

    Args:
        scores: [N, K].
    """
    from scipy.stats import rankdata

    return np.stack([rankdata(-row) for row in scores])


@dataclass(frozen=True)
class Comparison:
    """K methods ranked over N data sets.

    Attributes:
        mean_ranks: [K], 1 is best.
        friedman_p: Probability of ranks at least as uneven if all methods were equal (Friedman's chi square).
        iman_davenport_p: The same by Iman and Davenport's less conservative F.
        critical_difference: Mean ranks that differ by less cannot be told apart at 5 % (Nemenyi).
        num_datasets: N.
    """

    mean_ranks: Array
    friedman_p: float
    iman_davenport_p: float
    critical_difference: float
    num_datasets: int


def compare(scores: Array) -> Comparison:
    """Ranks methods over data sets.

    Args:
        scores: [N, K], finite, higher is better.

    Raises:
        ValueError: there are fewer than two data sets or methods, or a score is not finite.
    """
    if scores.ndim != 2 or min(scores.shape) < 2 or not np.isfinite(scores).all():
        raise ValueError(
            f"Expected `scores` of at least two data sets and two methods, all finite, but got {list(scores.shape)} "
            f"with {int((~np.isfinite(scores)).sum())} others."
        )
    from scipy.stats import chi2, f

    table = ranks(scores)
    num_datasets, num_methods = table.shape
    mean_ranks = table.mean(0)
    # With ties the sum of squared ranks is smaller: the statistic is divided by what it could reach.
    spread = float(((mean_ranks - (num_methods + 1) / 2) ** 2).sum()) * num_datasets**2
    within = float(((table - (num_methods + 1) / 2) ** 2).sum())
    statistic = (num_methods - 1) * spread / within if within > 0 else 0.0
    largest = num_datasets * (num_methods - 1)
    degrees = (num_methods - 1, (num_methods - 1) * (num_datasets - 1))
    iman = (
        math.inf if statistic >= largest else (num_datasets - 1) * statistic / (largest - statistic)
    )
    return Comparison(
        mean_ranks,
        float(chi2.sf(statistic, num_methods - 1)),
        float(f.sf(iman, *degrees)) if math.isfinite(iman) else 0.0,
        critical_difference(num_methods, num_datasets),
        num_datasets,
    )


def critical_difference(num_methods: int, num_datasets: int, level: float = 0.05) -> float:
    """Returns Nemenyi's critical difference of mean ranks.

    Args:
        num_methods: K.
        num_datasets: N.
        level: Probability of telling apart any two of K equal methods.
    """
    from scipy.stats import studentized_range

    quantile = float(studentized_range.ppf(1 - level, num_methods, np.inf)) / math.sqrt(2)
    return quantile * math.sqrt(num_methods * (num_methods + 1) / (6 * num_datasets))


def groups_within(mean_ranks: Sequence[float], difference: float) -> list[tuple[int, int]]:
    """Returns the longest runs of methods, sorted by rank, whose ends differ by no more than the critical difference.

    Args:
        mean_ranks: In rising order.
        difference: The critical difference.

    Returns:
        First and last position of each run of at least two, none inside another.
    """
    runs: list[tuple[int, int]] = []
    for first, rank in enumerate(mean_ranks):
        last = max(
            position
            for position, other in enumerate(mean_ranks)
            if position >= first and other - rank <= difference
        )
        if last > first and not any(start <= first and last <= end for start, end in runs):
            runs.append((first, last))
    return runs
