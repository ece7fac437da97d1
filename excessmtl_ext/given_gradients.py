"""Gradients that a caller hands over instead of losses: checked, and brought into one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from excessmtl_ext.arguments import shortened
from excessmtl_ext.functional import ParamLayout

GivenGrads: TypeAlias = Sequence[Sequence[Tensor | None]] | Tensor
"""T lists of L gradients (None where there is none; an empty list for an absent task), or one tensor [T, P]."""

Row: TypeAlias = list[Tensor | None]


def checked_rows(
    task_grads: GivenGrads, num_tasks: int, layout: ParamLayout | None
) -> tuple[list[Row], ParamLayout | None]:
    """T rows of L detached gradients, and the sizes of the L parameters; as they were where no task has a gradient.

    Args:
        task_grads: What the caller has.
        num_tasks: T.
        layout: The sizes that the balancer knows; None before its first gradients, which then tell.

    Raises:
        ValueError: the number of tasks, of gradients, or a size is not as expected.
    """
    rows = _rows(task_grads, num_tasks)
    if not rows[0]:  # all tasks are absent, and nothing is learned of the parameters
        return [[None] * (0 if layout is None else len(layout.numels)) for _ in rows], layout
    if isinstance(task_grads, Tensor) and layout is not None and len(layout.numels) != 1:
        rows = [_split(row[0], layout) for row in rows if row[0] is not None]
    numels = [
        next((row[index].numel() for row in rows if row[index] is not None), None)  # type: ignore[union-attr]
        for index in range(len(rows[0]))
    ]
    if layout is None:
        if None in numels:
            raise ValueError(
                f"Expected `task_grads` with a gradient for every parameter in the first step, but parameter "
                f"{numels.index(None)} has none. Give the balancer its shared parameters, or pass zeros once."
            )
        layout = ParamLayout([numel for numel in numels if numel is not None])
    known = layout.numels
    if len(numels) != len(known) or any(
        numel is not None and numel != expected
        for numel, expected in zip(numels, known, strict=True)
    ):
        raise ValueError(
            f"`task_grads` has parameters of sizes {shortened(numels)}, but this balancer has accumulated "
            f"{shortened(known)}. Call reset() to start on a new model."
        )
    return rows, layout


def _rows(task_grads: GivenGrads, num_tasks: int) -> list[Row]:
    """A row per task, all of one length; a tensor [T, P] gives rows of one gradient."""
    if isinstance(task_grads, Tensor):
        if task_grads.dim() != 2 or task_grads.shape[0] != num_tasks:
            raise ValueError(
                f"Expected `task_grads` of shape [{num_tasks}, P], but got {list(task_grads.shape)}."
            )
        return [[row] for row in task_grads.detach().unbind()]
    if len(task_grads) != num_tasks:
        raise ValueError(
            f"Expected `task_grads` to hold {num_tasks} lists, one per task, but got {len(task_grads)}."
        )
    rows: list[Row] = [
        [None if grad is None else grad.detach() for grad in grads] for grads in task_grads
    ]
    num_tensors = max(len(row) for row in rows)
    for task, row in enumerate(rows):
        if row and len(row) != num_tensors:
            raise ValueError(
                f"Expected `task_grads[{task}]` to hold {num_tensors} gradients, but got {len(row)}."
            )
    return [row or [None] * num_tensors for row in rows]


def _split(row: Tensor, layout: ParamLayout) -> Row:
    if row.numel() != layout.num_params:
        raise ValueError(
            f"`task_grads` has {row.numel()} columns, but this balancer has accumulated {layout.num_params}. "
            "Call reset() to start on a new model."
        )
    return list(row.split(list(layout.numels)))
