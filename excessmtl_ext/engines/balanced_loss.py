"""A balanced step as a scalar loss, for loops that call ``backward`` themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from excessmtl_ext.passes.capture import nodes_of
from excessmtl_ext.step import Root, Step, WeightingRule
from excessmtl_ext.step_arguments import as_scale, loss_values, moves_weights, starts_of


def balanced_loss(
    rule: WeightingRule,
    step: Step,
    losses: Tensor | Sequence[Tensor | None],
    run: Callable[[Step], None],
) -> Tensor:
    """Sums the losses under the weights so far; the ``.backward()`` of the sum runs the step.

    A loss that is NaN is left out of the value: that of a task without labels in this batch.

    Args:
        rule: Gives the weights.
        step: As read from ``losses``.
        losses: T scalar losses.
        run: Runs a step up to ``.grad``.

    Shape:
        Returns [], of the dtype of the losses.
    """
    values = loss_values(losses, rule.task_weights) if step.losses is None else step.losses
    is_nan = values.isnan()
    total = torch.where(is_nan, 0.0, rule.task_weights * values).sum()
    total = torch.where(is_nan.all(), float("nan"), total)
    first = (
        losses
        if isinstance(losses, Tensor)
        else next((loss for loss in losses if loss is not None), total)
    )
    anchor = torch.zeros((), device=total.device, requires_grad=True)
    loss: Tensor = _BalancedLoss.apply(anchor, rule, step, run, total.to(first.dtype))  # type: ignore[assignment]
    loss.register_hook(_refusing_other_inputs(get_gradient_edge(anchor).node))
    return loss


def _refusing_other_inputs(anchor: Node) -> Callable[[Tensor], None]:
    """Makes a hook of the scalar that raises where a pass is asked for certain inputs only: no step would run."""

    def check(grad: Tensor) -> None:
        if not torch._C._will_engine_execute_node(anchor):  # pyright: ignore[reportPrivateUsage]
            raise RuntimeError(
                "Expected balancer(losses).backward() without `inputs`, and no torch.autograd.grad() of it: the step "
                "writes .grad of all shared and head parameters, and its gradients are not those of one scalar. Call "
                "backward() and read .grad, or give gradients of your own to update_weights()."
            )

    return check


def _is_visited_later(roots: Sequence[Root | None]) -> bool:
    """Tells whether the pass under way goes on to a node that ``roots`` need, as with an auxiliary loss."""
    return any(
        torch._C._will_engine_execute_node(node)  # pyright: ignore[reportPrivateUsage]
        for node in nodes_of(root for root in roots if root is not None)
        if not hasattr(node, "variable")
    )


class _BalancedLoss(torch.autograd.Function):
    """Runs a step in its backward pass; the incoming gradient is the loss scale."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        rule: WeightingRule,
        step: Step,
        run: Callable[[Step], None],
        total: Tensor,
    ) -> Tensor:
        ctx.rule, ctx.step, ctx.run = rule, step, run
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, ...]:
        scale: Tensor | None = as_scale(grad_outputs[0], ctx.rule.task_weights.device)
        if scale.device.type == "cpu" and scale.item() == 1.0:
            scale = None  # what .backward() starts with; elsewhere a look would wait for the device
        # A copy, as what the step sets would live as long as the graph.
        step = replace(ctx.step, grad_scale=scale, moves_weights=moves_weights(ctx.rule))
        if scale is not None:
            step.starts = starts_of(step.roots, scale)
        step.retain_graph = (
            step.retain_graph
            or torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore
            or _is_visited_later(step.roots)
        )
        with torch.enable_grad():
            ctx.run(step)
        return (None,) * 5
