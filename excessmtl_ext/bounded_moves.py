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

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from excessmtl_ext import gradient_sizes
from excessmtl_ext.state import MoveOptions, MoveState, ParamLayout, StepOptions, StepState

RAMP_STEPS = 150
"""Gradients of a task until its risk counts in full: three times the 50 steps that momentum 0.98 looks back."""

_LEAST_EVIDENCE = 1e-6
"""Least 1 - c at which variance and signal can be told apart: below, the momentum is of one gradient."""


def commit_step_(
    excess_risk_sum: Tensor | None,
    square_sums: Tensor | None,
    tasks: Sequence[int],
    layout: ParamLayout,
    state: StepState,
    options: StepOptions,
    move: MoveState,
    moves: MoveOptions,
    *,
    risk_share: Tensor | None,
    moves_weights: bool,
    update_task_risks_: Callable[..., None],
    update_task_weights_: Callable[..., None],
) -> None:
    """:func:`excessmtl_ext.functional.commit_step_` on the two updates that it consists of besides."""
    shares = None
    if excess_risk_sum is not None and square_sums is not None:
        rows = slice(tasks[0], tasks[0] + 1) if len(square_sums) == len(tasks) == 1 else slice(None)
        before = state.num_task_steps[rows].clone()
        update_task_risks_(excess_risk_sum, tasks, layout, state, options)
        took_part = state.num_task_steps[rows] > before  # none, if a gradient is not finite
        sums = excess_risk_sum[rows]
        shares = _take_in(rows, sums, square_sums, took_part, layout, move, options)
        if risk_share is not None:
            risk_share[rows] = shares
    if not moves_weights or not tasks:
        return
    counts = ~state.found_nonfinite.any()
    if moves.max_log_ratio is None:
        update_task_weights_(tasks, state, options)
    else:
        risks = relative_risks(move)
        log_share = log_weights(state, move, options, moves.max_log_ratio).log_softmax(0)
        state.log_task_weights.copy_(torch.where(counts, log_share, state.log_task_weights))
        state.relative_excess_risk.copy_(torch.where(counts, risks, state.relative_excess_risk))
        state.num_steps.add_(counts)
        state.num_skipped_steps.add_(~counts)
    if moves.max_log_ratio is not None or moves.has_floors:
        weights = _weights(state, move, options, moves)
        state.task_weights.copy_(torch.where(counts, weights, state.task_weights))
    if square_sums is not None and shares is not None:
        if moves.max_log_ratio is not None and risk_share is None:
            move.risk_share_sum.add_(torch.where(counts, shares, 0.0))
        now = gradient_sizes.mean_squares(square_sums, layout)
        factors = gradient_sizes.tensor_weights(state.task_weights, move.tensor_mean_square, now)
        move.tensor_weights.copy_(torch.where(counts, factors, move.tensor_weights))


def _take_in(
    rows: slice,
    risk_sums: Tensor,
    square_sums: Tensor,
    took_part: Tensor,
    layout: ParamLayout,
    move: MoveState,
    options: StepOptions,
) -> Tensor:
    """Commits sizes and counts of the tasks of some rows; returns their shares q [R], 0 where none is known."""
    now = gradient_sizes.mean_squares(square_sums, layout)
    gradient_sizes.update_sizes_(
        move.tensor_mean_square[rows], move.num_tensor_steps[rows], now, took_part[:, None]
    )
    has_grad = took_part & (square_sums > 0).any(1)
    b = options.gradient_momentum
    mass, sq_mass = move.momentum_mass[rows], move.momentum_sq_mass[rows]
    # A gradient of zeros moves m as any other and is none of those whose mean is wanted.
    share = (1 - b) * has_grad.double()
    mass.copy_(torch.where(took_part, b * mass + share, mass))
    sq_mass.copy_(torch.where(took_part, b * b * sq_mass + share.square(), sq_mass))
    steps = move.num_gradient_steps[rows]
    steps.add_(has_grad)
    num_params = gradient_sizes.num_reached_params(move.num_tensor_steps[rows], layout)
    variance = sq_mass / mass.square()
    ratio = steps * risk_sums / mass.square() / num_params
    share = ((ratio - variance) / (1 - variance)).clamp(0.0, 1.0)
    return torch.where(has_grad & (1 - variance > _LEAST_EVIDENCE), share, 0.0)


def relative_risks(move: MoveState) -> Tensor:
    """Returns the relative risks R [T], between 0 and 1."""
    largest = move.risk_share_sum.amax()
    ratio = torch.where(largest > 0, move.risk_share_sum / largest, 1.0)
    return 1 + (ratio - 1) * (move.num_gradient_steps.double() / RAMP_STEPS).clamp(max=1.0)


def log_weights(
    state: StepState, move: MoveState, options: StepOptions, max_log_ratio: float
) -> Tensor:
    """Returns [T] log-weights, not normalised; the priorities during the warm-up."""
    is_past_warmup = (state.num_steps >= options.num_warmup_steps).double()
    return move.log_priorities + is_past_warmup * max_log_ratio * relative_risks(move)


def _weights(state: StepState, move: MoveState, options: StepOptions, moves: MoveOptions) -> Tensor:
    share = state.log_task_weights.softmax(0)
    if moves.has_floors:
        weights = (1.0 - move.weight_floors.sum()) * share + move.weight_floors
    else:
        floor = options.min_weight
        weights = (1.0 - share.numel() * floor) * share + floor
    return options.weight_total * weights
