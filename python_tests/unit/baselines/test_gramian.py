"""Gramian of the task gradients: the inner products, whatever form the gradients come in."""

from __future__ import annotations

import pytest
import torch
from _inputs import DTYPES, PARAM_NUMELS, make_task_grads

from excessmtl_ext.baselines import gramian as gramian_module
from excessmtl_ext.baselines.gramian import task_gramian


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["typical", "huge", "tiny", "zero_task", "strided"])
@pytest.mark.parametrize("numels", PARAM_NUMELS.values(), ids=PARAM_NUMELS.keys())
def test_gramian_is_that_of_the_joined_gradients(numels, kind, dtype, device):
    grads = make_task_grads(3, numels, dtype, device, kind)
    rows = [
        torch.cat([g.double() for g in grads[i * len(numels) : (i + 1) * len(numels)]])
        for i in range(3)
    ]
    jacobian = torch.stack(rows)
    torch.testing.assert_close(
        task_gramian(grads, 3), jacobian @ jacobian.T, rtol=1e-12, atol=1e-12
    )


def test_blocks_of_any_size_give_the_same_sum(monkeypatch):
    grads = make_task_grads(4, [100, 7, 33])
    whole = task_gramian(grads, 4)
    monkeypatch.setattr(gramian_module, "BLOCK_NUMEL", 40)
    torch.testing.assert_close(task_gramian(grads, 4), whole, rtol=1e-13, atol=1e-13)


def test_missing_gradients_count_as_zeros():
    nothing = torch.empty(0)
    a, b, c = torch.randn(5), torch.randn(3, 4), torch.randn(3, 4)
    actual = task_gramian([a, b, nothing, c, nothing, nothing], 3)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[0, 0] = (a.double() ** 2).sum() + (b.double() ** 2).sum()
    expected[1, 1] = (c.double() ** 2).sum()
    expected[0, 1] = expected[1, 0] = (b.double() * c.double()).sum()
    torch.testing.assert_close(actual, expected)


def test_grad_scale_is_undone():
    grads = make_task_grads(2, [50])
    scaled = [grad * 1024 for grad in grads]
    assert torch.equal(
        task_gramian(scaled, 2, torch.tensor(1024.0)), task_gramian(grads, 2)
    )  # a power of two


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nonfinite_gradient_spoils_its_own_diagonal_element_only(bad):
    grads = make_task_grads(3, [20, 5])
    grads[3][4] = bad
    assert task_gramian(grads, 3).diagonal().isfinite().tolist() == [True, False, True]
