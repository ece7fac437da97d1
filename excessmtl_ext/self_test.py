"""A small case of every op, run on :mod:`~excessmtl_ext.functional` and on its twin, and compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from excessmtl_ext import functional, reference
from excessmtl_ext.state import (
    MoveOptions,
    ParamLayout,
    StepOptions,
    StepState,
    init_move_state,
)

NUM_TASKS = 3
NUMELS = (5, 64, 1_000)
"""A parameter shorter than a vector register, one of whole registers, one with a rest."""

LAYOUT = ParamLayout(NUMELS)

OPTIONS = StepOptions(gradient_momentum=0.5, robust_step_size=0.1, min_weight=0.01)
LINEAR = OPTIONS._replace(fisher="linear")
MOVES = MoveOptions(max_log_ratio=0.7, per_tensor=True)

# Looks for wrong answers, not for last digits: the kernels divide and take roots in float32 with an error of 2 units.
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 1e-4, 1e-6


def _grads(device: torch.device, seed: int = 0) -> list[Tensor]:
    """Returns T * L gradients, the same on every device; the second task has none for the first parameter."""
    generator = torch.Generator().manual_seed(seed)
    grads = [
        torch.randn(numel, generator=generator) * (1 + task)
        for task in range(NUM_TASKS)
        for numel in NUMELS
    ]
    grads[len(NUMELS)] = torch.empty(0)
    return [grad.to(device) for grad in grads]


def _state(device: torch.device) -> StepState:
    return functional.init_state(NUM_TASKS, LAYOUT, device=device, has_momentum=True)


def _outputs(device: torch.device) -> list[Tensor]:
    return [torch.zeros(numel, device=device) for numel in NUMELS]


def _run_fused_step(ops: Any, device: torch.device) -> list[Tensor]:
    state = _state(device)
    for seed in range(2):
        ops.fused_step_(_grads(device, seed), LAYOUT, state, OPTIONS)
    return list(state)


def _run_fused_step_combine(ops: Any, device: torch.device) -> list[Tensor]:
    state, outputs = _state(device), _outputs(device)
    move = init_move_state(NUM_TASKS, len(NUMELS), device=device)
    for seed in range(2):
        ops.fused_step_combine_(
            _grads(device, seed), outputs, LAYOUT, state, OPTIONS, accumulate=True
        )
    for seed in range(2):
        ops.fused_step_combine_(
            _grads(device, seed), outputs, LAYOUT, state, LINEAR, move=move, moves=MOVES
        )
    return [*state, *move, *outputs]


def _run_accumulate_excess_risk(ops: Any, device: torch.device) -> list[Tensor]:
    state = _state(device)
    sums = torch.zeros_like(state.excess_risk)
    rows = (state.sq_grad_sum, state.grad_mean)
    ops.accumulate_excess_risk_(_grads(device), LAYOUT, *rows, sums, state.ticket, OPTIONS)
    return [*rows, sums]


def _run_update_task_risks(ops: Any, device: torch.device) -> list[Tensor]:
    state = _state(device)
    for step in range(2):
        sums = torch.arange(1.0, NUM_TASKS + 1, dtype=torch.float64).to(device) / (step + 1)
        ops.update_task_risks_(sums, list(range(NUM_TASKS)), LAYOUT, state, OPTIONS)
        state.num_steps.add_(1)
    return list(state)


def _run_update_task_weights(ops: Any, device: torch.device) -> list[Tensor]:
    state = _state(device)
    state.num_steps.fill_(OPTIONS.num_warmup_steps)
    state.relative_excess_risk.copy_(torch.arange(1.0, NUM_TASKS + 1))
    ops.update_task_weights_(list(range(NUM_TASKS)), state, OPTIONS)
    return list(state)


def _run_combine(ops: Any, device: torch.device) -> list[Tensor]:
    state, outputs = _state(device), _outputs(device)
    ops.combine_(_grads(device), outputs, LAYOUT, state, OPTIONS)
    return outputs


def _run_fold(ops: Any, device: torch.device) -> list[Tensor]:
    running_sum = torch.zeros(LAYOUT.padded_numel, device=device)
    running_log_max = torch.full((), -math.inf, dtype=torch.float64, device=device)
    grads = _grads(device)
    for task in range(NUM_TASKS):
        own = grads[task * len(NUMELS) : (task + 1) * len(NUMELS)]
        log_weight = torch.full((), 0.5 * task, dtype=torch.float64, device=device)
        ops.fold_(own, LAYOUT, log_weight, running_sum, running_log_max)
    return [running_sum, running_log_max]


def _run_commit_step(ops: Any, device: torch.device) -> list[Tensor]:
    state, move = _state(device), init_move_state(NUM_TASKS, len(NUMELS), device=device)
    for step in range(2):
        sums = torch.arange(1.0, NUM_TASKS + 1, dtype=torch.float64).to(device) / (step + 1)
        squares = sums[:, None] * torch.arange(1.0, len(NUMELS) + 1).to(sums)
        tasks = list(range(NUM_TASKS))
        ops.commit_step_(sums, squares, tasks, LAYOUT, state, LINEAR, move=move, moves=MOVES)
    return [*state, *move]


CASES: dict[str, Callable[[Any, torch.device], list[Tensor]]] = {
    "fused_step_": _run_fused_step,
    "fused_step_combine_": _run_fused_step_combine,
    "accumulate_excess_risk_": _run_accumulate_excess_risk,
    "update_task_risks_": _run_update_task_risks,
    "update_task_weights_": _run_update_task_weights,
    "commit_step_": _run_commit_step,
    "combine_": _run_combine,
    "fold_": _run_fold,
}
"""A small case of every op: runs on ``functional`` or its twin, and returns what that wrote."""


def problem_with(name: str, device: torch.device, compiled: Any = functional) -> str | None:
    """Runs an op's case twice; returns what is wrong with ``compiled``, or None.

    Args:
        name: Of the op.
        device: Where to run.
        compiled: What is compared with the reference.
    """
    run = CASES[name]
    try:
        actual = run(compiled, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # whatever a kernel raises is the finding
        return f"fails: {str(error).strip().splitlines()[0]}"
    expected = run(reference, device)
    for left, right in zip(actual, expected, strict=True):
        if not torch.allclose(
            left.double(), right.double(), RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE, equal_nan=True
        ):
            difference = (left.double() - right.double()).abs().max().item()
            return f"differs from the reference by up to {difference:.2g}. Please report it."
    return None
