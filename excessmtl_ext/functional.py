"""Stateless layer over the compiled ops, for training loops and balancers of another shape.

:class:`StepState` holds the tensors that a step changes, :class:`StepOptions` the choices,
:class:`ParamLayout` how the shared parameters lie in the flat state. Every function here mutates
the state it is given and returns nothing; on a device without a compiled op the call goes to
:mod:`excessmtl_ext.reference`, which takes the same arguments.

Symbols: T tasks, L shared parameter tensors, P their elements in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from excessmtl_ext import _extension, gpu_support, reference
from excessmtl_ext import op_calls as ops
from excessmtl_ext.reference import find_nonfinite
from excessmtl_ext.state import (
    CUDA_CHUNK_NUMEL,
    MAX_LOG_STEP,
    MAX_TASKS,
    SEGMENT_ALIGNMENT,
    SMALLEST_EPS,
    Fisher,
    ParamLayout,
    StepOptions,
    StepState,
    init_state,
    padded_numel,
    segments,
)

_DEFAULT_OPTIONS = StepOptions()


def op_arguments(
    name: str,
    device: torch.device,
    layout: ParamLayout | None = None,
    state: StepState | None = None,
    options: StepOptions = _DEFAULT_OPTIONS,
    **given: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Lays out the arguments of an op by the names in its schema.

    Args:
        name: Of the op.
        device: Of the step.
        layout: Gives ``param_numels``, ``chunk_map`` and ``raw_risk_scale``.
        state: Gives what the schema names as a field of the state.
        options: Give what the schema names as one of the options.
        **given: The other arguments, and those that are to be others than the state's.

    Returns:
        The positional and the keyword arguments.
    """
    if layout is not None:
        given.setdefault("raw_risk_scale", options.raw_risk_scale(layout))
    plan = ops.plan_arguments(name, frozenset(given))
    return _lay_out(plan, device, given, layout, state, options)


