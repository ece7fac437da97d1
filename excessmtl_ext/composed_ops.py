"""Ops with ``move``, squares or weights [T, L], made of ops without them and of torch ops where no kernel has it.

None makes a device wait.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from excessmtl_ext import bounded_moves, gradient_sizes
from excessmtl_ext.reference_rows import present_rows
from excessmtl_ext.state import ParamLayout


def run(ops: Any, name: str, given: dict[str, Any]) -> bool:
    """Runs an op if its arguments are such that it has to be composed.

    Args:
        ops: :mod:`excessmtl_ext.functional`.
        name: Of the function there.
        given: Its arguments.

    Returns:
        Whether it has been run.
    """
    is_wide = {
        "fused_step_": given.get("move") is not None,
        "fused_step_combine_": given.get("move") is not None,
        "commit_step_": True,
        "accumulate_excess_risk_": given.get("square_sums") is not None,
        "combine_": given["task_weights"].dim() == 2 if "task_weights" in given else False,
        "weighted_sum_": given["task_weights"].dim() == 2 if "task_weights" in given else False,
        "fold_": given["log_weight"].numel() != 1 if "log_weight" in given else False,
    }
    if not is_wide.get(name, False):
        return False
    _COMPOSED[name](ops, given)
    return True


@functools.cache
def _layout_of(numel: int) -> ParamLayout:
    return ParamLayout([numel])


def _arguments(given: dict[str, Any], *names: str) -> list[Any]:
    return [given[name] for name in names]


def _fused_step(ops: Any, given: dict[str, Any]) -> None:
    grads, layout, state = _arguments(given, "task_grads", "layout", "state")
    options, move = _arguments(given, "options", "move")
    tasks = present_rows(grads, state.task_weights.numel(), layout)
    state.found_nonfinite.zero_()
    sums, squares = torch.zeros_like(state.excess_risk), torch.zeros_like(move.tensor_mean_square)
    rows = state.sq_grad_sum, state.grad_mean
    ops.accumulate_excess_risk_(
        grads,
        layout,
        *rows,
        sums,
        state.ticket,
        options,
        given["grad_scale"],
        state=state,
        square_sums=squares,
    )
    ops.commit_step_(sums, squares, tasks, layout, state, options, move=move, moves=given["moves"])


def _fused_step_combine(ops: Any, given: dict[str, Any]) -> None:
    _fused_step(ops, given)
    is_per_tensor = given["moves"].per_tensor
    ops.combine_(
        *_arguments(given, "task_grads", "outputs", "layout", "state", "options", "grad_scale"),
        accumulate=given["accumulate"],
        weights=given["move"].tensor_weights if is_per_tensor else None,
    )


def _accumulate_excess_risk(ops: Any, given: dict[str, Any]) -> None:
    square_sums = given["square_sums"]
    ops.accumulate_excess_risk_(**{**given, "square_sums": None})
    num_tensors = len(given["layout"].numels)
    if num_tensors:
        grads, scale = _arguments(given, "task_grads", "grad_scale")
        square_sums.copy_(gradient_sizes.sums_of_squares(grads, num_tensors, scale))


def _commit_step(ops: Any, given: dict[str, Any]) -> None:
    names = (
        "excess_risk_sum",
        "square_sums",
        "tasks",
        "layout",
        "state",
        "options",
        "move",
        "moves",
    )
    bounded_moves.commit_step_(
        *_arguments(given, *names),
        risk_share=given["risk_share"],
        moves_weights=given["moves_weights"],
        update_task_risks_=ops.update_task_risks_,
        update_task_weights_=ops.update_task_weights_,
    )


def _combine(ops: Any, given: dict[str, Any]) -> None:
    ops.weighted_sum_(
        *_arguments(given, "task_grads", "outputs", "layout", "task_weights"),
        found_nonfinite=given["state"].found_nonfinite,
        accumulate=given["accumulate"],
    )


def _weighted_sum(ops: Any, given: dict[str, Any]) -> None:
    layout = given["layout"]
    columns = given["task_weights"].t().contiguous()
    for index, output in enumerate(given["outputs"]):
        ops.weighted_sum_(
            given["task_grads"][index :: len(layout.numels)],
            [output],
            _layout_of(layout.numels[index]),
            columns[index],
            found_nonfinite=given["found_nonfinite"],
            accumulate=given["accumulate"],
        )


def _fold(ops: Any, given: dict[str, Any]) -> None:
    log_weight, log_max, total = _arguments(given, "log_weight", "running_log_max", "running_sum")
    start = 0
    for index, grad in enumerate(given["task_grads"]):
        each = _layout_of(given["layout"].numels[index])
        stop = start + each.padded_numel
        if grad.numel() > 0:
            ops.fold_([grad], each, log_weight[index], total[start:stop], log_max[index])
        start = stop


_COMPOSED: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "fused_step_": _fused_step,
    "fused_step_combine_": _fused_step_combine,
    "accumulate_excess_risk_": _accumulate_excess_risk,
    "commit_step_": _commit_step,
    "combine_": _combine,
    "weighted_sum_": _weighted_sum,
    "fold_": _fold,
}
