"""Methods that the benchmark takes from elsewhere: the property that defines each, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from excessmtl_ext.training.benchmark.peers import GramianWeights, UPGrad


def shared() -> list[Tensor]:
    return [nn.Parameter(torch.zeros(2))]


def step(balancer: Any, grads: list[list[float]], losses: list[float] | None = None) -> Tensor:
    """``.grad`` after a step in which task i has this gradient and this loss."""
    (parameter,) = balancer.shared_parameters
    parameter.grad = None
    values = [1.0] * len(grads) if losses is None else losses
    balancer.backward(
        [
            (parameter * torch.tensor(grad)).sum() + value
            for grad, value in zip(grads, values, strict=True)
        ]
    )
    assert parameter.grad is not None
    return parameter.grad


GRADS = [[1.0, 0.0], [-0.5, 1.0]]


def test_upgrad_by_hand_and_without_conflict() -> None:
    balancer = UPGrad(shared(), num_tasks=2)
    grad = step(balancer, GRADS)
    # Each projected onto what does not conflict with the other: (0.8, 0.4) and (0, 1).
    expected = torch.tensor([0.8, 0.4]) + torch.tensor([0.0, 1.0])
    cosine = torch.nn.functional.cosine_similarity(grad, expected, dim=0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-5)
    assert all(float(grad @ torch.tensor(row)) >= -1e-6 for row in GRADS)
    agreeing = [[1.0, 0.0], [1.0, 1.0]]
    assert step(balancer, agreeing).tolist() == pytest.approx([1.0, 0.5])


def test_a_weighting_of_torchjd_gets_the_gramian() -> None:
    pytest.importorskip("torchjd", reason="FairGrad comes from torchjd")
    from torchjd.aggregation import FairGradWeighting

    balancer = GramianWeights(shared(), num_tasks=2, make=lambda: FairGradWeighting(1.0))
    grad = step(balancer, [[4.0, 0.0], [0.0, 1.0]])
    # alpha = 1: w solves G w = 1 / w, hence w is 1 / norm where the gradients are orthogonal.
    assert float(grad[0]) == pytest.approx(float(grad[1]), rel=1e-2)


def test_a_step_that_is_not_finite_changes_no_weight_and_is_counted() -> None:
    balancer = UPGrad(shared(), num_tasks=2)
    step(balancer, GRADS, [1.0, 2.0])
    before = balancer.task_weights.tolist()
    grad = step(balancer, [[float("nan"), 0.0], [1.0, 1.0]], [float("nan"), 2.0])
    assert bool(balancer.found_nonfinite[0])
    assert not bool(balancer.found_nonfinite[1])
    assert int(balancer.num_skipped_steps) == 1
    assert balancer.task_weights.tolist() == before
    assert not bool(grad.isfinite().all())
    assert bool(step(balancer, GRADS, [1.0, 2.0]).isfinite().all())
