r"""Weights within bounds: the default of :class:`excessmtl_ext.ExcessMTL`.

Eq. 9 adds a step to the log-weights at every step, so that they are the sum of all past and have no
bound. Here they are a function of how much of each task's gradient has been signal:

.. math:: q_i = \frac{t_i E_i / P_i - c_i}{1 - c_i} \text{ cut to } [0, 1], \qquad
          A_i = \textstyle\sum_t q_i, \qquad R_i = A_i / \max_k A_k, \qquad
          \alpha_i \propto \pi_i e^{\kappa R_i}

Of a gradient that is the same in every step, :math:`t_i E_i / P_i` is 1: E is the linear Fisher's
risk with momentum, S the sum of t squares. Of a gradient that is nothing but variance it is
:math:`c_i`, the sum of the squared shares that the steps have in the momentum. So q is the share of
the squared gradient that is not variance, whatever the unit of the loss. Log-weights differ by
:math:`\kappa` at most, besides the priorities :math:`\pi`.

A step weights with A as it was before the step, so that a step task by task gives the same weights.
R counts in full once a task has had ``RAMP_STEPS`` gradients: until then A says little.

Symbols: T tasks, L shared tensors, P_i elements of all tensors in which task i has had a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from excessmtl_ext import functional, gradient_sizes
from excessmtl_ext.state import ParamLayout, StepOptions, StepState

RAMP_STEPS = 150
"""Gradients of a task until its risk counts in full: three times the 50 steps that momentum 0.98 looks back."""

_LEAST_EVIDENCE = 1e-6
"""Least 1 - c at which variance and signal can be told apart: below, the momentum is of one gradient."""


class MoveState(NamedTuple):
    """State besides :class:`excessmtl_ext.functional.StepState`; on its device, float64 unless said."""

    risk_share_sum: Tensor
    """A [T]."""
    num_gradient_steps: Tensor
    """t [T] int64: steps in which a task's gradient was other than zero."""
    momentum_mass: Tensor
    """[T]: sum of the shares that these gradients have in m."""
    momentum_sq_mass: Tensor
    """[T]: sum of their squares."""
    tensor_mean_square: Tensor
    """n [T, L], see :mod:`excessmtl_ext.gradient_sizes`."""
    num_tensor_steps: Tensor
    """[T, L] int64: steps in which a task's gradient was other than zero in a tensor."""
    tensor_weights: Tensor
    """f [T, L]: factors of the gradients in the latest sum; not saved."""
    log_priorities: Tensor
    """log of the priorities [T], which sum to 1; an option, not saved."""


def init_move_state(
    num_tasks: int,
    num_tensors: int,
    priorities: Sequence[float] | None,
    device: torch.device | str = "cpu",
) -> MoveState:
    """The state before the first step.

    Args:
        num_tasks: T.
        num_tensors: L, or 0 where it is not known yet.
        priorities: T positive numbers, or None for equal ones.
        device: Where the gradients will be.
    """
    per_task = torch.zeros(num_tasks, dtype=torch.float64, device=device)
    per_tensor = torch.zeros(num_tasks, num_tensors, dtype=torch.float64, device=device)
    shares = torch.tensor(priorities or [1.0] * num_tasks, dtype=torch.float64, device="cpu")
    return MoveState(
        risk_share_sum=per_task,
        num_gradient_steps=per_task.long(),
        momentum_mass=per_task.clone(),
        momentum_sq_mass=per_task.clone(),
        tensor_mean_square=per_tensor,
        num_tensor_steps=per_tensor.long(),
        tensor_weights=per_tensor.clone(),
        log_priorities=(shares / shares.sum()).log().to(device),
    )


class MoveOptions(NamedTuple):
    """The choices besides :class:`excessmtl_ext.functional.StepOptions`."""

    max_log_ratio: float | None
    """kappa; None: the mirror steps of Eq. 9."""
    has_sizes: bool
    """Whether gradients are brought to one size."""
    floors: tuple[float, ...] | None
    """T floors of the weights, as shares of their sum; None: ``StepOptions.min_weight`` for all."""


def step_(
    task_grads: Sequence[Tensor],
    layout: ParamLayout,
    state: StepState,
    move: MoveState,
    options: StepOptions,
    moves: MoveOptions,
    grad_scale: Tensor | None,
) -> None:
    """One step of all tasks up to the weights, as :func:`excessmtl_ext.functional.fused_step_`."""
    num_tensors = len(layout.numels)
    squares = gradient_sizes.sums_of_squares(task_grads, num_tensors, grad_scale)
    tasks = [
        task
        for task in range(state.task_weights.numel())
        if any(g.numel() > 0 for g in task_grads[task * num_tensors : (task + 1) * num_tensors])
    ]
    state.found_nonfinite.zero_()
    sums = torch.zeros_like(state.excess_risk)
    functional.accumulate_excess_risk_(
        task_grads,
        layout,
        state.sq_grad_sum,
        state.grad_mean,
        sums,
        state.ticket,
        options,
        grad_scale,
        state=state,
    )
    commit_(sums, squares, tasks, layout, state, move, options, moves)


def commit_(
    risk_sums: Tensor,
    square_sums: Tensor,
    tasks: Sequence[int],
    layout: ParamLayout,
    state: StepState,
    move: MoveState,
    options: StepOptions,
    moves: MoveOptions,
) -> None:
    """The part of a step that follows its sums over the elements, of all ranks if there are several.

    Args:
        risk_sums: [T] float64, as from :func:`excessmtl_ext.functional.accumulate_excess_risk_`.
        square_sums: [T, L] float64, as from :func:`excessmtl_ext.gradient_sizes.sums_of_squares`.
        tasks: The tasks that took part.
        layout: Sizes of the L tensors.
        state: Changed in place, but for S and m.
        move: Changed in place.
        options: The choices.
        moves: The choices.
    """
    shares = take_(slice(None), risk_sums, square_sums, tasks, layout, state, move, options)
    move_weights_(tasks, state, move, options, moves, shares)
    now = gradient_sizes.mean_squares(square_sums, layout)
    factors = gradient_sizes.tensor_weights(state.task_weights, move.tensor_mean_square, now)
    counts = ~state.found_nonfinite.any()
    move.tensor_weights.copy_(torch.where(counts, factors, move.tensor_weights))


