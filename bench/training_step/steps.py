"""A whole training step of a row, launched or replayed, and the proof that rows do the same work."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from training_step.rows import Row
from training_step.workloads import ADAM, NUM_BATCHES, Problem, Template

CHECK_STEPS = 3
CHECK_STEP_SIZE = 0.5
"""Step size while rows are compared: weights must have left uniform, or wrong ones would not be seen."""
TOLERANCE = 1e-3
"""Largest relative difference of gradients that should be equal."""


class Step:
    """A whole training step of one row: the same for all but for ``fill``."""

    def __init__(self, row: Row, problem: Problem) -> None:
        self.problem = problem
        self.fill = row.make(problem)

    def __call__(self) -> None:
        self.problem.optimizer.zero_grad()
        features, losses = self.problem.forward()
        self.fill(features, losses)
        self.problem.optimizer.step()


class CapturedStep(Step):
    """The same step replayed: a CUDA graph per batch, recorded after one ordinary step with each."""

    def __init__(self, row: Row, problem: Problem) -> None:
        super().__init__(row, problem)
        for group in problem.optimizer.param_groups:
            group["capturable"] = True  # Adam then counts its steps on the device
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(NUM_BATCHES):
                super().__call__()
        torch.cuda.current_stream().wait_stream(side)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        for _ in range(NUM_BATCHES):
            graph = torch.cuda.CUDAGraph()
            pool = self._graphs[0].pool() if self._graphs else None
            with torch.cuda.graph(graph, pool=pool):
                super().__call__()
            self._graphs.append(graph)
        self._num_replays = 0

    def __call__(self) -> None:
        self._graphs[self._num_replays % NUM_BATCHES].replay()
        self._num_replays += 1


def make_step(row: Row, problem: Problem) -> Step:
    """A row's step as it is timed."""
    return (CapturedStep if row.is_captured else Step)(row, problem)


def filled_grads(row: Row, template: Template) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Gradients of shared parameters and of heads after each of a few fills, parameters held still.

    They are held because Adam divides by the size of a gradient: rounding would grow from step to
    step in coordinates whose gradient is nearly zero.

    Raises:
        RuntimeError: the row did not start where all start, or left a parameter without a gradient.
    """
    problem = Problem(template, CHECK_STEP_SIZE)
    fill = row.make(problem)
    check_same_start(row, problem, template)
    heads = [parameter for head in problem.heads for parameter in head]
    for _ in range(CHECK_STEPS):
        problem.optimizer.zero_grad()
        fill(*problem.forward())
        bare = [parameter for parameter in problem.shared if parameter.grad is None]
        if row.trains_all_heads:
            bare += [parameter for parameter in heads if parameter.grad is None]
        if bare:
            raise RuntimeError(
                f"Expected row `{row.key}` to fill `.grad` of all parameters, but {len(bare)} have none. "
                "Correct it: its step would be cheaper than the others'."
            )
        yield (
            [parameter.grad for parameter in problem.shared if parameter.grad is not None],
            [parameter.grad for parameter in heads if parameter.grad is not None],
        )


def check_same_start(row: Row, problem: Problem, template: Template) -> None:
    """Raises unless a row's parameters, batches and Adam are those of all others."""
    is_same = (
        all(
            torch.equal(mine, theirs)
            for mine, theirs in zip(
                problem.model.state_dict().values(),
                template.model.state_dict().values(),
                strict=True,
            )
        )
        and problem.batches is template.batches
        and all(problem.optimizer.defaults[name] == value for name, value in ADAM.items())
        and len(problem.optimizer.param_groups[0]["params"])
        == len(list(template.model.parameters()))
        and all(parameter.requires_grad for parameter in problem.model.parameters())
    )
    if not is_same:
        raise RuntimeError(
            f"Expected row `{row.key}` to start from the template's parameters, batches and Adam, but its method "
            "has changed them. Rows would not do the same work."
        )


# A convolution whose factors are rounded to TF32, torch's default on a GPU, is no basis for a comparison.
@torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
def difference(row: Row, other: Row, template: Template) -> float:
    """Largest relative difference (norm over norm, shared and heads apart) of two rows' gradients in a few steps.

    Raises:
        RuntimeError: it is above the tolerance.
    """
    worst = 0.0
    pairs = zip(filled_grads(row, template), filled_grads(other, template), strict=True)
    for mine, theirs in pairs:
        for part, expected in zip(mine, theirs, strict=True):
            errors = torch.stack([(a - b).norm() for a, b in zip(part, expected, strict=True)])
            sizes = torch.stack([b.norm() for b in expected])
            relative = float(errors.norm() / sizes.norm())
            worst = relative if math.isnan(relative) else max(worst, relative)
            if not worst <= TOLERANCE:
                raise RuntimeError(
                    f"Expected row `{row.key}` to leave the gradients of row `{other.key}`, but they differ by "
                    f"{worst:.2g}, more than {TOLERANCE:g}. One of them computes something else."
                )
    return worst
