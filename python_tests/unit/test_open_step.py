"""A streamed step that has begun is ended or given up before anything else; held weights stay as they are."""

from __future__ import annotations

import pytest
import torch
from _inputs import make_problem
from _published import published


def test_verbs_wait_for_the_end_of_a_streamed_step() -> None:
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3)
    losses = problem.losses()
    saved = balancer.state_dict()
    balancer.accumulate(0, losses[0], retain_graph=True)
    for verb in (
        lambda: balancer.backward(losses),
        lambda: balancer(losses).backward(),
        lambda: balancer.update_weights([[]] * 3),
        lambda: balancer.hold_weights().__enter__(),
        lambda: balancer.load_state_dict(saved),
    ):
        with pytest.raises(RuntimeError, match=r"Expected finish\(\) before"):
            verb()
    balancer.finish()
    problem.zero_grad()
    balancer.backward(problem.losses())


def test_held_weights_are_applied_and_neither_moved_nor_counted() -> None:
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3, robust_step_size=1.0)
    for _ in range(2):
        balancer.backward(problem.losses())
    before = {name: tensor.clone() for name, tensor in balancer.state_tensors().items()}
    problem.zero_grad()
    with pytest.raises(KeyError), balancer.hold_weights():  # an error ends it, too
        balancer.backward(problem.losses())
        raise KeyError
    assert not balancer.holds_weights
    assert balancer.num_calls == 2
    after = balancer.state_tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)
    shared = list(problem.encoder.parameters())
    rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in problem.losses()]
    for index, parameter in enumerate(shared):
        expected = sum(
            w * row[index].double() for w, row in zip(before["task_weights"], rows, strict=True)
        )
        torch.testing.assert_close(parameter.grad, expected.float())  # type: ignore[union-attr]
