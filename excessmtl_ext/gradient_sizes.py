r"""Task gradients brought to one size before they are summed, tensor by tensor.

Among raw gradients a layer follows whichever task has the larger ones in it, and a unit, a hard
task or label noise makes gradients large. Here the gradient of task i for tensor l is multiplied by

.. math:: f_{il} = \alpha_i \sqrt{\max_k n_{kl} / n_{il}}

with the running mean square :math:`n_{il}` of its elements. Every task then pulls at a tensor with
its weight, whatever the size of its loss. The size taken is the largest one, so that equal sizes
give the plain sum, and no task's pull against weight decay becomes smaller than in the plain sum.

Related: dividing by one norm per task (GradNorm, DB-MTL) does the same with one number for all
tensors. Steps of one pass for all tasks take one number per task, too: :func:`pass_ratios`.

Symbols: T tasks, R rows of tasks, L shared tensors of N_l elements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from excessmtl_ext.state import ParamLayout

Combination: TypeAlias = Literal["per_tensor", "sum"]
"""Whether gradients are brought to one size per tensor before they are summed."""

SIZE_MEMORY = 100
"""Steps that a running mean square looks back; the mean of all steps until then."""

OUTLIER_RATIO = 100.0
"""A mean square counts as at most so many times the running one, so that no single batch decides a size."""

SMALLEST_NORM = 1e-15
"""Norms below are computed again in float64: squares may have left the range of float32."""

_LEAST_RATIO = 1e-300

_LARGEST_SQUARE_SUM = torch.finfo(torch.float32).max


def sums_of_squares(
    task_grads: Sequence[Tensor], num_tensors: int, grad_scale: Tensor | None
) -> Tensor:
    """Sums the squares of each gradient, without the scale it carries: where no op does so in a pass of its own.

    Args:
        task_grads: R * L gradients, task-major; a tensor without elements counts 0.
        num_tensors: L, at least 1.
        grad_scale: [], or None.

    Returns:
        [R, L] float64. Sums below 1e-38 may be 0, those above 3.4e38 count as that, as in the float32 state.
    """
    wide = torch.float32
    if any(grad.dtype == torch.float64 and grad.numel() > 0 for grad in task_grads):
        wide = torch.float64
    present = [grad for grad in task_grads if grad.numel() > 0]
    norms = iter(torch._foreach_norm(present, 2, wide) if present else [])  # pyright: ignore
    zero = torch.zeros((), dtype=wide, device=(present or task_grads)[0].device)
    rows = [next(norms) if grad.numel() > 0 else zero for grad in task_grads]
    squares = torch.stack(rows).double().square().view(-1, num_tensors)
    if wide == torch.float32:
        squares = squares.clamp(max=_LARGEST_SQUARE_SUM)
    return squares if grad_scale is None else squares / grad_scale.to(squares).square()


def exact_sums_of_squares(
    task_grads: Sequence[Tensor], num_tensors: int, grad_scale: Tensor | None
) -> Tensor:
    """Sums squares like :func:`sums_of_squares`, but infinite or NaN where, and only where, a gradient is.

    Costs a second pass on the CPU where a sum leaves the range of float32, and no wait on a GPU.

    Returns:
        [R, L] float64.
    """
    present = [grad for grad in task_grads if grad.numel() > 0]
    wide = torch.float64 if any(_is_wide(grad) for grad in present) else torch.float32
    norms = torch._foreach_norm(present, 2, wide) if present else ()  # pyright: ignore
    found = [norm.double() for norm in norms]
    if wide == torch.float32:
        found = [
            torch.linalg.vector_norm(grad, dtype=torch.float64)
            if not SMALLEST_NORM < float(norm) < math.inf
            else norm
            for norm, grad in zip(found, present, strict=True)
        ]
    zero = torch.zeros((), dtype=torch.float64, device=(present or task_grads)[0].device)
    rest = iter(found)
    rows = [next(rest) if grad.numel() > 0 else zero for grad in task_grads]
    squares = torch.stack(rows).square().view(-1, num_tensors)
    return squares if grad_scale is None else squares / grad_scale.to(squares).square()


def _is_wide(grad: Tensor) -> bool:
    return grad.dtype == torch.float64 or grad.is_cuda


@functools.cache
def _numels(layout: ParamLayout, device: torch.device) -> Tensor:
    return layout.param_numels.to(device, torch.float64)


def mean_squares(square_sums: Tensor, layout: ParamLayout) -> Tensor:
    """Returns [R, L] means over the elements of each tensor."""
    return square_sums / _numels(layout, square_sums.device).clamp(min=1.0)


def num_reached_params(num_tensor_steps: Tensor, layout: ParamLayout) -> Tensor:
    """Returns [R] float64: elements of all tensors in which a task has had a gradient."""
    return (num_tensor_steps > 0).double() @ _numels(layout, num_tensor_steps.device)


def update_sizes_(
    mean_square: Tensor, num_tensor_steps: Tensor, now: Tensor, counts: Tensor
) -> None:
    r"""Moves the running mean squares: :math:`n \leftarrow n + (\min(x, 100 n) - n) / \min(t, 100)`.

    A gradient that is zero in a whole tensor says nothing of its size and does not count as a step.

    Args:
        mean_square: n [R, L] float64, changed in place.
        num_tensor_steps: t [R, L] int64, changed in place.
        now: x [R, L], the mean squares of this step.
        counts: bool, [] or [R, 1]: whether the step counts.
    """
    moves = (now > 0) & counts
    steps = num_tensor_steps + 1
    bounded = torch.where(num_tensor_steps == 0, now, now.minimum(OUTLIER_RATIO * mean_square))
    moved = mean_square + (bounded - mean_square) / steps.clamp(max=SIZE_MEMORY)
    mean_square.copy_(torch.where(moves, moved, mean_square))
    num_tensor_steps.add_(moves)


def sizes_now(mean_square: Tensor, now: Tensor) -> Tensor:
    """Returns the [R, L] mean squares by which this step's gradients are divided; 1 where there is none yet."""
    size = mean_square.maximum(now / OUTLIER_RATIO)
    return torch.where(mean_square > 0, size, 1.0)


