"""Pure PyTorch twin of every op in ``torch.ops.excessmtl_ext``: the judge in tests, and the fallback.

Each function takes exactly the arguments of its op (``csrc/ops.cpp``), so that either can stand in
for the other. One line per equation of He et al., "Robust Multi-Task Learning with Excess Risks"
(ICML 2024); clarity beats speed here.

``task_grads`` holds T * L tensors, task-major. A tensor without elements where the parameter has
some stands for "no gradient"; a task that has none at all is absent from the step. State is flat,
[T, padded P]: every parameter's segment is padded to ``SEGMENT_ALIGNMENT`` elements. ``chunk_map``
and ``ticket`` serve the CUDA kernels only.

S and m may be kept in bfloat16. A step widens them to float32, computes as ever, and rounds what it
stores by :func:`stochastically_rounded`; risks are of the numbers before they are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

SEGMENT_ALIGNMENT = 32
"""Elements to which each parameter's segment of the state is padded: one 128-byte line of float32."""

MAX_LOG_STEP = 1e100
"""Largest step of a log-weight: keeps the exponent finite when a baseline is vanishingly small."""


def padded_numel(numel: int) -> int:
    """Rounds the size of a parameter up to the size of its segment."""
    return (numel + SEGMENT_ALIGNMENT - 1) // SEGMENT_ALIGNMENT * SEGMENT_ALIGNMENT


def segments(flat: Tensor, param_numels: Tensor) -> Iterator[Tensor]:
    """Yields each parameter's part [..., n_l] of a flat state tensor [..., padded P], as views."""
    offset = 0
    for numel in param_numels.tolist():
        yield flat[..., offset : offset + numel]
        offset += padded_numel(numel)


def _task_grads_of(task_grads: Sequence[Tensor], task: int, num_tensors: int) -> Sequence[Tensor]:
    return task_grads[task * num_tensors : (task + 1) * num_tensors]


def check_task_grads(
    task_grads: Sequence[Tensor], param_numels: Tensor, num_tasks: int, state: Tensor
) -> None:
    """What the compiled ops check, in their words; ``state`` is the tensor that must hold the gradients' precision."""
    numels = param_numels.tolist()
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


_MASK_32 = 0xFFFFFFFF
_MASK_64 = 0xFFFFFFFFFFFFFFFF


def _mixed(z: int) -> int:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014) on 64 bits."""
    z = (z + 0x9E3779B97F4A7C15) & _MASK_64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & _MASK_64
    return z ^ z >> 31


def rounding_words(
    seed: int,
    step: int,
    task: int,
    num_positions: int,
    *,
    is_repair: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The 32 random bits of every position of a task's row of the state in one step, as int64 [num_positions].

    A function of its arguments and nothing else. The low 16 bits round S, the high 16 bits m. Two
    rounds of multiply and xorshift (constants: C. Wellons, hash-prospector) under a 64-bit key.

    Args:
        seed: The balancer's.
        step: ``num_steps + num_skipped_steps``, which no two steps share.
        task: The row.
        num_positions: Padded P.
        is_repair: Whether the rounding ends a repair, which has bits of its own.
        device: Where the bits are wanted.
    """
    of_step = _mixed(_mixed(seed & _MASK_64) + step)
    key = _mixed(of_step + 2 * task + is_repair)
    position = torch.arange(num_positions, device=device)
    word = position & _MASK_32 ^ ((key & _MASK_32) + (position >> 32) * 0x9E3779B9 & _MASK_32)
    word = (word ^ word >> 16) * 0x7FEB352D & _MASK_32
    word ^= key >> 32
    word = (word ^ word >> 15) * 0x846CA68B & _MASK_32
    return word ^ word >> 16


def stochastically_rounded(values: Tensor, random_16_bits: Tensor) -> Tensor:
    r"""Rounds float32 to bfloat16 so that the mean over the random bits is the number itself.

    .. math:: P(\text{round}(x) = x_+) = \frac{x - x_-}{x_+ - x_-}, \qquad \mathrm E[\text{round}(x)] = x

    with the bfloat16 neighbours :math:`x_- \le x < x_+` of x. Exact, since a float32 lies a whole number of 65,536ths
    between its neighbours. From the largest finite bfloat16 (3.39e38) on it cuts off, so that
    nothing finite becomes infinite; infinities and NaN stay.

    Args:
        values: float32.
        random_16_bits: int64, uniform on 0 to 65,535.
    """
    bits = values.float().view(torch.int32).long() & _MASK_32
    magnitude = bits & 0x7FFFFFFF
    rounded = torch.where(magnitude < 0x7F7F0000, bits + random_16_bits, bits)
    rounded = torch.where(magnitude > 0x7F800000, rounded | 0x00400000, rounded)
    return (rounded >> 16).to(torch.int16).view(torch.bfloat16)


