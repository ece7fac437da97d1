"""A method defines how its weights move; the rest is there."""

from __future__ import annotations

import pytest
import torch

from excessmtl_ext import Balancer
from excessmtl_ext.step import Step
from excessmtl_ext.weighting import WeightingMethod


class Halving(Balancer):
    requires = frozenset({"losses"})

    def update(self, step: Step) -> None:
        losses = step.losses_like(self.task_weights)
        self.task_weights.copy_(losses / losses.sum())
        self.num_steps += 1


def test_update_alone_makes_a_method() -> None:
    shared = torch.ones(1, requires_grad=True)
    balancer = Halving([shared], num_tasks=2)
    assert balancer.task_weights.tolist() == [0.5, 0.5]
    balancer.backward([(shared * 1).sum(), (shared * 3).sum()])
    assert balancer.task_weights.tolist() == [0.25, 0.75]
    assert shared.grad is not None and shared.grad.item() == 0.25 * 1 + 0.75 * 3
    assert balancer.head_weights() is balancer.pass_weights() is balancer.task_weights


def test_a_class_without_update_is_no_method() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Balancer(num_tasks=2)  # type: ignore[abstract]
    assert not WeightingMethod.has_uniform_weights
