"""The flat arguments of an op, for those who call ``torch.ops.excessmtl_ext`` themselves."""

from __future__ import annotations

from typing import Any

import torch

from excessmtl_ext import functional
from excessmtl_ext import op_calls as ops
from excessmtl_ext.state import MoveOptions, MoveState, ParamLayout, StepOptions, StepState


def op_arguments(
    name: str,
    device: torch.device,
    layout: ParamLayout | None = None,
    state: StepState | None = None,
    options: StepOptions = ops.DEFAULT_OPTIONS,
    move: MoveState | None = None,
    moves: MoveOptions = ops.PLAIN,
    **given: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Lays out the arguments of an op by the names in its schema.

    Args:
        name: Of the op.
        device: Of the step.
        layout: Gives ``param_numels``, ``chunk_map`` and ``raw_risk_scale``.
        state: Gives what the schema names as a field of the state.
        options: Give what the schema names as one of the options.
        move: Gives what the schema names as a field of it.
        moves: Give what the schema names as one of these choices.
        **given: The other arguments, and those that are to be others than the state's.

    Returns:
        The positional and the keyword arguments.
    """
    if layout is not None:
        given.setdefault("raw_risk_scale", options.raw_risk_scale(layout))
    plan = ops.plan_arguments(name, frozenset(given))
    sources = {"layout": layout, "state": state, "options": options, "move": move, "moves": moves}
    return functional.lay_out(plan, device, {**sources, **given})
