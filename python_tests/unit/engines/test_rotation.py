"""Whose turn it is, with tasks that are absent when their turn comes."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from _inputs import make_problem
from _published import published
from torch.utils.checkpoint import checkpoint

from excessmtl_ext import ExcessMTL
from excessmtl_ext.engines.rotation import RotationEngine, TaskRotation
from excessmtl_ext.step import NonFinite


def test_every_task_has_its_turn_once_in_a_round() -> None:
    rotation = TaskRotation(5, 2)
    everyone = range(5)
    assert [rotation.take_turns(everyone) for _ in range(3)] == [[0, 1], [2, 3], [4]]
    assert rotation.waiting == []
    assert rotation.served == [0, 1, 2, 3, 4]
    rotation.start_round()
    assert rotation.take_turns(everyone) == [0, 1]


def test_an_absent_task_gets_its_turn_later_in_the_round() -> None:
    rotation = TaskRotation(3, 1)
    assert rotation.take_turns([1, 2]) == [1]
    assert rotation.take_turns([1]) == []
    assert rotation.waiting == [0, 2]
    assert rotation.take_turns([0, 1]) == [0]
    assert rotation.served == [0, 1]


def test_the_weights_move_when_a_round_is_over_and_only_then() -> None:
    problem = make_problem()
    balancer = published(
        problem.encoder.parameters(), num_tasks=3, tasks_per_step=1, robust_step_size=1.0
    )
    moved = []
    for _ in range(6):
        before = balancer.num_steps.item()
        balancer.backward(problem.losses())
        moved.append(balancer.num_steps.item() - before)
    assert moved == [0, 0, 1, 0, 0, 1]


def test_a_round_ends_without_tasks_that_stay_away() -> None:
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3, tasks_per_step=1)
    for _ in range(2):
        balancer.backward([*problem.losses()[:2], None])
    assert balancer.num_steps == 0
    balancer.backward([*problem.losses()[:2], None])  # task 2 alone is waiting
    assert balancer.num_steps == 1
    assert balancer.num_task_steps.tolist() == [2, 1, 0]


def test_a_step_that_fails_gives_the_turn_back(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3, tasks_per_step=1)
    engine = balancer.engine
    assert isinstance(engine, RotationEngine)
    balancer.backward(problem.losses())
    assert engine.rotation.waiting == [1, 2]

    def fail(*args: object) -> None:
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(balancer, "take_turns", fail)
        with pytest.raises(RuntimeError, match="planted"):
            balancer.backward(problem.losses())
    assert engine.rotation.waiting == [1, 2]
    problem.zero_grad()
    balancer.backward(problem.losses())
    assert engine.rotation.waiting == [2]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in problem.grads())


def test_the_first_step_measures_the_tasks_whose_turn_is_still_to_come() -> None:
    """The sum of the first step, in units of the largest task, is of all tasks at one size: c_i g_i / |g_i|."""
    shared = torch.nn.Parameter(torch.zeros(2))
    balancer = ExcessMTL([shared], num_tasks=3, tasks_per_step=1)
    slopes = [torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5e-6]), torch.tensor([5e4, 0.0])]
    balancer.backward([slope @ shared for slope in slopes])
    assert balancer.num_task_steps.tolist() == [1, 0, 0]
    sizes = [25.0 / 2, 25e-12 / 2, 25e8 / 2]
    assert balancer.tensor_mean_square[:, 0].tolist() == pytest.approx(sizes, rel=1e-6)
    want = sum(slope / slope.norm() for slope in slopes) * 5e4 / 3
    assert shared.grad is not None
    torch.testing.assert_close(shared.grad, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_sizes_of_a_step_that_does_not_count_are_forgotten(nonfinite: NonFinite) -> None:
    problem = make_problem()
    shared = list(problem.encoder.parameters())
    balancer = ExcessMTL(shared, num_tasks=3, tasks_per_step=1, nonfinite=nonfinite)
    losses = problem.losses()
    losses[0] = losses[0] * float("nan")
    with pytest.raises(FloatingPointError) if nonfinite == "raise" else nullcontext():
        balancer.backward(losses)
    assert not balancer.tensor_mean_square.any()
    assert not balancer.num_tensor_steps.any()
    problem.zero_grad()
    balancer.backward(problem.losses())
    assert bool((balancer.num_tensor_steps == 1).all())


def test_a_task_that_begins_late_is_measured_before_its_turn_also_after_loading() -> None:
    """A task of zeros has no size, and without one it would weigh nothing until its turn."""
    slopes = torch.eye(3)
    for loads in (False, True):
        shared = torch.nn.Parameter(torch.zeros(3))
        balancer = ExcessMTL([shared], num_tasks=3, tasks_per_step=1)
        balancer.backward([slopes[0] @ shared, slopes[1] @ shared, 0.0 * shared.sum()])
        if loads:
            state, balancer = (
                balancer.state_dict(),
                ExcessMTL([shared], num_tasks=3, tasks_per_step=1),
            )
            balancer.load_state_dict(state)
        shared.grad = None
        balancer.backward([slope @ shared for slope in slopes])
        assert balancer.num_task_steps.tolist() == [1, 1, 0]
        assert shared.grad is not None
        torch.testing.assert_close(shared.grad, torch.full((3,), 1 / 3))


def test_a_task_is_measured_once_also_after_loading() -> None:
    problem = make_problem()
    balancer = ExcessMTL(problem.encoder.parameters(), num_tasks=3, tasks_per_step=1)
    balancer.backward([*problem.losses()[:2], None])
    other = ExcessMTL(problem.encoder.parameters(), num_tasks=3, tasks_per_step=1)
    other.load_state_dict(balancer.state_dict())
    for each in (balancer, other):
        problem.zero_grad()
        each.backward(problem.losses())
        # Task 0 had its turn in the first step, task 1 was measured there and has its turn here, task 2 is new.
        assert each.num_tensor_steps[:, 0].tolist() == [1, 2, 1]
    other.reset()
    assert isinstance(other.engine, RotationEngine)
    assert other.engine.rotation.measured == frozenset()


def test_a_task_whose_size_cannot_be_measured_waits_for_its_turn() -> None:
    problem = make_problem()

    def hidden_losses() -> list[torch.Tensor]:
        inputs = problem.inputs.clone().requires_grad_()
        z = checkpoint(problem.encoder, inputs, use_reentrant=True)
        return [
            (head(z)[:, 0] - problem.targets[:, task]).square().mean()
            for task, head in enumerate(problem.heads)
        ]

    shared = list(problem.encoder.parameters())
    balancer = ExcessMTL(shared, num_tasks=3, tasks_per_step=1)
    balancer.backward(hidden_losses())
    got = [parameter.grad.clone() for parameter in shared if parameter.grad is not None]
    own = torch.autograd.grad(problem.losses()[0], shared)
    for ours, want in zip(got, own, strict=True):
        torch.testing.assert_close(ours, want * balancer.task_weights[0].float())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_size_that_is_not_finite_is_measured_in_a_later_turn(value: float) -> None:
    problem = make_problem()
    balancer = ExcessMTL(problem.encoder.parameters(), num_tasks=3, tasks_per_step=1)
    balancer.backward([*problem.losses()[:2], problem.losses()[2] * value])
    assert balancer.num_tensor_steps[2].tolist() == [0] * len(balancer.num_tensor_steps[2])
    problem.zero_grad()
    balancer.backward(problem.losses())
    assert bool(balancer.tensor_mean_square.isfinite().all())
    assert float(balancer.tensor_mean_square.max()) < 1e6


def test_a_round_under_way_does_not_change_the_relative_risks() -> None:
    problem = make_problem()
    balancer = ExcessMTL(problem.encoder.parameters(), num_tasks=3, tasks_per_step=1)
    for number in range(9):
        before = balancer.relative_excess_risk.clone()
        balancer.backward(problem.losses())
        if number % 3 != 2:
            assert torch.equal(balancer.relative_excess_risk, before)
    assert float(balancer.relative_excess_risk.max()) == 1.0
