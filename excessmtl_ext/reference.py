"""Pure PyTorch twin of every function of :mod:`excessmtl_ext.functional`: the judge in tests, and the fallback.

A twin takes exactly the arguments of its namesake, so that either can stand in for the other. One
line per equation of He et al., "Robust Multi-Task Learning with Excess Risks" (ICML 2024); clarity
beats speed here.

``task_grads`` holds T * L tensors, task-major. A tensor without elements where the parameter has
some stands for "no gradient"; a task that has none at all is absent from the step. ``ticket``
serves the CUDA kernels only.

S and m may be kept in bfloat16. A step widens them to float32, computes as ever, and rounds what it
stores by :func:`excessmtl_ext.stochastic_rounding.stochastically_rounded`; risks are of the numbers
before they are rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from excessmtl_ext import bounded_moves
from excessmtl_ext.reference_rows import (
    check_rounding,
    check_task_grads,
    present_rows,
    row_segments,
)
from excessmtl_ext.state import (
    MAX_LOG_STEP,
    MoveOptions,
    MoveState,
    ParamLayout,
    StepOptions,
    StepState,
    segments,
)

_PLAIN = MoveOptions()


def find_nonfinite(
    task_grads: Sequence[Tensor], num_rows: int, dtype: torch.dtype, grad_scale: Tensor | None
) -> Tensor:
    """Finds the tasks with a gradient whose square, without the loss scale, is not finite.

    Args:
        task_grads: R * L gradients, task-major.
        num_rows: R.
        dtype: Of the state: in float32 a square ends at 3.4e38, in float64 at 1.8e308.
        grad_scale: As in the step.

    Returns:
        [R] bool.
    """
    wide = torch.promote_types(dtype, torch.float32)
    present = [grad for grad in task_grads if grad.numel() > 0]
    if not present:
        device = task_grads[0].device if task_grads else None
        return torch.zeros(num_rows, dtype=torch.bool, device=device)
    zero = torch.zeros((), dtype=wide, device=present[0].device)
    # The largest magnitude decides: NaN where there is one.
    norms = iter(torch._foreach_norm(present, float("inf"), wide))  # pyright: ignore
    rows = [next(norms) if grad.numel() > 0 else zero for grad in task_grads]
    largest = torch.stack(rows).view(num_rows, -1)
    if grad_scale is not None:
        largest = largest * grad_scale.to(largest).reciprocal()
    return ~largest.square().isfinite().all(1)


def fused_step_(
    task_grads: Sequence[Tensor],
    layout: ParamLayout,
    state: StepState,
    options: StepOptions,
    grad_scale: Tensor | None = None,
    *,
    move: MoveState | None = None,
    moves: MoveOptions = _PLAIN,
) -> None:
    """Takes one step: Fisher diagonal, excess risks, baseline, weights. A non-finite one is only counted."""
    num_tasks = state.task_weights.numel()
    check_task_grads(task_grads, layout, num_tasks, state.sq_grad_sum)
    tasks = present_rows(task_grads, num_tasks, layout)
    state.found_nonfinite.zero_()
    excess_risk_sum = torch.zeros_like(state.excess_risk)
    square_sums = None if move is None else torch.zeros_like(move.tensor_mean_square)
    accumulate_excess_risk_(
        task_grads,
        layout,
        state.sq_grad_sum,
        state.grad_mean,
        excess_risk_sum,
        state.ticket,
        options,
        grad_scale,
        state=state,
        square_sums=square_sums,
    )
    if move is None:
        update_task_risks_(excess_risk_sum, tasks, layout, state, options)
        update_task_weights_(tasks, state, options)
    else:
        commit_step_(
            excess_risk_sum, square_sums, tasks, layout, state, options, move=move, moves=moves
        )


def commit_step_(
    excess_risk_sum: Tensor | None,
    square_sums: Tensor | None,
    tasks: Sequence[int],
    layout: ParamLayout,
    state: StepState,
    options: StepOptions,
    *,
    move: MoveState,
    moves: MoveOptions,
    risk_share: Tensor | None = None,
    moves_weights: bool = True,
) -> None:
    """Computes weights and factors of the gradients from a step's sums: :mod:`excessmtl_ext.bounded_moves`."""
    bounded_moves.commit_step_(
        excess_risk_sum,
        square_sums,
        tasks,
        layout,
        state,
        options,
        move,
        moves,
        risk_share=risk_share,
        moves_weights=moves_weights,
        update_task_risks_=update_task_risks_,
        update_task_weights_=update_task_weights_,
    )


