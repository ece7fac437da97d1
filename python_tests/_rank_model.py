"""A model of three tasks and its batches, for tests of several ranks."""

from __future__ import annotations

from typing import Any

from _inputs import Problem
from torch import Tensor, nn

NUM_TASKS = 3
# The tolerance of the contract; atol for elements that cancel.
TOLERANCE: dict[str, Any] = {
    "rtol": 1e-5,
    "atol": 1e-7,
}


class Net(nn.Module):
    """Encoder and heads in one module, as DistributedDataParallel takes it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.encoder, self.heads = problem.encoder, problem.heads

    def forward(self, inputs: Tensor) -> list[Tensor]:
        features = self.encoder(inputs)
        return [head(features).sum(1) for head in self.heads]  # one column, and no view


def losses_of(outputs: list[Tensor], targets: Tensor) -> list[Tensor]:
    return [((out - targets[:, task]) ** 2).mean() for task, out in enumerate(outputs)]


def own_rows(rank: int, sizes: list[int]) -> slice:
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])
