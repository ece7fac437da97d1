"""Uniform: the mean of the task gradients, at the price of one backward pass."""

from __future__ import annotations

import pytest
import torch
from _inputs import make_problem

from excessmtl_ext import Uniform


@pytest.mark.parametrize(("weight_scale", "factor"), [("simplex", 1 / 3), ("num_tasks", 1.0)])
def test_shared_gradient_is_that_of_the_summed_loss_times_the_weight(weight_scale, factor):
    problem, plain = make_problem(), make_problem()
    Uniform(problem.encoder.parameters(), num_tasks=3, weight_scale=weight_scale).backward(
        problem.losses()
    )
    sum(plain.losses()).backward()
    for ours, theirs in zip(problem.encoder.parameters(), plain.encoder.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad * factor)
    for ours, theirs in zip(problem.heads.parameters(), plain.heads.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_weights_never_move():
    problem = make_problem()
    balancer = Uniform(problem.encoder.parameters(), num_tasks=3)
    for _ in range(3):
        balancer.backward(problem.losses())
    assert balancer.task_weights.tolist() == [1 / 3] * 3
    assert int(balancer.num_steps) == 3
