"""A balanced step task by task: what lives between ``accumulate`` and ``finish``, and how it becomes one step.

The new unnormalised weight of a task needs only its own risk, so its gradient is folded into a
running sum at once and dropped. The sum is kept relative to the largest log-weight so far, and
normalised when the last task is in: equal to the plain step in real arithmetic.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from excessmtl_ext import functional
from excessmtl_ext.engines.exact import norm_of, tasks_without_labels
from excessmtl_ext.passes.per_task import HeadGrads, backward_of_task, raise_if_reused
from excessmtl_ext.passes.targets import assign_grads, combine_targets
from excessmtl_ext.step import (
    Step,
    StreamedWeight,
    StreamingRule,
    TaskGrads,
    raise_argument_error,
    raise_if_nonfinite,
)
from excessmtl_ext.step_arguments import read_task

GivenScale: TypeAlias = Tensor | float | None
"""``grad_scale`` as it was given."""


class Stream:
    """A step under way: at most two buffers of P elements, whatever T is.

    Args:
        rule: Whose step it is.
        shared: The L shared parameters.
    """

    def __init__(self, rule: StreamingRule, shared: list[Tensor]) -> None:
        assert rule.layout is not None
        self._shared = shared
        self._layout = rule.layout
        is_wide = any(parameter.dtype == torch.float64 for parameter in shared)
        wide = torch.float64 if is_wide else torch.float32
        device = shared[0].device
        # [padded P]: sum of exp(log_weight_i - running_log_max) g_i
        self._running_sum = torch.zeros(rule.layout.padded_numel, dtype=wide, device=device)
        # [padded P]: sum of floor_i g_i, only where the weights have a floor
        floor = rule.min_weight
        has_floor = (max(floor) if isinstance(floor, tuple) else floor) > 0.0
        self._floored_sum = torch.zeros_like(self._running_sum) if has_floor else None
        self._running_log_max = torch.full((), float("-inf"), dtype=torch.float64, device=device)
        self._floored_log_max = self._running_log_max.clone()
        self._log_factors: Tensor | None = None  # [L], of the whole sum
        self._reached = [False] * len(shared)  # whether any task gave this parameter a gradient
        self._log_weights: dict[int, Tensor] = {}
        self._losses: dict[int, Tensor] = {}
        self._heads: list[HeadGrads] = []
        self._scale: GivenScale = None
        self._moves_weights = True
        rule.found_nonfinite.zero_()

    @property
    def tasks(self) -> list[int]:
        """The tasks taken in so far, in order."""
        return sorted(self._log_weights)

    def check_scale(self, grad_scale: GivenScale) -> None:
        """Raises ValueError where the loss scale is known to differ from that of the step's first task.

        Scales that are tensors on a GPU are compared by identity alone: to read them is to wait.
        """
        if not self._log_weights:
            self._scale = grad_scale
            return
        numbers = [_on_host(scale) for scale in (self._scale, grad_scale)]
        if None not in numbers and numbers[0] != numbers[1]:
            raise ValueError(
                f"Expected one `grad_scale` for all tasks of a step, but got {numbers[1]} after {numbers[0]}. Call "
                "finish() before the scale changes."
            )

    def check_heads(self, heads: HeadGrads) -> None:
        """Raises ValueError where the latest pass has overwritten a head's gradient of an earlier task."""
        rows = {task: grads for each in (*self._heads, heads) for task, grads in each.grads.items()}
        raise_if_reused(rows, of="the head's parameter")

    def __contains__(self, task: int) -> bool:
        return task in self._log_weights

    def take(
        self, rule: StreamingRule, step: Step, row: list[Tensor | None], heads: HeadGrads | None
    ) -> None:
        """Takes in the gradients of one task: ``step.task_grads``, and the same with None as ``row``."""
        grads = step.task_grads
        (task,) = step.tasks
        self._moves_weights = step.moves_weights
        if "losses" in rule.requires:
            step.losses = _loss_without_labels(step)
        try:
            weight = rule.stream_task(step)
        except RuntimeError as error:
            raise_argument_error(error)
            raise
        self._running_log_max = _fold(grads, weight, self._running_sum, self._running_log_max)
        floor = rule.min_weight[task] if isinstance(rule.min_weight, tuple) else 1.0
        if self._floored_sum is not None and floor > 0.0:
            log_floor = torch.full_like(weight.log_weight, math.log(floor))
            floored = StreamedWeight(log_floor, weight.log_scale)
            self._floored_log_max = _fold(grads, floored, self._floored_sum, self._floored_log_max)
        self._reached = [
            was or grad is not None for was, grad in zip(self._reached, row, strict=True)
        ]
        self._log_weights[task] = weight.log_weight
        if step.losses is not None:
            self._losses[task] = step.losses
        if heads is not None:
            self._heads.append(heads)

    def finish(self, rule: StreamingRule) -> Step:
        """Moves the weights and adds the weighted sum to ``.grad``, heads included."""
        step = Step(
            roots=[],
            tasks=self.tasks,
            shared=self._shared,
            losses=self._all_losses(rule),
            moves_weights=self._moves_weights,
        )
        step.has_no_labels = tasks_without_labels(rule, step)
        with torch.no_grad():
            self._log_factors = rule.stream_finish(step)
            if rule.nonfinite == "raise":
                raise_if_nonfinite(rule)
            self._combine(rule, step)
            for heads in self._heads:
                heads.add(rule.task_weights)
        return step

    def _all_losses(self, rule: StreamingRule) -> Tensor | None:
        """Returns the losses [T] in float64, NaN for absent tasks."""
        if "losses" not in rule.requires:
            return None
        values = torch.full_like(rule.task_weights, float("nan"))
        for task, loss in self._losses.items():
            values[task] = loss.reshape(())
        return values

    def _combine(self, rule: StreamingRule, step: Step) -> None:
        # Every present task's log-weight moved by one common constant when it was normalised.
        first = min(self._log_weights)
        shift = rule.log_task_weights[first] - self._log_weights[first]
        if step.has_no_labels is not None:  # those did not move
            for task, log_weight in self._log_weights.items():
                moved = rule.log_task_weights[task] - log_weight
                shift = torch.where(step.has_no_labels[task], shift, moved)
        common = 0.0 if self._log_factors is None else self._log_factors
        log_share = self._running_log_max + shift - rule.log_task_weights.logsumexp(0) + common
        if isinstance(rule.min_weight, tuple):  # each is part of the floored sum already
            total_floor, floor = sum(rule.min_weight), 1.0
        else:
            total_floor, floor = rule.num_tasks * rule.min_weight, rule.min_weight
        factors = [rule.weight_total * (1.0 - total_floor) * log_share.exp()]
        buffers = [self._running_sum]
        if self._floored_sum is not None:
            log_floored = self._floored_log_max + common
            factors.append(rule.weight_total * floor * log_floored.exp())
            buffers.append(self._floored_sum)
        sums = [part for each in buffers for part in self._layout.views(each)]
        flags = rule.found_nonfinite.any().expand(len(factors)).contiguous()
        row = [
            torch.empty_like(parameter) if was else None
            for parameter, was in zip(self._shared, self._reached, strict=True)
        ]
        targets = combine_targets(self._shared, [row])
        functional.weighted_sum_(
            sums,
            targets.outputs,
            self._layout,
            torch.stack(factors),
            found_nonfinite=flags,
            accumulate=targets.accumulate,
        )
        assign_grads(self._shared, targets)


