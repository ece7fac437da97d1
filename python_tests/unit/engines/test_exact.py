"""The plain step by hand, with heads, one pass where no gradient is needed, and gradients that are not finite."""

from __future__ import annotations

import pytest
import torch
from _published import published

from excessmtl_ext import GroupDRO, Uniform
from excessmtl_ext.engines.exact import ExactEngine, guarded_weights, weights_of_heads


def test_the_sum_under_the_new_weights_becomes_grad_and_heads_get_their_own() -> None:
    shared = torch.ones(1, requires_grad=True)
    heads = [torch.ones(1, requires_grad=True) for _ in range(2)]
    balancer = published([shared], num_tasks=2, robust_step_size=1.0)
    for factor in (1, 2, 5):
        for parameter in (shared, *heads):
            parameter.grad = None
        balancer.backward([(shared * heads[0] * 2).sum(), (shared * heads[1] * factor).sum()])
    weights = balancer.task_weights
    assert weights[0] != weights[1]
    assert shared.grad is not None
    assert shared.grad.item() == pytest.approx((2 * weights[0] + 5 * weights[1]).item(), rel=1e-6)
    assert [head.grad.item() for head in heads if head.grad is not None] == [2.0, 5.0]


def test_losses_alone_take_one_pass() -> None:
    shared = torch.ones(1, requires_grad=True)
    seen: list[float] = []
    z = shared * 1
    z.register_hook(lambda grad: seen.append(grad.item()))
    balancer = GroupDRO([shared], num_tasks=2)
    balancer.backward([(z * 2).sum(), (z * 3).sum()])
    weights = balancer.task_weights.tolist()
    assert seen == pytest.approx([2 * weights[0] + 3 * weights[1]], rel=1e-6)


def test_a_nan_makes_the_pass_weights_nan_and_those_of_heads() -> None:
    balancer = Uniform(num_tasks=2)
    assert guarded_weights(balancer).tolist() == [0.5, 0.5]
    assert weights_of_heads(balancer, balancer.task_weights) is None
    balancer.found_nonfinite[0] = True
    weights = guarded_weights(balancer)
    assert weights.isnan().all()
    balancer.head_weighting = "task_weights"
    assert weights_of_heads(balancer, weights) is weights


def test_a_gradient_that_is_not_finite_raises_before_grad_is_written() -> None:
    shared = torch.ones(1, requires_grad=True)
    shared.grad = torch.tensor([7.0])
    balancer = published([shared], num_tasks=2, nonfinite="raise")
    with pytest.raises(FloatingPointError, match=r"task\(s\) \[1\]"):
        balancer.backward([shared.sum(), (shared * float("nan")).sum()])
    assert shared.grad.tolist() == [7.0]
    assert balancer.num_steps == 0


def test_the_engine_says_what_lives_at_once() -> None:
    engine = ExactEngine()
    assert engine.live_task_grads(published(num_tasks=3))[0] == 3
    assert engine.live_task_grads(Uniform(num_tasks=3)) == (1, "`.grad`")
    assert engine.backward_mode == "none (no step so far)"
    assert engine.num_held_bytes == 0
