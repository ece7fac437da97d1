"""Batches of one task each, in any order, and tasks that begin late: weights as if all tasks were in every batch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _asserts import assert_equal_bits
from _inputs import make_problem
from _published import published
from torch import Tensor, nn

from excessmtl_ext import ExcessMTL

CYCLIC = [0, 1, 2] * 4
DRAWN = [2, 0, 0, 1, 1, 0, 2, 2, 2, 1, 0, 1]


def lone(balancer: ExcessMTL, task: int, grad: Tensor) -> None:
    """A step in which ``task`` alone is present."""
    balancer.update_weights([[grad] if index == task else [] for index in range(3)])


def by_hand(grads: dict[int, list[Tensor]], order: list[int], step_size: float) -> list[float]:
    """Eq. 9 over rounds in float64: S, E and B of a task move in its own batches, weights at the end of a round."""
    sums = [torch.zeros(4).double() for _ in range(3)]
    baselines, risks, log_weights = [0.0] * 3, [0.0] * 3, [0.0] * 3
    seen: set[int] = set()
    counts = [0] * 3
    for task in order:
        grad = grads[task][counts[task]].double()
        counts[task] += 1
        sums[task] += grad**2
        risk = float((grad**2 / (sums[task] + 1e-7).sqrt()).sum())
        baselines[task] = baselines[task] or risk
        risks[task] = risk / baselines[task]
        seen.add(task)
        if len(seen) == 3:
            seen.clear()
            log_weights = [w + step_size * r for w, r in zip(log_weights, risks, strict=True)]
    total = sum(math.exp(w) for w in log_weights)
    return [math.exp(w) / total for w in log_weights]


def drawn_grads() -> dict[int, list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return {task: [torch.randn(4, generator=generator) for _ in range(12)] for task in range(3)}


@pytest.mark.parametrize("order", [CYCLIC, DRAWN], ids=["cyclic", "drawn"])
def test_batches_of_one_task_move_the_weights_of_eq_9_once_a_round(order):
    grads = drawn_grads()
    balancer = published(num_tasks=3, robust_step_size=0.7)
    counts = [0] * 3
    for task in order:
        lone(balancer, task, grads[task][counts[task]])
        counts[task] += 1
    expected = by_hand(grads, order, 0.7)
    assert max(expected) - min(expected) > 0.1
    assert balancer.task_weights.tolist() == pytest.approx(expected, rel=1e-5)
    assert int(balancer.num_steps) == len(order)
    assert int(balancer.num_skipped_steps) == 0


def test_a_round_of_one_task_each_is_the_step_with_all_of_them():
    grads = drawn_grads()
    apart, together = (published(num_tasks=3, robust_step_size=0.7) for _ in range(2))
    for round_number in range(4):
        for task in range(3):
            lone(apart, task, grads[task][round_number])
        if (
            round_number > 0
        ):  # apart, tasks 1 and 2 set their baselines after the warm-up: R = 1 in all
            torch.testing.assert_close(
                apart.relative_excess_risk, relative(together, grads, round_number)
            )
        else:
            together.update_weights([[grads[task][0]] for task in range(3)])
    torch.testing.assert_close(apart.task_weights, together.task_weights, rtol=1e-12, atol=0)


def relative(balancer: ExcessMTL, grads: dict[int, list[Tensor]], number: int) -> Tensor:
    balancer.update_weights([[grads[task][number]] for task in range(3)])
    return balancer.relative_excess_risk


def test_a_round_goes_on_after_saving_and_loading_and_skipped_steps_have_no_part_in_it():
    grads = drawn_grads()
    balancer = published(num_tasks=3, robust_step_size=0.7)
    for task in range(3):
        lone(balancer, task, grads[task][0])
    lone(balancer, 0, grads[0][1])
    before = balancer.task_weights.clone()
    lone(balancer, 1, grads[1][1] * float("nan"))
    other = published(num_tasks=3, robust_step_size=0.7)
    other.load_state_dict(balancer.state_dict())
    for each in (balancer, other):
        lone(each, 2, grads[2][1])
        assert torch.equal(each.task_weights, before)  # task 1 has not come yet
        lone(each, 1, grads[1][1])
        assert not torch.equal(each.task_weights, before)
    assert_equal_bits(list(balancer.state_tensors().values()), list(other.state_tensors().values()))
    balancer.reset()
    assert balancer.lone_tasks == frozenset()


def test_a_task_that_never_comes_keeps_its_weight():
    grads = drawn_grads()
    balancer = published(num_tasks=3, robust_step_size=0.7)
    for number in range(12):
        lone(balancer, number % 2, grads[number % 2][number // 2])
    assert balancer.task_weights.tolist() == pytest.approx([1 / 3] * 3, rel=1e-12)


ORDERS: dict[str, Callable[[int, random.Random], int]] = {
    "cyclic": lambda number, draw: number % 3,
    "drawn 6:3:1": lambda number, draw: draw.choices(range(3), (6, 3, 1))[0],
}


@pytest.mark.parametrize("options", [{}, {"tasks_per_step": 1}, {"state_dtype": torch.bfloat16}])
@pytest.mark.parametrize("order", ORDERS)
def test_like_tasks_have_like_weights_however_often_each_is_drawn(order, options):
    draw = random.Random(0)
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
    heads = nn.ModuleList(nn.Linear(16, 1) for _ in range(3))
    slope = torch.randn(12)
    balancer = ExcessMTL(encoder.parameters(), num_tasks=3, **options)
    optimizer = torch.optim.Adam([*encoder.parameters(), *heads.parameters()], lr=3e-3)
    for number in range(600):
        task = ORDERS[order](number, draw)
        inputs = torch.randn(32, 12)
        targets = inputs @ slope + 0.3 * torch.randn(32)
        loss = (heads[task](encoder(inputs))[:, 0] - targets).square().mean()
        optimizer.zero_grad()
        balancer.backward([loss if index == task else None for index in range(3)])
        optimizer.step()
    assert balancer.task_weights.tolist() == pytest.approx([1 / 3] * 3, abs=0.06)


# ---- tasks that begin late


BEGINNINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "rotation": {"tasks_per_step": 1},
    "update_every": {"update_every": 3},
    "Eq. 9, momentum": {"robust_step_size": 0.1},
    "Eq. 9, momentum, sqrt": {"robust_step_size": 0.1, "fisher": "sqrt"},
    "Eq. 9, warm-up": {"robust_step_size": 0.1, "num_warmup_steps": 5},
}


@pytest.mark.parametrize("options", BEGINNINGS.values(), ids=BEGINNINGS)
def test_gradients_of_zeros_before_a_task_begins_are_those_of_an_absent_task(options):
    """What is known of the late task afterwards is what a task that was absent until then would have."""
    states = []
    for is_absent in (False, True):
        problem = make_problem()
        balancer = ExcessMTL(problem.encoder.parameters(), num_tasks=3, **options)
        for number in range(12):
            losses: list[Tensor | None] = list(problem.losses())
            if number < 6:
                losses[2] = None if is_absent else losses[2] * 0.0
            balancer.backward(losses)
            problem.zero_grad()
        states.append(balancer)
    zero, absent = states
    for name in (
        "num_task_steps",
        "excess_risk",
        "baseline_excess_risk",
        "sq_grad_sum",
        "grad_mean",
    ):
        torch.testing.assert_close(getattr(zero, name)[2], getattr(absent, name)[2], msg=name)
    assert float(absent.num_task_steps[2]) > 0


def test_a_late_task_is_measured_from_its_own_first_gradient():
    """By hand: a gradient of ones in every step, so m / (1 - b^t) is 1 in the task's own step t, and E = P / t."""
    balancer = ExcessMTL(num_tasks=2, robust_step_size=0.1)
    ones = torch.ones(4)
    for number in range(8):
        balancer.update_weights([[ones], [ones * (number >= 5)]])
    assert balancer.num_task_steps.tolist() == [8, 3]
    assert balancer.baseline_excess_risk.tolist() == pytest.approx([4.0, 4.0], rel=1e-5)
    assert balancer.relative_excess_risk.tolist() == pytest.approx([1 / 8, 1 / 3], rel=1e-5)


def test_a_gradient_of_zero_midway_is_no_evidence_and_no_size() -> None:
    """All labels of a task are ignored in a batch: its loss is NaN, and its gradient zero."""
    problem = make_problem()
    balancer = ExcessMTL(problem.encoder.parameters(), num_tasks=3)
    for _ in range(5):
        problem.zero_grad()
        balancer.backward(problem.losses())
    names = (
        "num_gradient_steps",
        "risk_share_sum",
        "tensor_mean_square",
        "num_tensor_steps",
        "sq_grad_sum",
    )
    before = [getattr(balancer, name)[2].clone() for name in names]
    problem.zero_grad()
    losses = problem.losses()
    balancer.backward([*losses[:2], problem.heads[2](problem.encoder(problem.inputs))[:0].mean()])
    assert_equal_bits([getattr(balancer, name)[2] for name in names], before)
    assert int(balancer.num_skipped_steps) == 0
    assert all(bool(parameter.grad.isfinite().all()) for parameter in problem.encoder.parameters())  # type: ignore[union-attr]