def _row_words(
    state: Tensor,
    task: int,
    param_numels: Tensor,
    seed: int,
    num_steps: Tensor | None,
    num_skipped_steps: Tensor | None,
    *,
    is_repair: bool,
) -> Iterator[Tensor | None]:
    """Yields each parameter's random bits [n_l] where the state is bfloat16, else None."""
    if state.dtype != torch.bfloat16:
        return iter([None] * param_numels.numel())
    assert num_steps is not None and num_skipped_steps is not None
    step = int(num_steps) + int(num_skipped_steps)
    words = rounding_words(
        seed, step, task, state.shape[1], is_repair=is_repair, device=state.device
    )
    return segments(words, param_numels)


def _store(segment: Tensor, values: Tensor, random_16_bits: Tensor | None) -> None:
    segment.copy_(
        values if random_16_bits is None else stochastically_rounded(values, random_16_bits)
    )


def _check_rounding(
    state: Tensor, num_steps: Tensor | None, num_skipped_steps: Tensor | None
) -> None:
    if state.dtype == torch.bfloat16 and (num_steps is None or num_skipped_steps is None):
        raise RuntimeError(
            "Expected `num_steps` and `num_skipped_steps` with bfloat16 state: its rounding draws from them. Pass "
            "those of the state."
        )


def _present_tasks(task_grads: Sequence[Tensor], num_tasks: int, num_tensors: int) -> list[int]:
    return [
        task
        for task in range(num_tasks)
        if any(grad.numel() > 0 for grad in _task_grads_of(task_grads, task, num_tensors))
    ]


def fused_step_(
    task_grads: Sequence[Tensor],
    param_numels: Tensor,
    chunk_map: Tensor,
    grad_scale: Tensor | None,
    sq_grad_sum: Tensor,
    grad_mean: Tensor,
    excess_risk: Tensor,
    relative_excess_risk: Tensor,
    baseline_excess_risk: Tensor,
    log_task_weights: Tensor,
    task_weights: Tensor,
    num_steps: Tensor,
    num_task_steps: Tensor,
    num_skipped_steps: Tensor,
    found_nonfinite: Tensor,
    ticket: Tensor,
    *,
    sqrt_fisher: bool,
    eps: float,
    gradient_momentum: float,
    robust_step_size: float,
    num_warmup_steps: int,
    relative: bool,
    min_weight: float,
    weight_total: float,
    rounding_seed: int = 0,
) -> None:
    """One step: Fisher diagonal, excess risks, baseline, weights. A non-finite step changes only S and m."""
    num_tasks = task_weights.numel()
    check_task_grads(task_grads, param_numels, num_tasks, sq_grad_sum)
    tasks = _present_tasks(task_grads, num_tasks, param_numels.numel())
    num_params = int(param_numels.sum())
    found_nonfinite.zero_()
    excess_risk_sum = torch.zeros_like(excess_risk)
    accumulate_excess_risk_(
        task_grads,
        param_numels,
        chunk_map,
        grad_scale,
        sq_grad_sum,
        grad_mean,
        excess_risk_sum,
        ticket,
        sqrt_fisher=sqrt_fisher,
        eps=eps,
        gradient_momentum=gradient_momentum,
        num_steps=num_steps,
        num_skipped_steps=num_skipped_steps,
        rounding_seed=rounding_seed,
    )
    update_task_risks_(
        excess_risk_sum,
        tasks,
        excess_risk,
        relative_excess_risk,
        baseline_excess_risk,
        num_steps,
        num_task_steps,
        found_nonfinite,
        gradient_momentum=gradient_momentum,
        num_warmup_steps=num_warmup_steps,
        relative=relative,
        raw_risk_scale=1.0 if sqrt_fisher or num_params == 0 else 1.0 / num_params,
    )
    update_task_weights_(
        tasks,
        relative_excess_risk,
        log_task_weights,
        task_weights,
        num_steps,
        num_skipped_steps,
        found_nonfinite,
        robust_step_size=robust_step_size,
        num_warmup_steps=num_warmup_steps,
        min_weight=min_weight,
        weight_total=weight_total,
    )