def accumulate_excess_risk_(
    task_grads: Sequence[Tensor],
    layout: ParamLayout,
    sq_grad_sum: Tensor,
    grad_mean: Tensor,
    excess_risk_sum: Tensor,
    ticket: Tensor,
    options: StepOptions,
    grad_scale: Tensor | None = None,
    *,
    state: StepState | None = None,
    first_task: int = 0,
    known_nonfinite: Tensor | None = None,
    square_sums: Tensor | None = None,
) -> None:
    r"""Adds squared gradients to the Fisher diagonal (Eq. 7) and sums each present task's excess risk (Eq. 6).

    .. math:: S \leftarrow S + g^2, \quad m \leftarrow b m + (1 - b) g, \quad \textstyle\sum_j n_j^2 / h(S_j)

    with n = m under momentum b, else g, and h(S) = sqrt(S + eps) or S + eps. ``state`` is for
    bfloat16 rows; row r of them is of task ``first_task + r``. Where any task has a square that is
    not finite, or is known to have one, the sums are NaN and 0, and S and m are not written.
    ``square_sums`` [R, L] get :math:`\sum_j g_j^2` of every tensor, the largest number of S's
    arithmetic at most.
    """
    check_task_grads(task_grads, layout, sq_grad_sum.shape[0], sq_grad_sum)
    check_rounding(sq_grad_sum, state)
    wide = torch.promote_types(sq_grad_sum.dtype, torch.float32)
    largest = torch.finfo(wide).max
    b = options.gradient_momentum
    tasks = present_rows(task_grads, sq_grad_sum.shape[0], layout)
    if square_sums is not None:
        square_sums.zero_()
    flags = known_nonfinite
    if flags is None:
        flags = find_nonfinite(task_grads, sq_grad_sum.shape[0], sq_grad_sum.dtype, grad_scale)
    if bool(flags.any()):
        excess_risk_sum[tasks] = torch.where(flags[tasks], float("nan"), 0.0).double()
        return
    for row in tasks:
        risk = torch.zeros((), dtype=torch.float64, device=sq_grad_sum.device)
        for segment in row_segments(
            task_grads, row, layout, sq_grad_sum, grad_mean, options, grad_scale, state, first_task
        ):
            g = segment.grad
            sq = g * g
            if square_sums is not None:
                square_sum = sq.sum(dtype=torch.float64).clamp(max=largest)
                square_sums[row, segment.number] = square_sum
            total = (segment.sq_grad_sum.to(wide) + sq).clamp(max=largest)
            segment.store_sum(total)
            numerator = sq
            if segment.grad_mean is not None:
                moved = segment.grad_mean.to(wide) * b + g * (1 - b)
                segment.store_mean(moved)
                numerator = moved * moved
            fisher = total + options.eps
            share = numerator / (fisher.sqrt() if options.sqrt_fisher else fisher)
            risk += share.sum(dtype=torch.float64)
        excess_risk_sum[row] = risk


def update_task_risks_(
    excess_risk_sum: Tensor,
    tasks: Sequence[int],
    layout: ParamLayout,
    state: StepState,
    options: StepOptions,
) -> None:
    r"""Commits the risks of ``tasks``: bias correction, baseline, ratio (Sec. 3.2); flags those not finite."""
    index = torch.tensor(tasks, dtype=torch.long, device=excess_risk_sum.device)
    state.found_nonfinite[index] = ~excess_risk_sum[index].isfinite()
    if not tasks or bool(state.found_nonfinite[index].any()):
        return
    baseline = state.baseline_excess_risk[index]
    has_begun = (excess_risk_sum[index] != 0) | (baseline != 0)  # its first gradient is step 1
    t = state.num_task_steps[index] + 1
    risk = excess_risk_sum[index] / (1.0 - options.gradient_momentum ** t.double()) ** 2
    if int(state.num_steps) < options.num_warmup_steps:
        baseline = baseline + (risk - baseline) / t  # mean over the warm-up
    else:
        baseline = torch.where(baseline == 0, risk, baseline)  # a task that had no gradient before
    state.excess_risk[index] = risk
    state.baseline_excess_risk[index] = baseline
    ratio = torch.where(baseline > 0, risk / baseline, 0.0)
    state.relative_excess_risk[index] = (
        ratio if options.relative else risk * options.raw_risk_scale(layout)
    )
    state.num_task_steps[index] += has_begun


