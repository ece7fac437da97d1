"""UncertaintyWeights: the objective that the log-variances descend, and Adam's steps."""

from __future__ import annotations

import pytest
import torch

from excessmtl_ext import UncertaintyWeights


def test_weights_approach_one_over_the_loss() -> None:
    balancer = UncertaintyWeights(num_tasks=2, learning_rate=0.05)
    for _ in range(500):
        weights = balancer.update_weights(losses=[2.0, 0.5])
    # The minimum of exp(-s) l + s is at exp(-s) = 1 / l.
    assert (weights[1] / weights[0]).item() == pytest.approx(4.0, rel=0.05)
    assert balancer.learned.exp().tolist() == pytest.approx([2.0, 0.5], rel=0.05)


def test_the_numbers_are_those_of_torchs_adam_on_the_objective() -> None:
    generator = torch.Generator().manual_seed(0)
    balancer = UncertaintyWeights(num_tasks=3, learning_rate=0.1)
    log_variance = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_variance], lr=0.1)
    for _ in range(50):
        losses = torch.rand(3, generator=generator, dtype=torch.float64) * 3
        expected = (-log_variance.detach()).exp()
        optimizer.zero_grad()
        ((-log_variance).exp() * losses + log_variance).sum().backward()
        optimizer.step()
        weights = balancer.update_weights(losses=losses)
        torch.testing.assert_close(weights, expected / expected.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(balancer.learned, log_variance.detach(), rtol=1e-12, atol=0)


def test_a_task_that_begins_late_begins_with_a_whole_step() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    balancer = UncertaintyWeights([parameter], num_tasks=2, learning_rate=0.1)
    for _ in range(20):
        balancer.backward([parameter.sum() + 3.0, None])
    assert balancer.learned[1].item() == 0.0
    assert balancer.num_learning_steps.tolist() == [20, 0]
    balancer.backward([parameter.sum() + 3.0, parameter.sum() + 3.0])
    # Adam's first step is the learning rate, whatever the gradient is.
    assert balancer.learned[1].item() == pytest.approx(0.1, rel=1e-6)


def test_wrong_learning_rate_raises() -> None:
    with pytest.raises(ValueError, match="`learning_rate` > 0, but got 0"):
        UncertaintyWeights(num_tasks=2, learning_rate=0)
