"""Gradients in memory that a later pass writes again, found by where they lie.

Whatever makes gradients may keep the buffer that it returns and fill it anew in its next pass, as
``torch.cuda.make_graphed_callables`` does, and an autograd Function may. One backward pass per step
never notices. Where a step keeps the gradients of several passes, all tasks would get the last
one's: their gradients then lie in the same memory, which live gradients of their own never do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

Grads = Sequence[Tensor | None]

BEFORE = -1
"""In place of a task: what lay in ``.grad`` before the step."""

THIS_STEP = -2
"""In place of a task: what one pass for all tasks leaves in ``.grad``."""


def copied(grads: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Returns the gradients of one pass in memory of their own."""
    return [None if grad is None else grad.clone() for grad in grads]


def storages_of(grads: Iterable[Tensor | None]) -> set[int]:
    """Returns where the storages of gradients of any kind begin; of sparse ones, those of their values."""
    return {part.untyped_storage().data_ptr() for grad in grads for part in _parts(grad)}


def _parts(grad: Tensor | None) -> list[Tensor]:
    """Returns the tensor that holds the elements of ``grad``; none where that cannot be told."""
    if grad is None:
        return []
    if grad.layout is torch.sparse_coo:
        return [grad._values()]
    part = getattr(grad, "_local_tensor", grad)
    try:
        part.untyped_storage().data_ptr()
    except (AttributeError, RuntimeError, NotImplementedError):
        return []
    return [part]


def _extent(grad: Tensor) -> tuple[int, int]:
    """Returns the first and last byte but one of the elements."""
    if grad.numel() == 0:
        return 0, 0
    span = 1 + sum((size - 1) * step for size, step in zip(grad.shape, grad.stride(), strict=True))
    begin = grad.data_ptr()
    return begin, begin + span * grad.element_size()


def separated(
    rows: Mapping[int, Grads], of: str, starts: Iterable[Tensor | None]
) -> dict[int, list[Tensor | None]]:
    """Searches where two tasks have gradients in one storage, which need not overlap.

    Arguments, result and error are those of :func:`excessmtl_ext.passes.per_task.raise_if_reused`.
    """
    start_storages = storages_of(starts)
    changed: dict[int, list[Tensor | None]] = {}
    known: dict[int, list[tuple[int, int, int]]] = {}  # by storage: task, begin, end
    for task, row in rows.items():
        for index, grad in enumerate(row):
            for part in _parts(grad):
                storage = part.untyped_storage().data_ptr()
                begin, end = _extent(part)
                others = known.setdefault(storage, [])
                other = next(
                    (
                        each
                        for each in others
                        if each[0] != task and each[1] < end and begin < each[2]
                    ),
                    None,
                )
                others.append((task, begin, end))
                if other is None:
                    continue
                assert grad is not None
                if storage not in start_storages:
                    _raise_reused(other[0], task, index, grad, of)
                own = changed.setdefault(task, list(row))
                own[index] = grad.clone(memory_format=torch.contiguous_format)
    return changed


def _raise_reused(earlier: int, task: int, index: int, grad: Tensor, of: str) -> None:
    if earlier == BEFORE:
        what, remedy = (
            f"the gradient of {of} {index} in `.grad` before this step and "
            f"{'its own' if task == THIS_STEP else f'that of task {task}'}",
            "Call optimizer.zero_grad() before each step, or set `balancer.copy_gradients = True`.",
        )
    else:
        what, remedy = (
            f"the gradients of tasks {earlier} and {task} for {of} {index}",
            "Set `balancer.copy_gradients = True`.",
        )
    raise ValueError(
        f"Expected every backward pass to leave its gradients in memory of their own, but {what}, of shape "
        f"{list(grad.shape)}, lie in the same: the later pass has overwritten the former. "
        "torch.cuda.make_graphed_callables and autograd Functions that return a buffer which they keep do that. "
        f"{remedy}"
    )