def _lay_out(
    plan: ops.ArgumentPlan,
    device: torch.device,
    given: dict[str, Any],
    layout: ParamLayout | None,
    state: StepState | None,
    options: StepOptions,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    of_layout = (layout.param_numels, layout.chunk_maps[device]) if layout is not None else ()
    of_options = (options[0] == "sqrt",)
    sources = given, state or ops.NO_STATE, options, of_layout, of_options  # as a plan numbers them
    positional = [sources[source][key] for source, key in plan.positional]
    return tuple(positional), {name: sources[source][key] for name, source, key in plan.keywords}


_PLANS: dict[Callable[..., None], tuple[Callable[..., None], ops.ArgumentPlan]] = {}


def _call(
    twin: Callable[..., None], device: torch.device, given: dict[str, Any], name: str | None = None
) -> None:
    """Runs the op compiled for ``device``, named like ``twin`` unless ``name`` is given, or the twin."""
    is_gpu = device.type == "cuda"
    if not (gpu_support.runs_on(device) if is_gpu else device.type in ops.COMPILED_FOR):
        twin(**{name: given[name] for name in ops.twin_parameters(twin)})
        return
    if twin not in _PLANS:
        name = name or twin.__name__
        _PLANS[twin] = ops.find_op(name), ops.plan_arguments(name, frozenset(given))
    run, plan = _PLANS[twin]
    layout, state, options = given.get("layout"), given.get("state"), given.get("options")
    positional, keywords = _lay_out(plan, device, given, layout, state, options or _DEFAULT_OPTIONS)
    run(*positional, **keywords)
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return
    # The dispatcher tells autograd of what torch's own ops write, so that a tensor it has saved is an error.
    written = [positional[index] for index in plan.written]
    outputs = written.pop(0) if isinstance(written[0], (list, tuple)) else ()
    increment_version([each for each in (*outputs, *written) if not each.is_inference()])


def fused_step_(
    task_grads: Sequence[Tensor],
    layout: ParamLayout,
    state: StepState,
    options: StepOptions,
    grad_scale: Tensor | None = None,
) -> None:
    r"""One step of ExcessMTL over all tasks (He et al. 2024, Eqs. 6, 7, 9): one pass over gradients and state.

    Args:
        task_grads: T * L gradients, task-major: task i, parameter l at index i * L + l. Any of
            float64, float32, bfloat16 and float16, any strides. A tensor without elements stands
            for "no gradient"; a task that has none is absent.
        layout: Sizes of the L parameters.
        state: Changed in place.
        options: The choices.
        grad_scale: One number on the device by which the gradients are multiplied (GradScaler);
            undone inside.

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
) -> None:
    """First third of :func:`fused_step_`: S and m of R tasks, and their raw risk sums (Eqs. 6-7).

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
    """
    _call(reference.accumulate_excess_risk_, sq_grad_sum.device, locals())


def update_task_risks_(
    excess_risk_sum: Tensor,
    tasks: Sequence[int],
    layout: ParamLayout,
    state: StepState,
    options: StepOptions,
) -> None:
    """Second third of :func:`fused_step_`: commits risk, baseline and count of ``tasks`` (Sec. 3.2).

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
    """Last third of :func:`fused_step_`: moves the weights of ``tasks`` (Eq. 9), counts the step or the skip.

    Args:
        tasks: Indices of the tasks that took part; the others keep their weights.
        state: Changed in place.
        options: The choices.
    """
    _call(reference.update_task_weights_, state.task_weights.device, locals())


def combine_(
    task_grads: Sequence[Tensor],
    outputs: Sequence[Tensor],
    layout: ParamLayout,
    state: StepState,
    options: StepOptions,
    grad_scale: Tensor | None = None,
    *,
    accumulate: bool = False,
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
    """
    _call(reference.combine_, state.task_weights.device, {**locals(), "first_task": 0})


def fused_step_combine_(
    task_grads: Sequence[Tensor],
    outputs: Sequence[Tensor],
    layout: ParamLayout,
    state: StepState,
    options: StepOptions,
    grad_scale: Tensor | None = None,
    *,
    accumulate: bool = False,
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
        task_weights: [R] float64 on the device of the gradients.
        found_nonfinite: [R] bool; where any is set, ``outputs`` are filled with NaN.
        accumulate: Add to ``outputs`` instead of overwriting them.
    """
    num_tasks = task_weights.numel()
    if found_nonfinite is None:
        found_nonfinite = torch.zeros(num_tasks, dtype=torch.bool, device=task_weights.device)
    rows = task_weights.new_empty(num_tasks, 0)
    no_state = {"sq_grad_sum": rows, "grad_mean": rows, "grad_scale": None, "first_task": 0}
    _call(reference.weighted_sum_, task_weights.device, {**locals(), **no_state}, name="combine_")


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


def estimate_task_risk_(
    task: int,
    grads: Sequence[Tensor],
    layout: ParamLayout,
    state: StepState,
    options: StepOptions,
    grad_scale: Tensor | None = None,
) -> None:
    """Takes in the gradients of one task: S, m, risk and baseline; not finite, they change its flag only.

    Args:
        task: Index of the task.
        grads: Its L gradients.
        layout: Sizes of the L parameters.
        state: Changed in place, but for the weights.
        options: The choices.
        grad_scale: As in :func:`fused_step_`.
    """
    row, sums = slice(task, task + 1), torch.zeros_like(state.excess_risk)
    rows = state.sq_grad_sum[row], state.grad_mean[row]
    of_task: dict[str, Any] = {"state": state, "first_task": task}
    accumulate_excess_risk_(
        grads, layout, *rows, sums[row], state.ticket, options, grad_scale, **of_task
    )
    update_task_risks_(sums, [task], layout, state, options)


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
        log_weight: [] float64, the task's log-weight, of any normalisation.
        running_sum: [padded P], float32 or float64, zero before the first task; changed in place.
        running_log_max: [] float64, M, -inf before the first task; changed in place.
    """
    _call(reference.fold_, running_sum.device, locals())


def cpu_capability() -> str:
    """Which CPU code path runs: ``"avx512"``, ``"avx2"``, ``"default"``, or ``"reference"`` without ops.

    ``EXCESSMTL_CPU_CAPABILITY=avx2`` (or ``default``) lowers it, read at the first op.
    """
    if not _extension.has_op_for("cpu"):
        return "reference"
    return torch.ops.excessmtl_ext.cpu_capability.default()


__all__ = [
    "CUDA_CHUNK_NUMEL",
    "MAX_LOG_STEP",
    "MAX_TASKS",
    "SEGMENT_ALIGNMENT",
    "SMALLEST_EPS",
    "Fisher",
    "ParamLayout",
    "StepOptions",
    "StepState",
    "accumulate_excess_risk_",
    "combine_",
    "cpu_capability",
    "estimate_task_risk_",
    "find_nonfinite",
    "fold_",
    "fused_step_",
    "fused_step_combine_",
    "init_state",
    "op_arguments",
    "padded_numel",
    "repair_",
    "segments",
    "update_task_risks_",
    "update_task_weights_",
    "weighted_sum_",
]