def take_task_(
    task: int,
    grads: Sequence[Tensor],
    layout: ParamLayout,
    state: StepState,
    move: MoveState,
    options: StepOptions,
    grad_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Takes in the gradients of one task; not finite, they change its flag only.

    Returns:
        [T], zero but for the share q of the task; [L], the mean squares of its gradients.
    """
    row = slice(task, task + 1)
    squares = gradient_sizes.sums_of_squares(grads, len(layout.numels), grad_scale)
    sums = torch.zeros_like(state.excess_risk)
    functional.accumulate_excess_risk_(
        grads,
        layout,
        state.sq_grad_sum[row],
        state.grad_mean[row],
        sums[row],
        state.ticket,
        options,
        grad_scale,
        state=state,
        first_task=task,
    )
    share = take_(row, sums, squares, [task], layout, state, move, options)
    shares = torch.zeros_like(state.excess_risk)
    shares[row] = share
    return shares, gradient_sizes.mean_squares(squares, layout)[0]


def take_(
    rows: slice,
    risk_sums: Tensor,
    square_sums: Tensor,
    tasks: Sequence[int],
    layout: ParamLayout,
    state: StepState,
    move: MoveState,
    options: StepOptions,
) -> Tensor:
    """Commits risks, sizes and counts of the tasks of some rows; returns their shares q [R], 0 where none is known."""
    before = state.num_task_steps[rows].clone()
    functional.update_task_risks_(risk_sums, tasks, layout, state, options)
    took_part = state.num_task_steps[rows] > before  # none, if a gradient is not finite
    now = gradient_sizes.mean_squares(square_sums, layout)
    gradient_sizes.update_sizes_(
        move.tensor_mean_square[rows], move.num_tensor_steps[rows], now, took_part[:, None]
    )
    has_grad = took_part & (square_sums > 0).any(1)
    b = options.gradient_momentum
    mass, sq_mass = move.momentum_mass[rows], move.momentum_sq_mass[rows]
    # A gradient of zeros moves m as any other and is none of those whose mean is wanted.
    mass.copy_(torch.where(took_part, b * mass + (1 - b) * has_grad, mass))
    sq_mass.copy_(torch.where(took_part, b * b * sq_mass + (1 - b) ** 2 * has_grad, sq_mass))
    steps = move.num_gradient_steps[rows]
    steps.add_(has_grad)
    num_params = gradient_sizes.num_reached_params(move.num_tensor_steps[rows], layout)
    variance = sq_mass / mass.square()
    ratio = steps * risk_sums[rows] / mass.square() / num_params
    share = ((ratio - variance) / (1 - variance)).clamp(0.0, 1.0)
    return torch.where(has_grad & (1 - variance > _LEAST_EVIDENCE), share, 0.0)


def relative_risks(move: MoveState) -> Tensor:
    """R [T], between 0 and 1."""
    largest = move.risk_share_sum.amax()
    ratio = torch.where(largest > 0, move.risk_share_sum / largest, 1.0)
    return 1 + (ratio - 1) * (move.num_gradient_steps / RAMP_STEPS).clamp(max=1.0)


def log_weights(
    state: StepState, move: MoveState, options: StepOptions, max_log_ratio: float
) -> Tensor:
    """[T] log-weights, not normalised; the priorities during the warm-up."""
    is_past_warmup = state.num_steps >= options.num_warmup_steps
    return move.log_priorities + is_past_warmup * max_log_ratio * relative_risks(move)


def move_weights_(
    tasks: Sequence[int],
    state: StepState,
    move: MoveState,
    options: StepOptions,
    moves: MoveOptions,
    shares: Tensor | None = None,
) -> None:
    """Moves the weights and counts the step, or the skip where a flag is set.

    Args:
        tasks: The tasks that took part.
        state: Changed in place.
        move: Changed in place.
        options: The choices.
        moves: The choices.
        shares: q [T] of this step, to be added to A after it; None: A has them.
    """
    if moves.max_log_ratio is None:
        functional.update_task_weights_(tasks, state, options)
    elif tasks:
        counts = ~state.found_nonfinite.any()
        log_share = log_weights(state, move, options, moves.max_log_ratio).log_softmax(0)
        risks = relative_risks(move)
        state.log_task_weights.copy_(torch.where(counts, log_share, state.log_task_weights))
        state.relative_excess_risk.copy_(torch.where(counts, risks, state.relative_excess_risk))
        _write_weights(state, options, moves)
        state.num_steps.add_(counts)
        state.num_skipped_steps.add_(~counts)
        if shares is not None:
            move.risk_share_sum.add_(torch.where(counts, shares, 0.0))
        return
    if moves.floors is not None:
        _write_weights(state, options, moves)


def _write_weights(state: StepState, options: StepOptions, moves: MoveOptions) -> None:
    share = state.log_task_weights.softmax(0)
    num_tasks = share.numel()
    if moves.floors is None:
        floor = options.min_weight
        weights = (1.0 - num_tasks * floor) * share + floor
    else:
        floors = torch.tensor(moves.floors, dtype=share.dtype, device="cpu").to(
            share.device, non_blocking=True
        )
        weights = (1.0 - sum(moves.floors)) * share + floors
    state.task_weights.copy_(options.weight_total * weights)
