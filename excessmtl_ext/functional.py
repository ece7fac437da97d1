"""Stateless layer over the compiled ops, for training loops and balancers of another shape.

:class:`StepState` holds the tensors that a step changes, :class:`StepOptions` the choices,
:class:`ParamLayout` how the shared parameters lie in the flat state. Every function here mutates
the state it is given and returns nothing; on a device without a compiled op the call goes to
:mod:`excessmtl_ext.reference`, which takes the same arguments.

Symbols: T tasks, L shared parameter tensors, P their elements in all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from excessmtl_ext import _extension, composed_ops, gpu_support, reference
from excessmtl_ext import op_calls as ops
from excessmtl_ext.reference import find_nonfinite
from excessmtl_ext.state import (
    MAX_TASKS,
    SMALLEST_EPS,
    Fisher,
    MoveOptions,
    MoveState,
    ParamLayout,
    StepOptions,
    StepState,
    init_move_state,
    init_state,
    segments,
)


def lay_out(
    plan: ops.ArgumentPlan, device: torch.device, given: dict[str, Any], *, by_sizes: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and the keyword arguments of an op, from the sources that a plan numbers.

    With ``by_sizes`` the sizes of the parameters are a list and not a tensor.
    """
    layout, options = given.get("layout"), given.get("options") or ops.DEFAULT_OPTIONS
    move, moves = given.get("move"), given.get("moves") or ops.PLAIN
    sizes = layout and (list(layout.numels) if by_sizes else layout.param_numels)
    sources = (
        given,
        given.get("state") or ops.NO_STATE,
        options,
        () if layout is None else (sizes, layout.chunk_maps[device]),
        (options[0] == "sqrt",),
        move or ops.NO_MOVE,
        (move.weight_floors if move is not None and moves.has_floors else None,),
        moves,
    )
    positional = [sources[source][key] for source, key in plan.positional]
    return tuple(positional), {name: sources[source][key] for name, source, key in plan.keywords}


_HERE = sys.modules[__name__]
_PLANS: dict[Callable[..., None], tuple[Callable[..., None], ops.ArgumentPlan]] = {}


def _call(
    twin: Callable[..., None], device: torch.device, given: dict[str, Any], name: str | None = None
) -> None:
    """Runs the op compiled for ``device``, named like ``twin`` unless ``name`` is given, or the twin."""
    is_gpu = device.type == "cuda"
    if not (gpu_support.runs_on(device) if is_gpu else device.type in ops.COMPILED_FOR):
        twin(**{name: given[name] for name in ops.twin_parameters(twin)})
        return
    if device.type in ops.COMPOSED_ON and composed_ops.run(_HERE, twin.__name__, given):
        return
    if twin not in _PLANS:
        name = name or twin.__name__
        _PLANS[twin] = ops.find_op(name), ops.plan_arguments(name, frozenset(given))
    run, plan = _PLANS[twin]
    by_sizes, is_traced = False, torch.compiler.is_compiling()
    if is_traced and device.type in ops.SIZES_IN_GRAPHS_ON:
        sized = ops.WITH_SIZES[name or twin.__name__]
        run, by_sizes = sized or run, sized is not None
    positional, keywords = lay_out(plan, device, given, by_sizes=by_sizes)
    run(*positional, **keywords)
    if is_traced or torch.is_inference_mode_enabled():
        return
    # The dispatcher tells autograd of what torch's own ops write, so that a tensor it has saved is an error.
    written = [positional[index] for index in plan.written]
    outputs = written.pop(0) if isinstance(written[0], (list, tuple)) else ()
    written += [keywords[name] for name in plan.written_keywords]
    present = [each for each in (*outputs, *written) if each is not None]
    increment_version([each for each in present if not each.is_inference()])


