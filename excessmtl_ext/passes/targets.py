"""Tensors that the weighted sum of the gradients is written to, and how they become ``.grad``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import repeat
from operator import attrgetter, is_not

import torch
from torch import Tensor

from excessmtl_ext.dense_order import DenseOrder
from excessmtl_ext.step import Targets

_grad_of = attrgetter("grad")


def _are_given(grads: Sequence[Tensor | None]) -> Iterator[bool]:
    return map(is_not, grads, repeat(None))


def combine_targets(
    shared: Sequence[Tensor],
    task_grads: Sequence[Sequence[Tensor | None]],
    order: DenseOrder | None = None,
) -> Targets:
    """Chooses what the weighted sum is written to: ``.grad`` where one is, else a gradient that is no longer needed.

    ``task_grads``: a row of L gradients per task, whose memory may be written; None where the task
    did not reach the parameter. With ``order`` they are seen in it, and so are the targets.
    """
    if not any(_are_given(list(map(_grad_of, shared)))) and _may_be_written(task_grads[0]):
        return Targets(list(task_grads[0]), False)  # type: ignore[arg-type]
    tasks = [
        next((task for task, grads in enumerate(task_grads) if grads[index] is not None), None)
        for index in range(len(shared))
    ]
    used_tasks = {task for task in tasks if task is not None}
    accumulate = any(
        parameter.grad is not None
        for parameter, task in zip(shared, tasks, strict=True)
        if task is not None
    )
    grads_now = list(map(_grad_of, shared))
    if order is not None:
        grads_now = order.seen(grads_now)
    uses = {task: Counter(map(_storage_of, task_grads[task])) for task in used_tasks}
    outputs: list[Tensor] = []
    for index, (parameter, task) in enumerate(zip(shared, tasks, strict=True)):
        if task is None:
            outputs.append(torch.empty(0, dtype=parameter.dtype, device=parameter.device))
        elif parameter.grad is not None:
            outputs.append(grads_now[index].contiguous())  # type: ignore[union-attr]
        elif accumulate:
            zeros = torch.zeros_like(parameter)
            seen = zeros if order is None else zeros.permute(order.permutations[index])
            outputs.append(seen.contiguous())
        else:
            grad = task_grads[task][index]
            assert grad is not None
            is_alone = uses[task][_storage_of(grad)] == 1
            outputs.append(
                grad
                if is_alone and grad.is_contiguous() and fills_its_storage(grad)
                else torch.empty_like(grad, memory_format=torch.contiguous_format)
            )
    return Targets(outputs, accumulate)


def _may_be_written(grads: Sequence[Tensor | None]) -> bool:
    """Tells whether all gradients of a task are there, each contiguous and alone in its storage."""
    if not all(_are_given(grads)):
        return False
    given: list[Tensor] = list(grads)  # type: ignore[arg-type]
    return (
        len(set(map(_storage_of, given))) == len(given)
        and all(map(Tensor.is_contiguous, given))
        and all(map(fills_its_storage, given))
    )


def _storage_of(grad: Tensor | None) -> int:
    """Returns the address of a gradient's storage.

    Parameters may share one: for ``a.view(-1) + b.view(-1)`` autograd makes both ``.grad`` views of
    one tensor, and a sum written for a would change what is read for b.
    """
    return 0 if grad is None else grad.untyped_storage().data_ptr()


def fills_its_storage(grad: Tensor) -> bool:
    """Tells a gradient from a row of all tasks' gradients, which as ``.grad`` would keep those of all tasks alive."""
    return grad.untyped_storage().nbytes() <= grad.numel() * grad.element_size()


def assign_grads(
    shared: Sequence[Tensor], targets: Targets, order: DenseOrder | None = None
) -> None:
    """Makes the written targets of :func:`combine_targets` the ``.grad`` of their parameters."""
    outputs = targets.outputs if order is None else order.undone(targets.outputs)
    for parameter, output in zip(shared, outputs, strict=True):
        if output.shape != parameter.shape:
            if output.numel() == 0:
                continue  # no task reached it
            output = output.view_as(parameter)
        grad = parameter.grad
        if grad is None:
            parameter.grad = output
        elif grad.data_ptr() != output.data_ptr():
            grad.copy_(output)
