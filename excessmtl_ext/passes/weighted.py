"""Passes that only apply weights: shared parameters get their weighted sum, heads their own gradient."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import Node

from excessmtl_ext.passes.cut import Cut
from excessmtl_ext.passes.heads import HeadGraph
from excessmtl_ext.passes.node_hooks import scaling
from excessmtl_ext.passes.per_task import (
    backward_per_task,
    run_backward,
    starts_of,
    uniform_backward,
    weighted_starts,
)
from excessmtl_ext.step import Root, Step


def apply_weights(
    step: Step,
    task_weights: Tensor,
    *,
    head_weights: Tensor | None,
    is_uniform: bool = False,
    graph: HeadGraph | None = None,
) -> None:
    """Passes for given weights: shared ``.grad`` gets sum_i a_i g_i, heads their own gradient or a multiple of it.

    One pass from all losses, in which what a task's own graph hands on is multiplied by its weight;
    heads lie above that. Where a parameter that is not shared lies below, as behind a tensor that
    holds the outputs of all tasks, one pass that ends at these parameters and one to the shared ones.

    Args:
        step: Gives roots, shared parameters, scale and features; what is computed is added to ``.grad``.
        task_weights: [T] weights.
        head_weights: [T] factors of the head gradients; ``task_weights`` itself where they are the same; None: 1.
        is_uniform: Whether all weights are known to be equal.
        graph: Of the step's roots, where it is known already.
    """
    if not step.tasks:
        return
    if step.features is not None and head_weights is None and not is_uniform:
        cut = Cut(step.roots, step.features, step.shared, retain_graph=step.retain_graph)
        if cut.obstacle is None:
            cut.weighted_backward(step, task_weights)
            return
    present = [root for root in step.roots if root is not None]
    starts = [start for start in starts_of(step.roots, step.grad_scale) if start is not None]
    keep = step.retain_graph
    if head_weights is task_weights:
        starts = weighted_starts(starts, step.tasks, task_weights)
        run_backward(present, starts, retain_graph=keep)
        return
    if head_weights is None and (is_uniform or len(step.tasks) == 1):
        weight = task_weights[step.tasks[0]]
        uniform_backward(present, starts, step.shared, weight, retain_graph=keep)
        return
    graph = graph or HeadGraph(step.roots, step.shared)
    if head_weights is not None:
        if graph.heads:
            heads = weighted_starts(starts, step.tasks, head_weights)
            run_backward(present, heads, retain_graph=True, inputs=graph.heads)
        starts = weighted_starts(starts, step.tasks, task_weights)
        run_backward(present, starts, retain_graph=keep, inputs=step.shared)
        return
    borders = None if graph.unseen is not None else graph.borders()
    if borders is not None:
        _pass_weighted_at(borders, present, starts, task_weights, retain_graph=keep)
    elif graph.hides:
        _pass_per_task(step, task_weights)
    else:
        if graph.heads:
            run_backward(present, starts, retain_graph=True, inputs=graph.heads)
        starts = weighted_starts(starts, step.tasks, task_weights)
        run_backward(present, starts, retain_graph=keep, inputs=step.shared)


def _pass_weighted_at(
    borders: Sequence[Sequence[tuple[Node, Sequence[int]]]],
    roots: Sequence[Root],
    starts: Sequence[Tensor],
    task_weights: Tensor,
    *,
    retain_graph: bool,
) -> None:
    """One pass in which what crosses the border of a task's own graph is multiplied by its weight."""
    handles = [
        node.register_hook(scaling(positions, weight))
        for border, weight in zip(borders, task_weights.unbind(), strict=True)
        for node, positions in border
    ]
    try:
        run_backward(roots, starts, retain_graph=retain_graph)
    finally:
        for handle in handles:
            handle.remove()


def _pass_per_task(step: Step, task_weights: Tensor) -> None:
    """A pass per task, which needs to know no head: each gets its own gradient as it comes."""
    rows, _ = backward_per_task(
        step.roots,
        step.shared,
        scale=step.grad_scale,
        retain_graph=step.retain_graph,
        copy=step.copy_gradients,
    )
    for index, parameter in enumerate(step.shared):
        total: Tensor | None = None
        for task in step.tasks:
            grad = rows[task][index]
            if grad is not None:
                scaled = grad * task_weights[task].to(grad.dtype)
                total = scaled if total is None else total.add_(scaled)
        if total is not None:
            parameter.grad = total if parameter.grad is None else parameter.grad.add_(total)
