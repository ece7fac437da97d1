"""Peers of the benchmark: the property that defines each, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from excessmtl_ext.training.benchmark.peers import (
    FAMO,
    DualBalancing,
    DynamicWeightAverage,
    FixedWeights,
    GramianWeights,
    InverseNorm,
    SmoothTchebycheff,
    UncertaintyWeights,
    UPGrad,
)


def shared() -> list[Tensor]:
    return [nn.Parameter(torch.zeros(2))]


def weights_after(balancer: Any, losses: list[float]) -> list[float]:
    """The weights after a step with these losses, each of a shared gradient of its own."""
    (parameter,) = balancer.shared_parameters
    parameter.grad = None
    balancer.backward([parameter.sum() * 0 + loss for loss in losses])
    return balancer.task_weights.tolist()


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


def test_fixed_weights_stay_and_sum_to_one() -> None:
    balancer = FixedWeights(shared(), num_tasks=2, weights=[1, 3])
    assert weights_after(balancer, [5.0, 1.0]) == [0.25, 0.75]
    for wrong in ([1, 0], [1]):
        with pytest.raises(ValueError, match="Expected"):
            FixedWeights(shared(), num_tasks=2, weights=wrong)


def test_uncertainty_weights_approach_one_over_the_loss() -> None:
    balancer = UncertaintyWeights(shared(), num_tasks=2, learning_rate=0.05)
    for _ in range(500):
        weights = weights_after(balancer, [2.0, 0.5])
    # The minimum of exp(-s) l + s is at exp(-s) = 1 / l.
    assert weights[1] / weights[0] == pytest.approx(4.0, rel=0.05)


def test_dynamic_weight_average_by_hand() -> None:
    balancer = DynamicWeightAverage(shared(), num_tasks=2, temperature=2.0)
    for means in ([4.0, 1.0], [2.0, 1.0]):
        assert weights_after(balancer, [1.0, 9.0]) == [0.5, 0.5]
        balancer.end_epoch(torch.tensor(means))
    # The losses are 1/2 and 1 of those before.
    odds = math.exp((1.0 - 0.5) / 2)
    assert weights_after(balancer, [1.0, 9.0]) == pytest.approx([1 / (1 + odds), odds / (1 + odds)])
    balancer.end_epoch(torch.tensor([1.0, 2.0]))
    odds = math.exp((2.0 - 0.5) / 2)
    assert weights_after(balancer, [1.0, 9.0])[0] == pytest.approx(1 / (1 + odds))


def test_famo_weighs_log_losses_and_lifts_the_task_that_falls_least() -> None:
    balancer = FAMO(shared(), num_tasks=2, learning_rate=0.1)
    assert weights_after(balancer, [1.0, 4.0]) == pytest.approx([0.8, 0.2])
    for _ in range(20):
        weights_after(balancer, [1.0, 1.0])
        balancer.after_step(torch.tensor([0.5, 0.9]))
    weights = weights_after(balancer, [1.0, 1.0])
    assert weights[1] > 0.6
    balancer.after_step(torch.tensor([float("nan"), 1.0]))  # says nothing
    assert weights_after(balancer, [1.0, 1.0]) == weights


def test_smooth_tchebycheff_is_the_gradient_of_its_objective() -> None:
    balancer = SmoothTchebycheff(shared(), num_tasks=3, smoothness=0.3)
    assert weights_after(balancer, [1.0, 2.0, 3.0]) == pytest.approx([1 / 3] * 3)
    balancer.end_epoch(torch.tensor([1.0, 2.0, 4.0]))
    balancer.end_epoch(torch.tensor([9.0, 9.0, 9.0]))  # only the first epoch counts
    losses = torch.tensor([0.5, 1.5, 2.0], dtype=torch.float64, requires_grad=True)
    nadir = torch.tensor([1.0, 2.0, 4.0])
    objective = 0.3 * torch.logsumexp((losses / nadir).log() / 0.3, 0)
    (grad,) = torch.autograd.grad(objective, losses)
    found = weights_after(balancer, losses.tolist())
    assert found == pytest.approx((grad / grad.sum()).tolist())


def test_inverse_norm_gives_every_task_the_same_share() -> None:
    balancer = InverseNorm(shared(), num_tasks=2)
    grad = step(balancer, [[3.0, 0.0], [0.0, 0.1]])
    assert float(grad[0]) == pytest.approx(float(grad[1]))
    assert balancer.task_weights.tolist() == pytest.approx([0.1 / 3.1, 3.0 / 3.1])


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


def test_dual_balancing_by_hand() -> None:
    balancer = DualBalancing(shared(), num_tasks=2, beta=0.5)
    # Step 1: beta 0.5; means are half the gradients of the log-losses, (2, 0) / 4 and (0, 3) / 2.
    first = step(balancer, [[2.0, 0.0], [0.0, 3.0]], [4.0, 2.0])
    means = torch.tensor([[0.25, 0.0], [0.0, 0.75]])
    assert first.tolist() == pytest.approx([0.75, 0.75])
    # Step 2: beta 0.5 / sqrt(2).
    beta = 0.5 / math.sqrt(2)
    second = step(balancer, [[1.0, 0.0], [0.0, 1.0]], [1.0, 1.0])
    means = beta * means + (1 - beta) * torch.eye(2)
    largest = float(means.norm(dim=1).max())
    assert second.tolist() == pytest.approx([largest, largest])
    assert float(balancer.task_weights.sum()) == pytest.approx(1.0)


ALL = {
    "fixed": lambda: FixedWeights(shared(), num_tasks=2, weights=[1, 1]),
    "uncertainty": lambda: UncertaintyWeights(shared(), num_tasks=2),
    "dwa": lambda: DynamicWeightAverage(shared(), num_tasks=2),
    "famo": lambda: FAMO(shared(), num_tasks=2),
    "stch": lambda: SmoothTchebycheff(shared(), num_tasks=2),
    "inverse": lambda: InverseNorm(shared(), num_tasks=2),
    "upgrad": lambda: UPGrad(shared(), num_tasks=2),
    "dbmtl": lambda: DualBalancing(shared(), num_tasks=2),
}


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_a_step_that_is_not_finite_changes_no_weight_and_is_counted(make: Any) -> None:
    balancer = make()
    step(balancer, GRADS, [1.0, 2.0])
    before = balancer.task_weights.tolist()
    grad = step(balancer, [[float("nan"), 0.0], [1.0, 1.0]], [float("nan"), 2.0])
    assert bool(balancer.found_nonfinite[0])
    assert not bool(balancer.found_nonfinite[1])
    assert int(balancer.num_skipped_steps) == 1
    assert balancer.task_weights.tolist() == before
    assert not bool(grad.isfinite().all())
    assert bool(step(balancer, GRADS, [1.0, 2.0]).isfinite().all())