def largest_sizes(mean_square: Tensor) -> Tensor:
    """Returns the [L] largest mean square of each tensor; 1 where no task has had a gradient."""
    largest = mean_square.amax(0)
    return torch.where(largest > 0, largest, 1.0)


def tensor_weights(task_weights: Tensor, mean_square: Tensor, now: Tensor) -> Tensor:
    """Returns the [T, L] factors f_il of the gradients in the combined sum, or the weight where a task has no size."""
    ratio = largest_sizes(mean_square) / sizes_now(mean_square, now)
    return task_weights[:, None] * torch.where(mean_square > 0, ratio, 1.0).sqrt()


def pass_ratios(mean_square: Tensor, num_tensor_steps: Tensor, layout: ParamLayout) -> Tensor:
    """Returns the [T] factors besides the weights in steps of one pass: a size is a mean over all elements of a task.

    A task without a size weighs nothing beside those that have one: its unit would decide how much.
    """
    if mean_square.shape[1] == 1 and mean_square.device.type == "cpu":
        return _ratios_of_one_tensor(mean_square, num_tensor_steps, layout)
    numels = _numels(layout, mean_square.device)
    mean = (mean_square @ numels) / num_reached_params(num_tensor_steps, layout).clamp(min=1.0)
    largest, has_size = mean.amax(), mean > 0
    without = torch.where(largest > 0, 0.0, 1.0)
    return torch.where(has_size, largest / torch.where(has_size, mean, 1.0), without).sqrt()


def _ratios_of_one_tensor(
    mean_square: Tensor, num_tensor_steps: Tensor, layout: ParamLayout
) -> Tensor:
    """Does the same, to the bit, without ten operations on a handful of numbers, dear beside a small step."""
    (numel,) = layout.numels
    means = [
        square * numel / (max(float(numel), 1.0) if steps > 0 else 1.0)
        for square, steps in zip(
            mean_square[:, 0].tolist(), num_tensor_steps[:, 0].tolist(), strict=True
        )
    ]
    largest = math.nan if any(map(math.isnan, means)) else max(means)
    without = 0.0 if largest > 0 else 1.0
    ratios = [math.sqrt(largest / mean) if mean > 0 else without for mean in means]
    return mean_square.new_tensor(ratios)


def log_ratio(ratio: Tensor) -> Tensor:
    """Returns the logarithm of one of :func:`pass_ratios`, finite also for a task that is to weigh nothing."""
    return ratio.clamp(min=_LEAST_RATIO).log()