def fused_step_(
    task_grads: Sequence[Tensor],
    layout: ParamLayout,
    state: StepState,
    options: StepOptions,
    grad_scale: Tensor | None = None,
    *,
    move: MoveState | None = None,
    moves: MoveOptions = ops.PLAIN,
) -> None:
    r"""Takes one step of ExcessMTL over all tasks (He et al. 2024, Eqs. 6, 7, 9): one pass over gradients and state.

    Args:
        task_grads: T * L gradients, task-major: task i, parameter l at index i * L + l. Any of
            float64, float32, bfloat16 and float16, any strides. A tensor without elements stands
            for "no gradient"; a task that has none is absent.
        layout: Sizes of the L parameters.
        state: Changed in place.
        options: The choices.
        grad_scale: One number on the device by which the gradients are multiplied (GradScaler);
            undone inside.
        move: Changed in place; None: none of ``moves``.
        moves: The choices besides ``options``, not plain where ``move`` is given.

    Raises:
        RuntimeError: a gradient's size, dtype or device does not fit; nothing has changed then.

    A non-finite gradient sets ``state.found_nonfinite``, counts in ``num_skipped_steps`` and changes
    nothing else: S and m are written when it is known that the step counts.
    """
    _call(reference.fused_step_, state.task_weights.device, locals())


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
    """Does the first third of :func:`fused_step_`: S and m of R tasks, and their raw risk sums (Eqs. 6-7).

    Args:
        task_grads: R * L gradients, task-major.
        layout: Sizes of the L parameters.
        sq_grad_sum: [R, padded P] rows of S, changed in place.
        grad_mean: [R, padded P] rows of m, or [R, 0].
        excess_risk_sum: [R] float64, written for the tasks that are present. Where any gradient is
            not finite: NaN for its task and 0 for the others; then no row is written.
        ticket: As in :class:`StepState`.
        options: The choices.
        grad_scale: As in :func:`fused_step_`.
        state: What the rows are of; only bfloat16 rows need it, whose rounding depends on the step.
        first_task: The task of the first row.
        known_nonfinite: [R] bool, where the gradients of any rank are not finite, as
            :func:`find_nonfinite` says of one; None: looks at these gradients.
        square_sums: [R, L] float64 for the sums of squares of each gradient, 0 where there is none.
    """
    _call(reference.accumulate_excess_risk_, sq_grad_sum.device, locals())


def update_task_risks_(
    excess_risk_sum: Tensor,
    tasks: Sequence[int],
    layout: ParamLayout,
    state: StepState,
    options: StepOptions,
) -> None:
    """Does the second third of :func:`fused_step_`: commits risk, baseline and count of ``tasks`` (Sec. 3.2).

    Flags the tasks whose sum is not finite in ``state.found_nonfinite`` and then commits none.

    Args:
        excess_risk_sum: [T] float64, summed over ranks if there are any.
        tasks: Indices of the tasks that took part.
        layout: Sizes of the parameters.
        state: Changed in place.
        options: The choices.
    """
    scale = {"raw_risk_scale": layout.raw_risk_scale[options.fisher]}
    _call(reference.update_task_risks_, excess_risk_sum.device, {**locals(), **scale})


def update_task_weights_(tasks: Sequence[int], state: StepState, options: StepOptions) -> None:
    """Does the last third of :func:`fused_step_`: moves the weights of ``tasks`` (Eq. 9), counts the step or the skip.

    Args:
        tasks: Indices of the tasks that took part; the others keep their weights.
        state: Changed in place.
        options: The choices.
    """
    _call(reference.update_task_weights_, state.task_weights.device, locals())


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
    """Does the last two thirds of :func:`fused_step_` with ``move``: from the sums to the weights and factors.

    Args:
        excess_risk_sum: [T] float64, of all ranks; None: ``tasks`` have been taken in before.
        square_sums: [T, L] float64 like it, or [1, L] of the only task; None as it.
        tasks: Indices of the tasks that took part.
        layout: Sizes of the L parameters.
        state: Changed in place, but for S and m.
        options: The choices.
        move: Changed in place.
        moves: The choices besides ``options``.
        risk_share: [T] float64, written for ``tasks``: their shares of signal, which are then not added to their sums.
        moves_weights: Whether the weights move and the step is counted, or the tasks are only taken in.
    """
    scale = {"raw_risk_scale": layout.raw_risk_scale[options.fisher]}
    _call(reference.commit_step_, state.task_weights.device, {**locals(), **scale})


