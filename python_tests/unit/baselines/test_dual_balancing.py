"""DualBalancing: running means of the log-losses' gradients, all of the largest norm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from excessmtl_ext import DualBalancing


def step(
    balancer: DualBalancing, grads: list[list[float]], losses: list[float], **options: float
) -> Tensor:
    """``.grad`` after a step in which task i has this gradient and this loss."""
    assert balancer.shared_parameters is not None
    (parameter,) = balancer.shared_parameters
    parameter.grad = None
    balancer.backward(
        [
            (parameter * torch.tensor(grad)).sum() + value
            for grad, value in zip(grads, losses, strict=True)
        ],
        **options,
    )
    assert parameter.grad is not None
    return parameter.grad


def make(beta: float = 0.5, **options: object) -> DualBalancing:
    shared = [nn.Parameter(torch.zeros(2))]
    return DualBalancing(shared, num_tasks=2, beta=beta, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("weight_scale", ["simplex", "num_tasks"])
def test_two_steps_by_hand(weight_scale: str) -> None:
    balancer = make(weight_scale=weight_scale)
    # Step 1: beta 0.5; means are half the gradients of the log-losses, (2, 0) / 4 and (0, 3) / 2.
    first = step(balancer, [[2.0, 0.0], [0.0, 3.0]], [4.0, 2.0])
    means = torch.tensor([[0.25, 0.0], [0.0, 0.75]])
    assert first.tolist() == pytest.approx([0.75, 0.75])
    # Step 2: beta 0.5 / sqrt(2).
    beta = 0.5 / math.sqrt(2)
    second = step(balancer, [[1.0, 0.0], [0.0, 1.0]], [1.0, 1.0])
    means = beta * means + (1 - beta) * torch.eye(2)
    norms = means.norm(dim=1)
    assert second.tolist() == pytest.approx([float(norms.max())] * 2)
    expected = 1 / norms / (1 / norms).sum() * balancer.weight_total
    assert balancer.task_weights.tolist() == pytest.approx(expected.tolist())


def test_the_unit_of_a_loss_changes_nothing() -> None:
    plain, scaled = make(), make()
    for number in range(3):
        grads = [[1.0 + number, 2.0], [-3.0, 1.0]]
        expected = step(plain, grads, [2.0, 3.0])
        grads[1] = [1e6 * each for each in grads[1]]
        torch.testing.assert_close(step(scaled, grads, [2.0, 3e6]), expected)


def test_a_loss_scale_scales_the_sum_alone() -> None:
    plain, scaled = make(), make()
    for scale in (2.0, 1024.0):
        expected = step(plain, [[1.0, 2.0], [-3.0, 1.0]], [2.0, 3.0])
        found = step(scaled, [[1.0, 2.0], [-3.0, 1.0]], [2.0, 3.0], grad_scale=scale)
        torch.testing.assert_close(found, expected * scale)
        torch.testing.assert_close(scaled.grad_mean, plain.grad_mean)


def test_absent_tasks_and_zero_gradients_rest() -> None:
    balancer = make()
    step(balancer, [[1.0, 0.0], [0.0, 2.0]], [1.0, 1.0])
    mean, weights = balancer.grad_mean.clone(), balancer.task_weights.clone()
    grad = step(balancer, [[4.0, 0.0], [0.0, 0.0]], [1.0, 1.0])
    assert torch.equal(balancer.grad_mean[1], mean[1])
    assert balancer.num_task_steps.tolist() == [2, 1]
    assert balancer.task_weights.tolist() == pytest.approx(weights.tolist())
    assert grad[1].item() == 0.0
    assert grad[0].item() == pytest.approx(balancer.grad_mean[0].norm().item())


def test_state_is_as_wide_as_the_gradients() -> None:
    balancer = DualBalancing(num_tasks=2)
    assert balancer.grad_mean.shape == (2, 0)
    balancer.update_weights(torch.randn(2, 5, dtype=torch.float64), losses=[1.0, 2.0])
    assert balancer.grad_mean.dtype == torch.float64
    narrow = DualBalancing([nn.Parameter(torch.zeros(2).bfloat16())], num_tasks=2)
    assert narrow.grad_mean.dtype == torch.float32
    loaded = DualBalancing(num_tasks=2)
    loaded.load_state_dict(balancer.state_dict())
    assert torch.equal(loaded.grad_mean, balancer.grad_mean)


def test_wrong_beta_raises() -> None:
    for wrong in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"`beta` in \[0, 1\), but got {wrong}"):
            DualBalancing(num_tasks=2, beta=wrong)
    with pytest.raises(TypeError, match="`beta` to be a number"):
        DualBalancing(num_tasks=2, beta=True)