def _loss_without_labels(step: Step) -> Tensor:
    """Returns [], the loss of a task; infinite where it is NaN and has a gradient: the step then does not count."""
    loss = step.losses
    assert loss is not None
    if loss.device.type == "cpu" and not bool(loss.isnan()):
        return loss
    return torch.where(loss.isnan() & (norm_of(step.task_grads.tensors) != 0), float("inf"), loss)


def _fold(
    grads: TaskGrads, weight: StreamedWeight, running_sum: Tensor, running_log_max: Tensor
) -> Tensor:
    """Adds the gradients of a task, times its weight and scale, to ``running_sum``; returns the running maximum."""
    log_factor, log_scale = weight
    if log_scale is not None:
        log_factor = log_factor + log_scale
    if log_factor.dim() > running_log_max.dim():  # the first one
        running_log_max = running_log_max.expand_as(log_factor).contiguous()
    functional.fold_(
        grads.tensors, grads.layout, log_factor.contiguous(), running_sum, running_log_max
    )
    return running_log_max


def _on_host(scale: GivenScale) -> float | None:
    """Returns the scale as a number; None where reading it would wait for a GPU."""
    if isinstance(scale, Tensor):
        return float(scale) if scale.device.type == "cpu" and scale.numel() == 1 else None
    return 1.0 if scale is None else float(scale)


def accumulate(
    rule: StreamingRule,
    stream: Stream | None,
    task: int,
    loss: Tensor,
    *,
    retain_graph: bool,
    grad_scale: GivenScale,
) -> Stream:
    """Runs the pass of one task and takes its gradient in; begins the stream with its first task."""
    _check_task(rule, stream, task)
    if stream is not None:
        stream.check_scale(grad_scale)
    step = read_task(rule, task, loss, grad_scale, retain_graph=retain_graph)
    (start,) = step.starts
    assert start is not None
    heads = None
    if rule.head_weighting == "task_weights":
        heads = HeadGrads.of([None] * task + [loss], step.shared)
    (row,), tensors = backward_of_task(
        task,
        loss,
        start,
        step.shared,
        heads=heads,
        retain_graph=retain_graph,
        copy=step.copy_gradients,
        stacker=rule.engine.stacker,
    )
    if heads is not None and stream is not None:
        stream.check_heads(heads)
    with torch.no_grad():
        assert rule.layout is not None
        step.task_grads = TaskGrads(tensors, rule.layout, [task])
        for observer in rule.observers:
            if observer.wants_gradients:
                observer.on_gradients(rule, step)
        if stream is None:
            stream = Stream(rule, step.shared)
            stream.check_scale(grad_scale)
        stream.take(rule, step, row, heads)
    return stream


def _check_task(rule: StreamingRule, stream: Stream | None, task: int) -> None:
    """Raises unless ``rule`` can take in ``task`` as the next one of a streamed step."""
    if not rule.can_stream:
        raise NotImplementedError(
            rule.engine.stream_obstacle
            or f"{type(rule).__name__} cannot stream: the weight of one task depends on the gradients of the others, "
            "so all must live at once. Call backward(losses), or update_weights() with your own gradients."
        )
    if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < rule.num_tasks:
        raise ValueError(f"Expected `task` between 0 and {rule.num_tasks - 1}, but got {task!r}.")
    if stream is not None and task in stream:
        raise ValueError(
            f"Expected each task once per step, but got task {task} again. Call finish() to end the step."
        )
