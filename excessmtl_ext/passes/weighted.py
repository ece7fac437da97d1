"""Passes that only apply weights: shared parameters get their weighted sum, heads their own gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from excessmtl_ext.passes.cut import Cut
from excessmtl_ext.passes.explain import raise_explained
from excessmtl_ext.passes.heads import HeadGraph
from excessmtl_ext.passes.per_task import (
    HeadGrads,
    backward_per_task,
    run_backward,
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
    """Runs passes for given weights: shared ``.grad`` gets sum_i a_i g_i, heads their own gradient or a multiple of it.

    One pass from all losses, in which what a task's own graph hands on is multiplied by its weight;
    heads lie above that. Where a parameter that is not shared lies below, as behind a tensor that
    holds the outputs of all tasks, one pass that ends at these parameters and one to the shared ones.

    Args:
        step: Gives roots, shared parameters, scale and features; what is computed is added to ``.grad``.
        task_weights: [T] weights.
        head_weights: [T] factors of the head gradients; ``task_weights`` itself where they are the same; None: 1.
        is_uniform: Whether all weights are known to be equal.
        graph: Of the step's roots, where it is known already; with its borders if heads are not weighted.
    """
    if not step.tasks:
        return
    if step.features is not None and head_weights is None and not is_uniform:
        cut = Cut(step.roots, step.features, step.shared, retain_graph=step.retain_graph)
        if cut.obstacle is None:
            _apply_at_cut(cut, step, task_weights)
            return
    present = [root for root in step.roots if root is not None]
    starts = [start for start in step.starts if start is not None]
    keep = step.retain_graph
    if head_weights is task_weights:
        starts = weighted_starts(starts, step.tasks, task_weights)
        run_backward(present, starts, retain_graph=keep)
        return
    if head_weights is None and (is_uniform or len(step.tasks) == 1):
        weight = task_weights[step.tasks[0]]
        uniform_backward(present, starts, step.shared, weight, retain_graph=keep)
        return
    graph = graph or HeadGraph(step.roots, step.shared, finds_borders=head_weights is None)
    if graph.hides and graph.borders is None:
        _pass_per_task(step, task_weights, head_weights)
        return
    if head_weights is not None:
        if graph.heads:
            heads = weighted_starts(starts, step.tasks, head_weights)
            run_backward(present, heads, retain_graph=True, inputs=graph.heads)
        starts = weighted_starts(starts, step.tasks, task_weights)
        run_backward(present, starts, retain_graph=keep, inputs=_training(step))
        return
    if graph.borders is not None:
        _pass_weighted_at(graph.borders, present, starts, task_weights, retain_graph=keep)
    else:
        if graph.heads:
            run_backward(present, starts, retain_graph=True, inputs=graph.heads)
        starts = weighted_starts(starts, step.tasks, task_weights)
        run_backward(present, starts, retain_graph=keep, inputs=_training(step))


def _training(step: Step) -> list[Tensor]:
    """Lists the shared parameters that are not frozen in this step."""
    return [parameter for parameter in step.shared if parameter.requires_grad]


def _apply_at_cut(cut: Cut, step: Step, task_weights: Tensor) -> None:
    """Applies weights to the shared gradients only: one pass where heads have no node in common."""
    if cut.heads_are_apart:
        _pass_weighted_at(
            cut.entries,
            [root for root in step.roots if root is not None],
            [start for start in step.starts if start is not None],
            task_weights.to(cut.features[0].dtype),
            retain_graph=step.retain_graph,
        )
        return
    feature_grads, head_grads = cut.walk_heads(step)
    cut.walk_encoder_weighted(feature_grads, task_weights)
    cut.deposit_heads(head_grads)


def _pass_weighted_at(
    borders: Sequence[Sequence[tuple[Node, Sequence[int]]]],
    roots: Sequence[Root],
    starts: Sequence[Tensor],
    task_weights: Tensor,
    *,
    retain_graph: bool,
) -> None:
    """Runs one pass in which gradients that leave a task's own graph are multiplied by its weight."""
    handles = [
        node.register_hook(_scaling(positions, weight))
        for border, weight in zip(borders, task_weights.unbind(), strict=True)
        for node, positions in border
    ]
    try:
        torch.autograd.backward(
            roots,  # type: ignore[arg-type]
            grad_tensors=starts,
            retain_graph=retain_graph,
        )
    except RuntimeError as error:
        raise_explained(error)
        raise
    finally:
        for handle in handles:
            handle.remove()


def _scaling(
    positions: Sequence[int], weight: Tensor
) -> Callable[[Sequence[Tensor | None], Sequence[Tensor | None]], tuple[Tensor | None, ...]]:
    """Makes a node's hook that multiplies what it passes on at ``positions`` by ``weight``."""

    def scale(
        grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        return tuple(
            grad * weight.to(grad.dtype) if index in positions and grad is not None else grad
            for index, grad in enumerate(grad_inputs)
        )

    return scale


def _pass_per_task(step: Step, task_weights: Tensor, head_weights: Tensor | None) -> None:
    """Runs a pass per task, as a pass inside a node cannot be told where to end; weighs heads where asked to."""
    heads = None if head_weights is None else HeadGrads.of(step.roots, step.shared)
    rows, _ = backward_per_task(
        step.roots,
        step.starts,
        step.shared,
        heads=heads,
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
    if heads is not None and head_weights is not None:
        heads.add(head_weights)
