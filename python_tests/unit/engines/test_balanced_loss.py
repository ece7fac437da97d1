"""The scalar's value is the weighted sum so far, and its backward pass is the step."""

from __future__ import annotations

import math

import pytest
import torch
from _inputs import make_problem
from _published import published
from torch import Tensor

from excessmtl_ext import Uniform


def test_the_value_leaves_out_nan_and_absent_tasks() -> None:
    shared = torch.ones((), requires_grad=True)
    balancer = Uniform([shared], num_tasks=3)
    assert balancer([shared * 3, None, shared * 6]) == 3.0
    assert balancer([shared * 3, shared * math.nan, shared * 6]) == 3.0
    assert balancer([shared * math.nan, None, None]).isnan()


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_backward_is_the_step_of_backward_and_its_gradient_the_scale(scale: float) -> None:
    by_verb, by_scalar = make_problem(), make_problem()
    one = published(by_verb.encoder.parameters(), num_tasks=3)
    other = published(by_scalar.encoder.parameters(), num_tasks=3)
    one.backward(by_verb.losses(), grad_scale=None if scale == 1.0 else scale)
    (other(by_scalar.losses()) * scale).backward()
    for expected, grad in zip(by_verb.grads(), by_scalar.grads(), strict=True):
        assert expected is not None and grad is not None and torch.equal(expected, grad)
    assert torch.equal(one.sq_grad_sum, other.sq_grad_sum)


def test_without_backward_nothing_changes() -> None:
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3)
    balancer(problem.losses())
    assert balancer.num_calls == 0
    assert problem.grads() == [None] * len(problem.parameters())


def test_gradients_of_certain_inputs_only_are_refused() -> None:
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3)
    loss = balancer(problem.losses())
    with pytest.raises(RuntimeError, match=r"without `inputs`"):
        loss.backward(inputs=[next(problem.encoder.parameters())])


def test_a_graph_that_an_auxiliary_loss_needs_is_kept() -> None:
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3)
    losses: list[Tensor] = problem.losses()
    auxiliary = losses[0] * 0.5
    (balancer(losses) + auxiliary).backward()
    assert all(grad is not None and grad.isfinite().all() for grad in problem.grads())
