"""A step task by task: its running sums by hand, and what a stream refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from _asserts import assert_equal_bits
from _inputs import make_problem
from _published import published
from torch import Tensor

from excessmtl_ext import IMTL, MGDA, Balancer, ExcessMTL, GroupDRO, SingleTask, Uniform


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


HOLDS: dict[str, Callable[..., Balancer]] = {
    "default": ExcessMTL,
    "group_dro": GroupDRO,
    "imtl_l": lambda parameters, **options: IMTL(parameters, variant="L", **options),
    "uniform": Uniform,
    "single_task": lambda parameters, **options: SingleTask(parameters, task=1, **options),
}


@pytest.mark.parametrize("name", HOLDS)
def test_a_streamed_step_that_holds_the_weights_applies_them_and_changes_no_state(
    name: str,
) -> None:
    problem = make_problem()
    shared = list(problem.encoder.parameters())
    balancer = HOLDS[name](shared, num_tasks=3)

    def stream() -> None:
        problem.zero_grad()
        for task, loss in enumerate(problem.losses()):
            balancer.accumulate(task, loss, retain_graph=True)
        balancer.finish()

    stream()
    before = [tensor.clone() for tensor in balancer.state_tensors().values()]
    with balancer.hold_weights():
        stream()
        streamed = problem.grads()
        problem.zero_grad()
        balancer.backward(problem.losses())
    assert_equal_bits(list(balancer.state_tensors().values()), before)
    for left, right in zip(streamed, problem.grads(), strict=True):
        if right is not None:
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)