def accumulate_excess_risk_(
    task_grads: Sequence[Tensor],
    param_numels: Tensor,
    chunk_map: Tensor,
    grad_scale: Tensor | None,
    sq_grad_sum: Tensor,
    grad_mean: Tensor,
    excess_risk_sum: Tensor,
    ticket: Tensor,
    *,
    sqrt_fisher: bool,
    eps: float,
    gradient_momentum: float,
    num_steps: Tensor | None = None,
    num_skipped_steps: Tensor | None = None,
    rounding_seed: int = 0,
    first_task: int = 0,
) -> None:
    r"""Adds squared gradients to the Fisher diagonal (Eq. 7) and sums each present task's excess risk (Eq. 6).

    .. math:: S \leftarrow S + g^2, \quad m \leftarrow b m + (1 - b) g, \quad \textstyle\sum_j n_j^2 / h(S_j)

    with n = m under momentum b, else g, and h(S) = sqrt(S + eps) or S + eps. The last four
    arguments are for bfloat16 state; row r of it is of task ``first_task + r``.
    """
    check_task_grads(task_grads, param_numels, sq_grad_sum.shape[0], sq_grad_sum)
    _check_rounding(sq_grad_sum, num_steps, num_skipped_steps)
    wide = torch.promote_types(sq_grad_sum.dtype, torch.float32)
    largest = torch.finfo(wide).max
    num_tensors = param_numels.numel()
    for task in _present_tasks(task_grads, sq_grad_sum.shape[0], num_tensors):
        grads = _task_grads_of(task_grads, task, num_tensors)
        sums = segments(sq_grad_sum[task], param_numels)
        means = (
            segments(grad_mean[task], param_numels)
            if gradient_momentum > 0
            else [None] * num_tensors
        )
        words = _row_words(
            sq_grad_sum,
            first_task + task,
            param_numels,
            rounding_seed,
            num_steps,
            num_skipped_steps,
            is_repair=False,
        )
        risk = torch.zeros((), dtype=torch.float64, device=sq_grad_sum.device)
        for grad, sq_sum, mean, word in zip(grads, sums, means, words, strict=True):
            if grad.numel() == 0:
                continue
            g = grad.reshape(-1).to(wide)
            if grad_scale is not None:
                g = g * grad_scale.to(g).reciprocal()
            sq = g * g
            is_finite = sq.isfinite()
            total = (sq_sum.to(wide) + sq.where(is_finite, 0.0)).clamp(max=largest)
            _store(sq_sum, total, None if word is None else word & 0xFFFF)
            numerator = sq
            if mean is not None:
                before = mean.to(wide)
                moved = before * gradient_momentum + g * (1 - gradient_momentum)
                moved = torch.where(is_finite, moved, before)
                _store(mean, moved, None if word is None else word >> 16)
                numerator = moved * moved + (sq - sq)  # 0, or NaN where the square is not finite
            fisher = total + eps
            risk += (numerator / (fisher.sqrt() if sqrt_fisher else fisher)).sum(
                dtype=torch.float64
            )
        excess_risk_sum[task] = risk


def update_task_risks_(
    excess_risk_sum: Tensor,
    tasks: Sequence[int],
    excess_risk: Tensor,
    relative_excess_risk: Tensor,
    baseline_excess_risk: Tensor,
    num_steps: Tensor,
    num_task_steps: Tensor,
    found_nonfinite: Tensor,
    *,
    gradient_momentum: float,
    num_warmup_steps: int,
    relative: bool,
    raw_risk_scale: float,
) -> None:
    r"""Commits the risks of ``tasks``: bias correction, baseline, ratio (Sec. 3.2); flags those not finite."""
    index = torch.tensor(tasks, dtype=torch.long, device=excess_risk.device)
    found_nonfinite[index] = ~excess_risk_sum[index].isfinite()
    if not tasks or bool(found_nonfinite[index].any()):
        return
    t = num_task_steps[index] + 1
    risk = excess_risk_sum[index] / (1.0 - gradient_momentum ** t.double()) ** 2
    baseline = baseline_excess_risk[index]
    if int(num_steps) < num_warmup_steps:
        baseline = baseline + (risk - baseline) / t  # mean over the warm-up
    else:
        baseline = torch.where(baseline == 0, risk, baseline)  # a task that had no gradient before
    excess_risk[index] = risk
    baseline_excess_risk[index] = baseline
    ratio = torch.where(baseline > 0, risk / baseline, 0.0)
    relative_excess_risk[index] = ratio if relative else risk * raw_risk_scale
    num_task_steps[index] = t


