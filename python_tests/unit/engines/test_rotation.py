"""Whose turn it is, with tasks that are absent when their turn comes."""

from __future__ import annotations

import pytest
import torch
from _inputs import make_problem
from _published import published

from excessmtl_ext.engines.rotation import RotationEngine, TaskRotation


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
