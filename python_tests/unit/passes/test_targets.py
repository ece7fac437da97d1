"""The sum is written into ``.grad`` or into memory that nobody needs, and never into a view of somebody else's."""

from __future__ import annotations

import torch
from torch import Tensor

from excessmtl_ext.passes.targets import assign_grads, combine_targets, fills_its_storage


def parameters(*sizes: int) -> list[Tensor]:
    return [torch.zeros(size, requires_grad=True) for size in sizes]


def test_without_grad_the_gradients_of_the_first_task_are_written() -> None:
    shared = parameters(2, 3)
    rows = [[torch.ones(2), torch.ones(3)], [torch.zeros(2), torch.zeros(3)]]
    targets = combine_targets(shared, rows)
    assert not targets.accumulate
    assert [out is grad for out, grad in zip(targets.outputs, rows[0], strict=True)] == [True, True]


def test_where_grad_is_the_sum_is_added_to_it() -> None:
    shared = parameters(2, 3)
    shared[0].grad = torch.tensor([1.0, 2.0])
    targets = combine_targets(shared, [[torch.ones(2), torch.ones(3)]])
    assert targets.accumulate
    assert targets.outputs[0].data_ptr() == shared[0].grad.data_ptr()
    assert targets.outputs[1].tolist() == [0.0, 0.0, 0.0]


def test_gradients_that_share_memory_are_not_written() -> None:
    shared = parameters(2, 2)
    one = torch.ones(2)
    targets = combine_targets(shared, [[one.view(-1), one.view(-1)]])
    assert all(out.data_ptr() != one.data_ptr() for out in targets.outputs)
    row_of_all = torch.ones(2, 2)[0]
    assert not fills_its_storage(row_of_all)


def test_a_parameter_that_no_task_reaches_keeps_its_grad() -> None:
    shared = parameters(2, 2)
    targets = combine_targets(shared, [[None, torch.ones(2)], [None, torch.ones(2)]])
    assert targets.outputs[0].numel() == 0
    targets.outputs[1].fill_(7.0)
    assign_grads(shared, targets)
    assert shared[0].grad is None
    assert shared[1].grad is not None and shared[1].grad.tolist() == [7.0, 7.0]


def test_a_strided_grad_receives_the_sum_in_place() -> None:
    (parameter,) = [torch.zeros(2, 3, requires_grad=True)]
    grad = torch.zeros(3, 2).t()
    parameter.grad = grad
    targets = combine_targets([parameter], [[torch.ones(2, 3)]])
    targets.outputs[0].fill_(4.0)
    assign_grads([parameter], targets)
    assert parameter.grad is grad
    assert grad.tolist() == [[4.0] * 3] * 2
