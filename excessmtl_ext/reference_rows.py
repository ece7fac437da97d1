"""Gradients and state of one task as :mod:`excessmtl_ext.reference` goes through them, and what it checks of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from excessmtl_ext.state import ParamLayout, StepOptions, StepState, segments
from excessmtl_ext.stochastic_rounding import rounding_words, stochastically_rounded


def check_task_grads(
    task_grads: Sequence[Tensor], layout: ParamLayout, num_tasks: int, state: Tensor
) -> None:
    """Checks what the compiled ops check, in their words; ``state`` must hold the gradients' precision."""
    numels = layout.numels
    if len(task_grads) != num_tasks * len(numels):
        raise RuntimeError(
            f"Expected `task_grads` to hold {num_tasks} tasks x {len(numels)} parameters = {num_tasks * len(numels)} "
            f"tensors, but got {len(task_grads)}."
        )
    for k, grad in enumerate(task_grads):
        task, index = divmod(k, len(numels))
        if grad.numel() not in (0, numels[index]):
            raise RuntimeError(
                f"Expected `task_grads` of task {task}, parameter {index} to have {numels[index]} elements, but got "
                f"{grad.numel()}."
            )
        if grad.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise RuntimeError(
                f"Expected `task_grads` of float64, float32, bfloat16 or float16, but got {grad.dtype}."
            )
        if grad.dtype == torch.float64 and state.dtype != torch.float64 and grad.numel() > 0:
            raise RuntimeError(
                f"Expected `sq_grad_sum` of float64 for float64 gradients, but got {state.dtype}."
            )


def grads_of_row(task_grads: Sequence[Tensor], task: int, layout: ParamLayout) -> Sequence[Tensor]:
    num_tensors = len(layout.numels)
    return task_grads[task * num_tensors : (task + 1) * num_tensors]


def present_rows(task_grads: Sequence[Tensor], num_tasks: int, layout: ParamLayout) -> list[int]:
    return [
        task
        for task in range(num_tasks)
        if any(grad.numel() > 0 for grad in grads_of_row(task_grads, task, layout))
    ]


class Segment(NamedTuple):
    """One parameter's part of a task's row, with the gradient as the state's arithmetic sees it."""

    number: int
    grad: Tensor
    sq_grad_sum: Tensor
    grad_mean: Tensor | None
    random_bits: Tensor | None  # of bfloat16 state

    def store_sum(self, values: Tensor) -> None:
        bits = self.random_bits
        self.sq_grad_sum.copy_(
            values if bits is None else stochastically_rounded(values, bits & 0xFFFF)
        )

    def store_mean(self, values: Tensor) -> None:
        assert self.grad_mean is not None
        bits = self.random_bits
        self.grad_mean.copy_(values if bits is None else stochastically_rounded(values, bits >> 16))


def row_segments(
    task_grads: Sequence[Tensor],
    row: int,
    layout: ParamLayout,
    sq_grad_sum: Tensor,
    grad_mean: Tensor,
    options: StepOptions,
    grad_scale: Tensor | None,
    state: StepState | None,
    first_task: int,
) -> Iterator[Segment]:
    """Yields the parts of a row that have a gradient: in the accumulation type, divided by ``grad_scale``."""
    wide = torch.promote_types(sq_grad_sum.dtype, torch.float32)
    nothing = [None] * len(layout.numels)
    words = nothing
    if sq_grad_sum.dtype == torch.bfloat16:
        assert state is not None
        row_words = rounding_words(
            options.rounding_seed,
            int(state.num_steps),
            first_task + row,
            sq_grad_sum.shape[1],
            device=sq_grad_sum.device,
        )
        words = segments(row_words, layout.param_numels)
    has_momentum = options.gradient_momentum > 0
    means = segments(grad_mean[row], layout.param_numels) if has_momentum else nothing
    grads = grads_of_row(task_grads, row, layout)
    sums = segments(sq_grad_sum[row], layout.param_numels)
    parts = zip(grads, sums, means, words, strict=True)
    for index, (grad, sq_sum, mean, bits) in enumerate(parts):
        if grad.numel() == 0:
            continue
        g = grad.reshape(-1).to(wide)
        if grad_scale is not None:
            g = g * grad_scale.to(g).reciprocal()
        yield Segment(index, g, sq_sum, mean, bits)


def check_rounding(sq_grad_sum: Tensor, state: StepState | None) -> None:
    if sq_grad_sum.dtype == torch.bfloat16 and state is None:
        raise RuntimeError(
            "Expected `num_steps` and `num_skipped_steps` with bfloat16 state: its rounding draws from them. Pass "
            "those of the state."
        )