def update_task_weights_(
    tasks: Sequence[int],
    relative_excess_risk: Tensor,
    log_task_weights: Tensor,
    task_weights: Tensor,
    num_steps: Tensor,
    num_skipped_steps: Tensor,
    found_nonfinite: Tensor,
    *,
    robust_step_size: float,
    num_warmup_steps: int,
    min_weight: float,
    weight_total: float,
) -> None:
    r"""Mirror step (Eq. 9): :math:`\alpha_i \leftarrow \alpha_i \exp(\eta R_i) / Z` over ``tasks``; others keep theirs.

    Differs from the official code: weights live in log space, so exp() cannot overflow and no
    weight is lost at zero.
    """
    if not tasks:
        return
    index = torch.tensor(tasks, dtype=torch.long, device=task_weights.device)
    if bool(found_nonfinite[index].any()):
        num_skipped_steps += 1
        return
    if int(num_steps) >= num_warmup_steps:
        before = log_task_weights[index]
        moved = before + (robust_step_size * relative_excess_risk[index]).clamp(max=MAX_LOG_STEP)
        log_task_weights[index] = (moved - moved.logsumexp(0)) + before.logsumexp(0)
    share = log_task_weights.softmax(0)
    task_weights.copy_(
        weight_total * ((1.0 - task_weights.numel() * min_weight) * share + min_weight)
    )
    num_steps += 1


def combine_(
    task_grads: Sequence[Tensor],
    outputs: Sequence[Tensor],
    param_numels: Tensor,
    chunk_map: Tensor,
    grad_scale: Tensor | None,
    task_weights: Tensor,
    found_nonfinite: Tensor,
    sq_grad_sum: Tensor,
    grad_mean: Tensor,
    *,
    gradient_momentum: float,
    accumulate: bool,
    num_steps: Tensor | None = None,
    num_skipped_steps: Tensor | None = None,
    rounding_seed: int = 0,
    first_task: int = 0,
) -> None:
    r"""Writes (or adds) :math:`\sum_i \alpha_i g_i`; after a non-finite step repairs S and m and writes NaN."""
    num_tasks, num_tensors = task_weights.numel(), param_numels.numel()
    _check_rounding(sq_grad_sum, num_steps, num_skipped_steps)
    if bool(found_nonfinite.any()):
        if sq_grad_sum.numel() > 0:
            words = [
                _row_words(
                    sq_grad_sum,
                    first_task + task,
                    param_numels,
                    rounding_seed,
                    num_steps,
                    num_skipped_steps,
                    is_repair=True,
                )
                for task in range(num_tasks)
            ]
            _repair_state(
                task_grads,
                param_numels,
                grad_scale,
                sq_grad_sum,
                grad_mean,
                gradient_momentum,
                words,
            )
        for output in outputs:
            output.fill_(float("nan"))
        return
    for index, output in enumerate(outputs):
        if output.numel() == 0:
            continue
        grads = [task_grads[task * num_tensors + index] for task in range(num_tasks)]
        wide = torch.promote_types(output.dtype, torch.float32)
        for grad in grads:
            wide = torch.promote_types(wide, grad.dtype)
        total = torch.zeros(output.shape, dtype=wide, device=output.device)
        for weight, grad in zip(task_weights, grads, strict=True):
            if grad.numel() > 0:
                total += weight.to(wide) * grad.to(wide).reshape(output.shape)
        output.copy_(output.to(wide) + total if accumulate else total)


