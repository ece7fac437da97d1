"""SmoothTchebycheff: weights are the gradient of the smooth maximum of the log-losses."""

from __future__ import annotations

import pytest
import torch

from excessmtl_ext import SmoothTchebycheff


@pytest.mark.parametrize("smoothness", [0.05, 0.3, 2.0])
def test_weights_are_the_gradient_of_the_objective(smoothness: float) -> None:
    balancer = SmoothTchebycheff(num_tasks=3, smoothness=smoothness)
    weights = balancer.update_weights(losses=[1.0, 2.0, 3.0])
    assert weights.tolist() == pytest.approx([1 / 3] * 3)
    balancer.end_epoch([1.0, 2.0, 4.0])
    balancer.end_epoch([9.0, 9.0, 9.0])  # only the first epoch counts
    losses = torch.tensor([0.5, 1.5, 2.0], dtype=torch.float64, requires_grad=True)
    first = torch.tensor([1.0, 2.0, 4.0])
    objective = smoothness * torch.logsumexp((losses / first).log() / smoothness, 0)
    (grad,) = torch.autograd.grad(objective, losses)
    found = balancer.update_weights(losses=losses.detach())
    torch.testing.assert_close(found, grad / grad.sum())


def test_near_zero_the_worst_task_counts_alone() -> None:
    balancer = SmoothTchebycheff(num_tasks=2, smoothness=1e-4)
    balancer.end_epoch([1.0, 1.0])
    assert balancer.update_weights(losses=[0.9, 1.1]).tolist() == pytest.approx([0.0, 1.0])


def test_the_unit_of_a_loss_changes_the_weight_by_its_inverse_alone() -> None:
    """So that what the task adds to the shared gradient stays the same."""
    weights = []
    for unit in (1.0, 1e6):
        balancer = SmoothTchebycheff(num_tasks=2)
        balancer.end_epoch([2.0 * unit, 3.0])
        weights.append(balancer.update_weights(losses=[1.0 * unit, 1.0]).clone())
    ratios = [(w[0] / w[1]).item() for w in weights]
    assert ratios[1] * 1e6 == pytest.approx(ratios[0])


def test_a_task_that_begins_after_the_first_epoch() -> None:
    shared = torch.nn.Parameter(torch.zeros(2))
    balancer = SmoothTchebycheff([shared], num_tasks=2, smoothness=1.0)
    balancer.backward([shared.sum() + 2.0, None])
    balancer.end_epoch()
    assert balancer.first_mean_loss[0].item() == 2.0
    balancer.backward([shared.sum() + 1.0, shared.sum() + 5.0])
    # Ratios 1/2 and 1, over the losses 1 and 5.
    assert balancer.task_weights.tolist() == pytest.approx([0.5 / 0.7, 0.2 / 0.7])
    balancer.end_epoch()
    assert balancer.first_mean_loss.tolist() == [2.0, 5.0]


def test_wrong_smoothness_raises() -> None:
    with pytest.raises(ValueError, match="`smoothness` > 0, but got 0"):
        SmoothTchebycheff(num_tasks=2, smoothness=0)
