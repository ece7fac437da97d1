"""InverseNorm: every task adds a gradient of the same norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from excessmtl_ext import InverseNorm
from excessmtl_ext.baselines.gradient_norms import tensor_norms


def test_norms_are_those_of_each_tensor_without_the_scale() -> None:
    grads = [torch.tensor([3.0, 4.0]), torch.empty(0), torch.ones(2, 2), torch.tensor([1e30])]
    norms = tensor_norms(grads, 2, torch.tensor(2.0))
    assert norms.dtype == torch.float64
    assert norms.tolist() == [[2.5, 0.0], [1.0, pytest.approx(5e29)]]


def test_every_task_adds_the_same_norm() -> None:
    shared = nn.Parameter(torch.zeros(2))
    balancer = InverseNorm([shared], num_tasks=2)
    balancer.backward([3.0 * shared[0], 0.1 * shared[1]])
    assert shared.grad is not None
    assert shared.grad[0].item() == pytest.approx(shared.grad[1].item())
    assert balancer.task_weights.tolist() == pytest.approx([0.1 / 3.1, 3.0 / 3.1])


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_no_unit_of_a_loss_changes_what_its_task_adds(unit: float) -> None:
    rows = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    rows[1] *= unit
    balancer = InverseNorm(num_tasks=2)
    weights = balancer.update_weights(rows)
    added = weights * rows.double().norm(dim=1)
    assert (added[0] / added[1]).item() == pytest.approx(1.0)


def test_a_gradient_of_zero_is_that_of_an_absent_task() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    balancer = InverseNorm(num_tasks=3)
    before = balancer.update_weights(rows).clone()
    rows[1] = 0.0
    rows[2] = 4.0
    after = balancer.update_weights(rows)
    assert after[1].item() == pytest.approx(before[1].item())
    assert (after[0] / after[2]).item() == pytest.approx(32**0.5)
    before = after.clone()
    assert balancer.update_weights(torch.zeros(3, 2)).tolist() == pytest.approx(before.tolist())
