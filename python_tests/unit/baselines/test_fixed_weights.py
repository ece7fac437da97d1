"""FixedWeights: the chosen weights, in every way to run a step."""

from __future__ import annotations

import pytest
import torch
from _inputs import make_problem

from excessmtl_ext import FixedWeights, Uniform


def test_weights_are_brought_to_the_sum_and_stay() -> None:
    problem = make_problem()
    balancer = FixedWeights(
        problem.encoder.parameters(), num_tasks=3, weights=[1, 2, 5], weight_scale="num_tasks"
    )
    for _ in range(2):
        balancer.backward([loss * 1e9 for loss in problem.losses()])
        assert balancer.task_weights.tolist() == [0.375, 0.75, 1.875]


def test_equal_weights_are_uniform_ones() -> None:
    ends = []
    for make in (Uniform, lambda p, **o: FixedWeights(p, weights=[7, 7, 7], **o)):
        problem = make_problem()
        balancer = make(problem.encoder.parameters(), num_tasks=3)
        for task, loss in enumerate(problem.losses()):
            balancer.accumulate(task, loss, retain_graph=True)
        balancer.finish()
        ends.append([p.grad for p in problem.parameters()])
    torch.testing.assert_close(ends[1], ends[0])


def test_wrong_weights_raise() -> None:
    for wrong in ([1, 0], [1, float("inf")], [1, float("nan")], [1, -1]):
        with pytest.raises(ValueError, match="Expected `weights` > 0 and finite, but got"):
            FixedWeights(num_tasks=2, weights=wrong)
    with pytest.raises(ValueError, match="`weights` to hold 2 numbers, one per task, but got 1"):
        FixedWeights(num_tasks=2, weights=[1])
    with pytest.raises(TypeError, match="`weights` to hold 2 numbers"):
        FixedWeights(num_tasks=2, weights=0.5)  # type: ignore[arg-type]


def test_a_state_of_other_weights_is_refused() -> None:
    saved = FixedWeights(num_tasks=2, weights=[1, 3]).state_dict()
    FixedWeights(num_tasks=2, weights=[1, 3]).load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"`weights` was \(1, 3\) and is \(3\.0, 1\.0\)"):
        FixedWeights(num_tasks=2, weights=[3, 1]).load_state_dict(saved)
