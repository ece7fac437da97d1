"""Given gradients are brought into rows of one length, whatever form they come in."""

from __future__ import annotations

import pytest
import torch

from excessmtl_ext import GroupDRO
from excessmtl_ext.given_gradients import checked_rows, read_given
from excessmtl_ext.state import ParamLayout


def test_a_matrix_is_cut_at_the_sizes_that_are_known() -> None:
    layout = ParamLayout([2, 3])
    rows, same = checked_rows(torch.arange(10.0).view(2, 5), 2, layout)
    assert same is layout
    assert [[grad.tolist() for grad in row if grad is not None] for row in rows] == [
        [[0.0, 1.0], [2.0, 3.0, 4.0]],
        [[5.0, 6.0], [7.0, 8.0, 9.0]],
    ]
    with pytest.raises(ValueError, match=r"`task_grads` has 4 columns, but .* accumulated 5"):
        checked_rows(torch.zeros(2, 4), 2, layout)


def test_the_first_gradients_tell_the_sizes() -> None:
    rows, layout = checked_rows([[torch.ones(2), torch.ones(3, 2)], []], 2, None)
    assert layout == ParamLayout([2, 6])
    assert rows[1] == [None, None]
    with pytest.raises(ValueError, match=r"parameter 1 has none"):
        checked_rows([[torch.ones(2), None]], 1, None)
    assert checked_rows([[], []], 2, None) == ([[], []], None)


def test_other_sizes_and_numbers_are_refused() -> None:
    layout = ParamLayout([2])
    with pytest.raises(ValueError, match=r"sizes \[3\], but this balancer has accumulated \[2\]"):
        checked_rows([[torch.ones(3)]], 1, layout)
    with pytest.raises(ValueError, match=r"to hold 2 lists, one per task, but got 1"):
        checked_rows([[torch.ones(2)]], 2, layout)
    with pytest.raises(ValueError, match=r"`task_grads\[1\]` to hold 2 gradients, but got 1"):
        checked_rows([[torch.ones(2), None], [torch.ones(2)]], 2, layout)


def test_sparse_gradients_are_refused_by_name() -> None:
    sparse = torch.eye(2).to_sparse()
    with pytest.raises(ValueError, match=r"number 1, of shape \[2, 2\], is sparse"):
        checked_rows([[torch.ones(2), sparse], []], 2, None)


def test_what_the_method_does_not_require_is_not_looked_at() -> None:
    balancer = GroupDRO(num_tasks=2)
    step = read_given(balancer, "no gradients", [torch.tensor(1.0), torch.tensor(2.0)], 8.0)  # type: ignore[arg-type]
    assert step.losses is not None and step.losses.tolist() == [1.0, 2.0]
    assert step.task_grads.tensors == []
    assert step.grad_scale == 8.0
    with pytest.raises(ValueError, match=r"Expected `losses`: GroupDRO computes its weights"):
        read_given(balancer, None, None, None)