def update_task_weights_(tasks: Sequence[int], state: StepState, options: StepOptions) -> None:
    r"""Moves the weights (Eq. 9): :math:`\alpha_i \leftarrow \alpha_i \exp(\eta R_i) / Z` over ``tasks`` alone.

    Differs from the official code: weights live in log space, so exp() cannot overflow and no
    weight is lost at zero.
    """
    if not tasks:
        return
    index = torch.tensor(tasks, dtype=torch.long, device=state.task_weights.device)
    if bool(state.found_nonfinite[index].any()):
        state.num_skipped_steps.add_(1)
        return
    if int(state.num_steps) >= options.num_warmup_steps:
        before = state.log_task_weights[index]
        log_step = options.robust_step_size * state.relative_excess_risk[index]
        moved = before + log_step.clamp(max=MAX_LOG_STEP)
        state.log_task_weights[index] = (moved - moved.logsumexp(0)) + before.logsumexp(0)
    share = state.log_task_weights.softmax(0)
    floor = options.min_weight
    state.task_weights.copy_(
        options.weight_total * ((1.0 - state.task_weights.numel() * floor) * share + floor)
    )
    state.num_steps.add_(1)


def combine_(
    task_grads: Sequence[Tensor],
    outputs: Sequence[Tensor],
    layout: ParamLayout,
    state: StepState,
    options: StepOptions,
    grad_scale: Tensor | None = None,
    *,
    accumulate: bool = False,
    weights: Tensor | None = None,
) -> None:
    r"""Writes (or adds) :math:`\sum_i \alpha_i g_i`; after a non-finite step NaN."""
    weighted_sum_(
        task_grads,
        outputs,
        layout,
        state.task_weights if weights is None else weights,
        found_nonfinite=state.found_nonfinite,
        accumulate=accumulate,
    )


def fused_step_combine_(
    task_grads: Sequence[Tensor],
    outputs: Sequence[Tensor],
    layout: ParamLayout,
    state: StepState,
    options: StepOptions,
    grad_scale: Tensor | None = None,
    *,
    accumulate: bool = False,
    move: MoveState | None = None,
    moves: MoveOptions = _PLAIN,
) -> None:
    """Takes one step, then writes the weighted sum of its gradients under the new weights (Algorithm 1)."""
    fused_step_(task_grads, layout, state, options, grad_scale, move=move, moves=moves)
    weights = move.tensor_weights if move is not None and moves.per_tensor else None
    combine_(
        task_grads,
        outputs,
        layout,
        state,
        options,
        grad_scale,
        accumulate=accumulate,
        weights=weights,
    )


def weighted_sum_(
    task_grads: Sequence[Tensor],
    outputs: Sequence[Tensor],
    layout: ParamLayout,
    task_weights: Tensor,
    *,
    found_nonfinite: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    r"""Writes (or adds) :math:`\sum_i \alpha_i g_i`, with weights [R, L] :math:`\sum_i f_{il} g_{il}`; or NaN."""
    if found_nonfinite is not None and bool(found_nonfinite.any()):
        for output in outputs:
            output.fill_(float("nan"))
        return
    num_tasks, num_tensors = task_weights.shape[0], len(layout.numels)
    for index, output in enumerate(outputs):
        if output.numel() == 0:
            continue
        grads = [task_grads[task * num_tensors + index] for task in range(num_tasks)]
        wide = torch.promote_types(output.dtype, torch.float32)
        for grad in grads:
            wide = torch.promote_types(wide, grad.dtype)
        total = torch.zeros(output.shape, dtype=wide, device=output.device)
        column = task_weights if task_weights.dim() == 1 else task_weights[:, index]
        for weight, grad in zip(column, grads, strict=True):
            if grad.numel() > 0:
                total += weight.to(wide) * grad.to(wide).reshape(output.shape)
        output.copy_(output.to(wide) + total if accumulate else total)


def fold_(
    task_grads: Sequence[Tensor],
    layout: ParamLayout,
    log_weight: Tensor,
    running_sum: Tensor,
    running_log_max: Tensor,
) -> None:
    r"""Streaming: takes one task's gradient into :math:`\sum_i e^{\ell_i - M} g_i`, M the largest log-weight so far.

    Log-weights are [], or [L], one per tensor.
    """
    log_max = torch.maximum(log_weight, running_log_max)
    keep = (running_log_max - log_max).exp().expand(len(layout.numels))
    add = (log_weight - log_max).exp().expand(len(layout.numels))
    parts = segments(running_sum, layout.param_numels)
    for index, (grad, total) in enumerate(zip(task_grads, parts, strict=True)):
        total *= keep[index].to(total.dtype)
        if grad.numel() > 0:
            total += add[index].to(total.dtype) * grad.reshape(-1).to(total.dtype)
    running_log_max.copy_(log_max)
