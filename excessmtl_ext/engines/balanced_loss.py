"""A balanced step as a scalar loss, for loops that call ``backward`` themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from excessmtl_ext.step import Losses, Step, WeightingRule
from excessmtl_ext.step_arguments import as_scale, loss_values, moves_weights


def balanced_loss(
    rule: WeightingRule, step: Step, losses: Losses, run: Callable[[Step], None]
) -> Tensor:
    """The weighted sum of the losses under the weights so far; its ``.backward()`` runs the step.

    Args:
        rule: Gives the weights.
        step: As read from ``losses``.
        losses: T scalar losses.
        run: Runs a step up to ``.grad``.

    Shape:
        Returns [], of the dtype of the losses.
    """
    values = loss_values(losses, rule.task_weights) if step.losses is None else step.losses
    total = (
        rule.task_weights * values.nan_to_num(0.0)
        if len(step.tasks) < rule.num_tasks
        else rule.task_weights * values
    ).sum()
    first = (
        losses
        if isinstance(losses, Tensor)
        else next((loss for loss in losses if loss is not None), total)
    )
    anchor = torch.zeros((), device=total.device, requires_grad=True)
    return _BalancedLoss.apply(anchor, rule, step, run, total.to(first.dtype))  # type: ignore[no-any-return]


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
        with torch.enable_grad():
            ctx.run(step)
        return (None,) * 5
