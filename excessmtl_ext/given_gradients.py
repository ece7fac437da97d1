"""Gradients that are given instead of losses: checked, and brought into the form of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from excessmtl_ext.arguments import refuse_fake, shortened
from excessmtl_ext.passes.per_task import flat_rows, raise_sparse
from excessmtl_ext.state import ParamLayout
from excessmtl_ext.step import Step, TaskGrads, WeightingRule
from excessmtl_ext.step_arguments import as_scale, moves_weights

GivenGrads: TypeAlias = Sequence[Sequence[Tensor | None]] | Tensor
"""T lists of L gradients (None where there is none; an empty list for an absent task), or one tensor [T, P]."""

Row: TypeAlias = list[Tensor | None]


def read_given(
    rule: WeightingRule,
    task_grads: GivenGrads | None,
    losses: Sequence[Tensor | None] | Tensor | None,
    grad_scale: Tensor | float | None,
) -> Step:
    """Checks the arguments of ``update_weights``; what the rule does not require is not looked at.

    Raises:
        ValueError: what the rule requires is missing, or does not fit.
    """
    scale = None if grad_scale is None else as_scale(grad_scale, rule.task_weights.device)
    for name, given in (("task_grads", task_grads), ("losses", losses)):
        if given is None and name in rule.requires:
            raise ValueError(
                f"Expected `{name}`: {type(rule).__name__} computes its weights from them."
            )
    refuse_fake(next(iter(rule.shared_parameters or ()), None))
    step = Step(
        roots=[],
        tasks=list(range(rule.num_tasks)),
        shared=[],
        grad_scale=scale,
        moves_weights=moves_weights(rule),
    )
    if losses is not None and "losses" in rule.requires:
        step.losses = _checked_losses(losses, rule.num_tasks)
        if not isinstance(losses, Tensor):
            step.tasks = [task for task, loss in enumerate(losses) if loss is not None]
    if task_grads is not None and "task_grads" in rule.requires:
        step.task_grads, step.tasks = given_task_grads(rule, task_grads)
    return step


def given_task_grads(rule: WeightingRule, task_grads: GivenGrads) -> tuple[TaskGrads, list[int]]:
    """Returns the given gradients of all tasks as the ops take them, and the tasks that have some.

    A rule that does not know the sizes of its parameters takes them from here.

    Raises:
        ValueError: the number of tasks, of gradients, or a size is not as expected.
    """
    if rule.frozen_parameters and not isinstance(task_grads, Tensor):
        num_given = len(rule.shared_parameters or ()) + len(rule.frozen_parameters)
        task_grads = [
            [grad for index, grad in enumerate(row) if index not in rule.frozen_parameters]
            if len(row) == num_given
            else row
            for row in task_grads
        ]
    rows, rule.layout = checked_rows(task_grads, rule.num_tasks, rule.layout)
    tasks = [task for task, row in enumerate(rows) if any(grad is not None for grad in row)]
    if rule.layout is None:
        return TaskGrads([], ParamLayout([]), range(rule.num_tasks)), []
    return TaskGrads(flat_rows(rows), rule.layout, range(rule.num_tasks)), tasks


def _checked_losses(losses: Sequence[Tensor | None] | Tensor, num_tasks: int) -> Tensor:
    """Returns the losses [T], where and as they were given: on a GPU none is fetched. NaN for an absent task."""
    if isinstance(losses, Tensor):
        values = losses.detach()
    else:
        tensors = [loss for loss in losses if isinstance(loss, Tensor)]
        nan = torch.full((), float("nan"), device=tensors[0].device if tensors else "cpu")
        given = [nan if loss is None else loss for loss in losses]
        if given and all(isinstance(loss, Tensor) and loss.device == nan.device for loss in given):
            values = torch.stack([loss.detach().reshape(()) for loss in given])
        else:
            values = torch.tensor(
                [float(loss) for loss in given], dtype=torch.float64, device="cpu"
            )
    if values.shape != (num_tasks,):
        raise ValueError(f"Expected `losses` of shape [{num_tasks}], but got {list(values.shape)}.")
    return values


def checked_rows(
    task_grads: GivenGrads, num_tasks: int, layout: ParamLayout | None
) -> tuple[list[Row], ParamLayout | None]:
    """Returns T rows of L detached gradients and the L sizes, which stay as they were where no task has a gradient.

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
    """Returns a row per task, all of one length; a tensor [T, P] gives rows of one gradient."""
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
    for row in rows:
        raise_sparse(row)
    refuse_fake(next((grad for row in rows for grad in row if grad is not None), None))
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
