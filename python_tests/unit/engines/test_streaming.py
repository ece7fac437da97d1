"""A step task by task: its running sums by hand, and what a stream refuses."""

from __future__ import annotations

import pytest
import torch
from _published import published
from torch import Tensor

from excessmtl_ext import MGDA, GroupDRO


def stream(balancer: object, factors: list[float], shared: Tensor, **options: object) -> None:
    for task, factor in enumerate(factors):
        balancer.accumulate(task, factor * shared.sum(), **options)  # type: ignore[attr-defined]
    balancer.finish()  # type: ignore[attr-defined]


def test_the_sum_is_that_of_the_new_weights() -> None:
    shared = torch.ones(2, requires_grad=True)
    balancer = published([shared], num_tasks=2, robust_step_size=1.0)
    for _ in range(3):
        shared.grad = None
        stream(balancer, [1.0, 3.0], shared)
    weights = balancer.task_weights
    assert weights[0] != weights[1]
    expected = (weights[0] + 3 * weights[1]).float()
    torch.testing.assert_close(shared.grad, expected.expand(2), rtol=1e-6, atol=0.0)


def test_a_floor_is_part_of_the_sum() -> None:
    shared = torch.ones(1, requires_grad=True)
    balancer = published([shared], num_tasks=2, robust_step_size=5.0, min_weight=0.25)
    for _ in range(4):
        shared.grad = None
        stream(balancer, [1.0, 3.0], shared)
    assert balancer.task_weights.min() >= 0.25
    expected = (balancer.task_weights * torch.tensor([1.0, 3.0])).sum().float()
    torch.testing.assert_close(shared.grad, expected.expand(1), rtol=1e-6, atol=0.0)


def test_the_sum_is_added_to_grad_and_absent_tasks_are_left_out() -> None:
    shared = torch.ones(1, requires_grad=True)
    shared.grad = torch.tensor([10.0])
    balancer = GroupDRO([shared], num_tasks=3)
    balancer.accumulate(2, 4 * shared.sum())
    balancer.finish()
    assert shared.grad.item() == pytest.approx(10.0 + 4.0 * balancer.task_weights[2].item())


def test_what_cannot_be_part_of_the_step_is_refused_and_the_step_goes_on() -> None:
    shared = torch.ones(1, requires_grad=True)
    balancer = published([shared], num_tasks=2)
    balancer.accumulate(0, shared.sum(), grad_scale=2.0)
    with pytest.raises(ValueError, match=r"each task once per step, but got task 0 again"):
        balancer.accumulate(0, shared.sum(), grad_scale=2.0)
    with pytest.raises(ValueError, match=r"`task` between 0 and 1, but got 2"):
        balancer.accumulate(2, shared.sum(), grad_scale=2.0)
    with pytest.raises(ValueError, match=r"one `grad_scale` for all tasks of a step, but got 1.0"):
        balancer.accumulate(1, shared.sum())
    balancer.accumulate(1, shared.sum(), grad_scale=2.0)
    balancer.finish()
    assert shared.grad is not None and shared.grad.item() == pytest.approx(2.0)  # keeps the scale


def test_methods_whose_weights_need_all_gradients_do_not_stream() -> None:
    shared = torch.ones(1, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"MGDA cannot stream"):
        MGDA([shared], num_tasks=2).accumulate(0, shared.sum())
    with pytest.raises(RuntimeError, match=r"Expected accumulate\(\) before finish\(\)"):
        published([shared], num_tasks=2).finish()
