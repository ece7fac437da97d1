"""Splits of data sets whose tasks have samples of their own, held as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from excessmtl_ext.data.multitask_data import Batch


@dataclass(frozen=True)
class OwnInputsSplit:
    """Samples of several tasks, each with inputs of its own.

    Inputs of whole numbers are tokens: rows end in zeros, and a batch is as wide as its longest row.

    Attributes:
        inputs: One tensor [N_i, ...] per task, floating point or whole numbers.
        targets: One tensor [N_i] per task.
    """

    inputs: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        """Checks that each task has as many targets as inputs."""
        lengths = [
            (len(own), len(target)) for own, target in zip(self.inputs, self.targets, strict=True)
        ]
        if any(inputs != targets or not inputs for inputs, targets in lengths):
            raise ValueError(
                f"Expected as many `targets` as `inputs` for each task, and at least one, but got {lengths}."
            )

    def __len__(self) -> int:
        """Returns the number of samples of the largest task."""
        return max(len(own) for own in self.inputs)

    def batch(self, indices: Tensor, *, epoch: int | None = None) -> Batch:
        """Returns one sample of each task for each index; nothing is augmented.

        A task with n samples gives number ``index % n``: in an epoch over the indices, smaller tasks start again from
        their first sample, so that every batch has samples of every task.
        """
        return self._batch([indices % len(own) for own in self.inputs])

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Iterates over every sample of every task once, in order.

        Where a task has run out, its target is None, and its input is one sample that stands in for none.
        """
        for start in range(0, len(self), batch_size):
            numbers = [
                torch.arange(min(start, len(own)), min(start + batch_size, len(own)))
                for own in self.inputs
            ]
            inputs, targets = self._batch([n if len(n) else torch.zeros(1).long() for n in numbers])
            yield Batch(
                inputs,
                [target if len(n) else None for n, target in zip(numbers, targets, strict=True)],
            )

    def to(self, device: torch.device) -> OwnInputsSplit:
        """Returns this split with its tensors on ``device``."""
        return replace(
            self,
            inputs=tuple(own.to(device) for own in self.inputs),
            targets=tuple(target.to(device) for target in self.targets),
        )

    def _batch(self, numbers: list[Tensor]) -> Batch:
        inputs: list[Tensor] = []
        targets: list[Tensor | None] = []
        for own, target, rows in zip(self.inputs, self.targets, numbers, strict=True):
            chosen = own[rows.to(own.device)]
            inputs.append(chosen if chosen.is_floating_point() else _without_padding(chosen))
            targets.append(target[rows.to(target.device)])
        return Batch(inputs, targets)


def _without_padding(tokens: Tensor) -> Tensor:
    """Cuts tokens [B, L] to the longest row, at least one column."""
    longest = int((tokens != 0).sum(1).max())
    return tokens[:, : max(1, longest)]
