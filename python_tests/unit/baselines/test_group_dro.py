"""GroupDRO: the largest loss gains most, and nothing else counts."""

from __future__ import annotations

import math

import pytest
import torch
from _inputs import make_problem

from excessmtl_ext import GroupDRO


def test_two_steps_by_hand():
    balancer = GroupDRO(num_tasks=2, robust_step_size=0.5)
    balancer.update_weights(losses=[2.0, 0.0])
    balancer.update_weights(losses=torch.tensor([0.0, 1.0]))
    # exp(0.5 * 2) against exp(0.5 * 1).
    expected = math.exp(1.0) / (math.exp(1.0) + math.exp(0.5))
    assert balancer.task_weights.tolist() == pytest.approx([expected, 1 - expected])


def test_the_largest_loss_gains_most():
    balancer = GroupDRO(num_tasks=4, robust_step_size=0.1)
    before = balancer.task_weights.clone()
    gain = balancer.update_weights(losses=[0.3, 2.0, 1.0, 0.1]) / before
    assert gain.argsort().tolist() == [3, 0, 2, 1]


def test_a_constant_added_to_every_loss_changes_nothing():
    plain, shifted = (GroupDRO(num_tasks=3, robust_step_size=0.7) for _ in range(2))
    losses = torch.rand(3, dtype=torch.float64)
    torch.testing.assert_close(
        plain.update_weights(losses=losses), shifted.update_weights(losses=losses + 500)
    )


def test_exploding_losses_neither_overflow_nor_lose_a_task():
    balancer = GroupDRO(num_tasks=2, robust_step_size=1.0)
    balancer.update_weights(losses=[1e30, 0.0])
    assert balancer.task_weights.tolist() == [1.0, 0.0]
    balancer.update_weights(losses=[0.0, 3e30])
    assert balancer.task_weights.tolist() == [0.0, 1.0]


def test_nonfinite_loss_is_counted_and_changes_no_weight():
    problem = make_problem()
    balancer = GroupDRO(problem.encoder.parameters(), num_tasks=3)
    balancer.backward(problem.losses())
    before = balancer.task_weights.clone()
    losses = problem.losses()
    losses[0] = losses[0] * float("nan")
    balancer.backward(losses)
    assert torch.equal(balancer.task_weights, before)
    assert balancer.found_nonfinite.tolist() == [True, False, False]
    assert (int(balancer.num_steps), int(balancer.num_skipped_steps)) == (1, 1)


def test_wrong_losses_raise():
    balancer = GroupDRO(num_tasks=2)
    with pytest.raises(ValueError, match="Expected `losses`: GroupDRO computes"):
        balancer.update_weights()
    with pytest.raises(ValueError, match=r"`losses` of shape \[2\], but got \[3\]"):
        balancer.update_weights(losses=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="`robust_step_size` > 0, but got 0"):
        GroupDRO(num_tasks=2, robust_step_size=0)
