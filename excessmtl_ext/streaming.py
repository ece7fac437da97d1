"""A balanced step task by task: what lives between ``accumulate`` and ``finish``, and how it becomes one step.

The new unnormalised weight of a task needs only its own risk, so its gradient is folded into a
running sum at once and dropped. The sum is kept relative to the largest log-weight so far, and
normalised when the last task is in: equal to the plain step in real arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from excessmtl_ext import functional, gradients
from excessmtl_ext.functional import ParamLayout

if TYPE_CHECKING:
    from excessmtl_ext.balancer import Balancer


@dataclass
class Stream:
    """What lives between ``accumulate`` and ``finish``: at most two buffers of P elements, whatever T is."""

    running_sum: Tensor  # [padded P]: sum of exp(log_weight_i - running_log_max) g_i
    plain_sum: Tensor | None  # [padded P]: sum of g_i, only where the weights have a floor
    running_log_max: Tensor  # []
    reached: list[bool]  # [L]: whether any task gave this parameter a gradient
    log_weights: dict[int, Tensor] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)
    heads: list[gradients.HeadGrads] = field(default_factory=list)

    @property
    def tasks(self) -> list[int]:
        """The tasks taken in so far, in order."""
        return sorted(self.log_weights)


def begin(balancer: Balancer) -> Stream:
    """A step that no task has entered yet."""
    layout, shared = balancer._bound_layout(), balancer._bound_parameters()
    wide = (
        torch.float64
        if any(parameter.dtype == torch.float64 for parameter in shared)
        else torch.float32
    )
    device = shared[0].device
    balancer.found_nonfinite.zero_()
    return Stream(
        running_sum=torch.zeros(layout.padded_numel, dtype=wide, device=device),
        plain_sum=torch.zeros(layout.padded_numel, dtype=wide, device=device)
        if balancer._min_weight() > 0
        else None,
        running_log_max=torch.full((), float("-inf"), dtype=torch.float64, device=device),
        reached=[False] * len(shared),
    )


def check_task(balancer: Balancer, task: int) -> None:
    """Raises unless ``balancer`` can take in ``task`` as the next one of a streamed step."""
    if not balancer.can_stream:
        raise NotImplementedError(
            f"{type(balancer).__name__} cannot stream: {balancer.cannot_stream_because}. "
            "Call backward(losses), or update_weights() with your own gradients."
        )
    if balancer._data_parallel is not None:
        raise NotImplementedError(
            "accumulate() works in one process: with several ranks call backward(losses), which holds two "
            "gradients and 1 / W of the others at a time."
        )
    if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < balancer.num_tasks:
        raise ValueError(
            f"Expected `task` between 0 and {balancer.num_tasks - 1}, but got {task!r}."
        )
    if balancer._stream is not None and task in balancer._stream.log_weights:
        raise ValueError(
            f"Expected each task once per step, but got task {task} again. Call finish() to end the step."
        )


def accumulate(
    balancer: Balancer, task: int, loss: Tensor, *, retain_graph: bool, scale: Tensor | None
) -> None:
    """Runs the pass of one task and takes its gradient in; begins the step with its first task."""
    shared = balancer._bound_parameters()
    heads = None
    if balancer.head_weighting == "task_weights":
        heads = gradients.HeadGrads(gradients.head_leaves([None] * task + [loss], shared))
    with gradients.set_aside_grads([*shared, *(heads.all_parameters() if heads else ())]):
        gradients.run_backward([loss], [gradients.start_of(loss, scale)], retain_graph=retain_graph)
        grads = gradients.take_grads(shared)
        gradients.check_reached(grads, task)
        if heads is not None:
            heads.take(task)
    with torch.no_grad():
        flat = gradients.flattened(grads)
        balancer._prepare(flat)
        balancer._record_gradients(flat, [task], scale)
        if balancer._stream is None:
            balancer._stream = begin(balancer)
        stream, layout = balancer._stream, balancer._bound_layout()
        log_weight = balancer._call_op(balancer._stream_task, task, flat, loss.detach(), scale)
        functional.fold_(flat, layout, log_weight, stream.running_sum, stream.running_log_max)
        if stream.plain_sum is not None:
            zero = torch.zeros_like(log_weight)
            functional.fold_(flat, layout, zero, stream.plain_sum, zero.clone())
        stream.reached = [
            was or grad is not None for was, grad in zip(stream.reached, grads, strict=True)
        ]
        stream.log_weights[task] = log_weight
        stream.losses[task] = loss.detach()
        if heads is not None:
            stream.heads.append(heads)


def combine(balancer: Balancer, stream: Stream) -> None:
    """Adds the weighted sum of a finished stream's gradients to ``.grad``, heads included."""
    # Every present task's log-weight moved by one common constant when it was normalised.
    first = stream.tasks[0]
    shift = balancer.log_task_weights[first] - stream.log_weights[first]
    share = (stream.running_log_max + shift - balancer.log_task_weights.logsumexp(0)).exp()
    floor = balancer._min_weight()
    factors = [balancer.weight_total * (1.0 - balancer.num_tasks * floor) * share]
    layout, shared = balancer._bound_layout(), balancer._bound_parameters()
    sums = _segments(stream.running_sum, layout)
    if stream.plain_sum is not None:
        factors.append(torch.full_like(share, balancer.weight_total * floor))
        sums += _segments(stream.plain_sum, layout)
    flags = balancer.found_nonfinite.any().expand(len(factors)).contiguous()
    shape_like = [
        parameter if was else None for parameter, was in zip(shared, stream.reached, strict=True)
    ]
    outputs, adds = gradients.combine_targets(
        shared, [[None if p is None else torch.empty_like(p) for p in shape_like]]
    )
    functional.weighted_sum_(
        sums,
        outputs,
        layout,
        torch.stack(factors),
        found_nonfinite=flags,
        accumulate=adds,
    )
    gradients.assign_grads(shared, outputs)
    for heads in stream.heads:
        heads.add(balancer.task_weights)


def _segments(flat: Tensor, layout: ParamLayout) -> list[Tensor]:
    """The parameters' parts of a flat padded vector, as views."""
    return list(functional.segments(flat, layout.param_numels))
