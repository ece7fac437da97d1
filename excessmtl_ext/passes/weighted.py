"""The one pass of a step that only applies weights: shared parameters get their sum, heads their own gradient."""

from __future__ import annotations

from torch import Tensor

from excessmtl_ext.passes.cut import Cut
from excessmtl_ext.passes.per_task import (
    HeadGrads,
    backward_per_task,
    run_backward,
    starts_of,
    uniform_backward,
    weighted_starts,
)
from excessmtl_ext.step import Step


def apply_weights(
    step: Step, task_weights: Tensor, *, weighted_heads: bool, is_uniform: bool = False
) -> None:
    """One pass for given weights: shared ``.grad`` gets sum_i a_i g_i, heads their own gradient (or a_i times it).

    Args:
        step: Gives roots, shared parameters, scale and features; what is computed is added to ``.grad``.
        task_weights: [T] weights.
        weighted_heads: Whether head gradients carry the task's weight too.
        is_uniform: Whether all weights are known to be equal.
    """
    if not step.tasks:
        return
    if step.features is not None and not weighted_heads and not is_uniform:
        cut = Cut(step.roots, step.features, step.shared)
        if cut.obstacle is None:  # saves dividing head gradients
            cut.weighted_backward(step.roots, task_weights, scale=step.grad_scale)
            return
    present = [root for root in step.roots if root is not None]
    starts = [start for start in starts_of(step.roots, step.grad_scale) if start is not None]
    if weighted_heads:
        run_backward(present, weighted_starts(starts, step.tasks, task_weights), retain_graph=False)
    elif is_uniform:
        uniform_backward(present, starts, step.shared, task_weights[0])
    else:
        heads = HeadGrads.of(step.roots, step.shared)
        if heads.reached_by_several:
            # Such a parameter is owed the plain sum over its tasks, which no single weighted pass gives.
            _pass_per_task(step, task_weights)
        else:
            heads.divided_backward(present, starts, step.tasks, task_weights)


def _pass_per_task(step: Step, task_weights: Tensor) -> None:
    rows, _ = backward_per_task(step.roots, step.shared, scale=step.grad_scale)
    for index, parameter in enumerate(step.shared):
        total = parameter.grad
        for task in step.tasks:
            grad = rows[task][index]
            if grad is not None:
                scaled = grad * task_weights[task].to(grad.dtype)
                total = scaled if total is None else total.add_(scaled)
        parameter.grad = total
