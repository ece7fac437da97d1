"""How far a run is, and how its caller stops it."""

from __future__ import annotations

import dataclasses

SELECTION_METRIC = "validation/mean_score"


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: Steps done.
        num_steps: Steps in all.
        epoch: Epochs done.
        latest: The last row of metrics.csv; empty before the first evaluation.
    """

    step: int
    num_steps: int
    epoch: int
    latest: dict[str, float]


class TrainingInterrupted(Exception):
    """A run stopped because it was asked to. Its checkpoint is saved; resuming gives the undisturbed numbers."""