def repair_(
    task_grads: Sequence[Tensor],
    layout: ParamLayout,
    sq_grad_sum: Tensor,
    grad_mean: Tensor,
    found_nonfinite: Tensor,
    options: StepOptions,
    grad_scale: Tensor | None = None,
    *,
    state: StepState | None = None,
    first_task: int = 0,
) -> None:
    """Does nothing: a step that is not finite has written no state.

    Loops written for earlier releases call it after :func:`accumulate_excess_risk_`. Those in which
    several ranks share a step pass ``known_nonfinite`` there instead.
    """


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
    r"""Writes :math:`\sum_i \alpha_i g_i` into ``outputs`` (He et al. 2024, Algorithm 1); NaN after a non-finite step.

    Args:
        task_grads: The T * L gradients of the step.
        outputs: L contiguous tensors, or none. ``outputs[l]`` may be the gradient of one task for
            parameter l; one without elements is passed over.
        layout: Sizes of the parameters.
        state: Gives the weights and the flags.
        options: The choices.
        grad_scale: As in the step; ``outputs`` keep the scale.
        accumulate: Add to ``outputs`` instead of overwriting them.
        weights: Factors [T] or [T, L], float64; the state's weights if None.
    """
    factors = {"task_weights": state.task_weights if weights is None else weights}
    _call(reference.combine_, state.task_weights.device, {**locals(), **factors, "first_task": 0})


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
    moves: MoveOptions = ops.PLAIN,
) -> None:
    """:func:`fused_step_`, then :func:`combine_` with its weights, in one call: one dispatch instead of two.

    On CUDA one cooperative launch does both where the gradients stay in the L2 cache, so that the
    second phase finds them there: T * P of one type, no more than half of that cache, in at most
    448 tensors with the outputs. Elsewhere two launches. The results are those of the two calls;
    on the CPU to the bit.

    Args:
        task_grads: As in the step.
        outputs: As in :func:`combine_`; ``outputs[l]`` may be one of ``task_grads``.
        layout: Sizes of the L parameters.
        state: Changed in place.
        options: The choices.
        grad_scale: As in the step.
        accumulate: Add to ``outputs`` instead of overwriting them.
        move: As in the step; with ``per_tensor`` its ``tensor_weights`` are the factors of the sum.
        moves: As in the step.

    Raises:
        RuntimeError: an argument does not fit; neither state nor ``outputs`` have changed then.
    """
    _call(reference.fused_step_combine_, state.task_weights.device, locals())


def weighted_sum_(
    task_grads: Sequence[Tensor],
    outputs: Sequence[Tensor],
    layout: ParamLayout,
    task_weights: Tensor,
    *,
    found_nonfinite: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """:func:`combine_` for weights that come from anywhere.

    Args:
        task_grads: R * L gradients, task-major.
        outputs: L contiguous tensors.
        layout: Sizes of the parameters.
        task_weights: [R] or, one per parameter, [R, L]; float64 on the device of the gradients.
        found_nonfinite: [R] bool; where any is set, ``outputs`` are filled with NaN.
        accumulate: Add to ``outputs`` instead of overwriting them.
    """
    num_tasks = task_weights.shape[0]
    if found_nonfinite is None:
        found_nonfinite = torch.zeros(num_tasks, dtype=torch.bool, device=task_weights.device)
    no_rows = task_weights.new_empty(num_tasks, 0)
    of_no_state = {
        "sq_grad_sum": no_rows,
        "grad_mean": no_rows,
        "grad_scale": None,
        "first_task": 0,
    }
    _call(
        reference.weighted_sum_, task_weights.device, {**locals(), **of_no_state}, name="combine_"
    )


def fold_(
    task_grads: Sequence[Tensor],
    layout: ParamLayout,
    log_weight: Tensor,
    running_sum: Tensor,
    running_log_max: Tensor,
) -> None:
    r"""Streaming: takes one task's gradient into :math:`\sum_i e^{\ell_i - M} g_i`, M the largest log-weight so far.

    Args:
        task_grads: The task's L gradients.
        layout: Sizes of the parameters.
        log_weight: [] float64, the task's log-weight, of any normalisation; or [L], one per parameter.
        running_sum: [padded P], float32 or float64, zero before the first task; changed in place.
        running_log_max: Like ``log_weight``, M, -inf before the first task; changed in place.
    """
    _call(reference.fold_, running_sum.device, locals())


def cpu_capability() -> str:
    """Returns which CPU code path runs: ``"avx512"``, ``"avx2"``, ``"default"``, or ``"reference"`` without ops.

    ``EXCESSMTL_CPU_CAPABILITY=avx2`` (or ``default``) lowers it, read at the first op.
    """
    if not _extension.has_op_for("cpu"):
        return "reference"
    return torch.ops.excessmtl_ext.cpu_capability.default()


__all__ = [
    "MAX_TASKS",
    "SMALLEST_EPS",
    "Fisher",
    "MoveOptions",
    "MoveState",
    "ParamLayout",
    "StepOptions",
    "StepState",
    "accumulate_excess_risk_",
    "combine_",
    "commit_step_",
    "cpu_capability",
    "find_nonfinite",
    "fold_",
    "fused_step_",
    "fused_step_combine_",
    "init_move_state",
    "init_state",
    "repair_",
    "segments",
    "update_task_risks_",
    "update_task_weights_",
    "weighted_sum_",
]