def fused_step_combine_(
    task_grads: Sequence[Tensor],
    outputs: Sequence[Tensor],
    param_numels: Tensor,
    chunk_map: Tensor,
    grad_scale: Tensor | None,
    sq_grad_sum: Tensor,
    grad_mean: Tensor,
    excess_risk: Tensor,
    relative_excess_risk: Tensor,
    baseline_excess_risk: Tensor,
    log_task_weights: Tensor,
    task_weights: Tensor,
    num_steps: Tensor,
    num_task_steps: Tensor,
    num_skipped_steps: Tensor,
    found_nonfinite: Tensor,
    ticket: Tensor,
    *,
    sqrt_fisher: bool,
    eps: float,
    gradient_momentum: float,
    robust_step_size: float,
    num_warmup_steps: int,
    relative: bool,
    min_weight: float,
    weight_total: float,
    accumulate: bool,
    rounding_seed: int = 0,
) -> None:
    """One step, then the weighted sum of its gradients under the new weights (Algorithm 1)."""
    fused_step_(
        task_grads,
        param_numels,
        chunk_map,
        grad_scale,
        sq_grad_sum,
        grad_mean,
        excess_risk,
        relative_excess_risk,
        baseline_excess_risk,
        log_task_weights,
        task_weights,
        num_steps,
        num_task_steps,
        num_skipped_steps,
        found_nonfinite,
        ticket,
        sqrt_fisher=sqrt_fisher,
        eps=eps,
        gradient_momentum=gradient_momentum,
        robust_step_size=robust_step_size,
        num_warmup_steps=num_warmup_steps,
        relative=relative,
        min_weight=min_weight,
        weight_total=weight_total,
        rounding_seed=rounding_seed,
    )
    combine_(
        task_grads,
        outputs,
        param_numels,
        chunk_map,
        grad_scale,
        task_weights,
        found_nonfinite,
        sq_grad_sum,
        grad_mean,
        gradient_momentum=gradient_momentum,
        accumulate=accumulate,
        num_steps=num_steps,
        num_skipped_steps=num_skipped_steps,
        rounding_seed=rounding_seed,
    )


def _repair_state(
    task_grads: Sequence[Tensor],
    param_numels: Tensor,
    grad_scale: Tensor | None,
    sq_grad_sum: Tensor,
    grad_mean: Tensor,
    gradient_momentum: float,
    words: Sequence[Iterator[Tensor | None]],
) -> None:
    """Takes the finite squares of a skipped step out of S again, and the gradients out of m: exact up to rounding."""
    num_tensors = param_numels.numel()
    wide = torch.promote_types(sq_grad_sum.dtype, torch.float32)
    for task in range(sq_grad_sum.shape[0]):
        grads = _task_grads_of(task_grads, task, num_tensors)
        sums = segments(sq_grad_sum[task], param_numels)
        means = (
            segments(grad_mean[task], param_numels)
            if gradient_momentum > 0
            else [None] * num_tensors
        )
        for grad, sq_sum, mean, word in zip(grads, sums, means, words[task], strict=True):
            if grad.numel() == 0:
                continue
            g = grad.reshape(-1).to(wide)
            if grad_scale is not None:
                g = g * grad_scale.to(g).reciprocal()
            sq = g * g
            total = sq_sum.to(wide)
            total = torch.where(sq.isfinite(), (total - sq).clamp(min=0.0), total)
            _store(sq_sum, total, None if word is None else word & 0xFFFF)
            if mean is not None:
                moved = mean.to(wide)
                before = (moved - g * (1 - gradient_momentum)) / gradient_momentum
                before = torch.where(sq.isfinite(), before, moved)
                _store(mean, before, None if word is None else word >> 16)


def fold_(
    task_grads: Sequence[Tensor],
    param_numels: Tensor,
    chunk_map: Tensor,
    log_weight: Tensor,
    running_sum: Tensor,
    running_log_max: Tensor,
) -> None:
    r"""Streaming: takes one task's gradient into :math:`\sum_i e^{\ell_i - M} g_i`, M the largest log-weight so far."""
    log_max = torch.maximum(log_weight, running_log_max)
    running_sum *= (running_log_max - log_max).exp().to(running_sum.dtype)
    add = (log_weight - log_max).exp().to(running_sum.dtype)
    for grad, total in zip(task_grads, segments(running_sum, param_numels), strict=True):
        if grad.numel() > 0:
            total += add * grad.reshape(-1).to(running_sum.dtype)
    running_log_max.copy_(log_max)
