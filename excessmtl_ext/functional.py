"""Stateless layer over the compiled ops, for training loops and balancers of another shape.

:class:`StepState` holds the tensors that a step changes, :class:`StepOptions` the choices,
:class:`ParamLayout` how the shared parameters lie in the flat state. Every function here mutates
the state it is given and returns nothing; on a device without a compiled op the call goes to
:mod:`excessmtl_ext.reference`, which takes the same arguments.

Symbols: T tasks, L shared parameter tensors, P their elements in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from excessmtl_ext import _extension, reference
from excessmtl_ext.reference import MAX_LOG_STEP, SEGMENT_ALIGNMENT, padded_numel, segments

Fisher = Literal["sqrt", "linear"]

MAX_TASKS = 512
"""Most tasks of one step: the kernels keep a bit per task in their arguments."""

CUDA_CHUNK_NUMEL = 8192
"""Padded parameters per block and task of a CUDA launch: 32 KiB of float32, 8 vectors of 4 for each of 256 threads."""

SMALLEST_EPS = 1.1754943508222875e-38
"""Below the smallest normal float32 the reciprocal root of eps is infinite, and 0 * inf is NaN."""


class ParamLayout:
    """How L parameters of given sizes lie in the flat state: each padded to ``SEGMENT_ALIGNMENT`` elements.

    Args:
        numels: Elements of each shared parameter, in order.

    Attributes:
        numels: The sizes, as given.
        param_numels: The sizes as an int64 tensor [L] on the CPU, as the ops take them.
        num_params: P, the sum of the sizes.
        padded_numel: Columns of the state.
    """

    def __init__(self, numels: Sequence[int]) -> None:
        self.numels: tuple[int, ...] = tuple(int(numel) for numel in numels)
        if any(numel < 0 for numel in self.numels):
            raise ValueError(f"Expected `numels` >= 0, but got {self.numels}.")
        self.param_numels = torch.tensor(self.numels, dtype=torch.int64)
        self.num_params = sum(self.numels)
        self.padded_numel = sum(padded_numel(numel) for numel in self.numels)
        self._chunk_maps: dict[torch.device, Tensor] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParamLayout) and self.numels == other.numels

    def __hash__(self) -> int:
        return hash(self.numels)

    def __repr__(self) -> str:
        return f"ParamLayout(numels={list(self.numels)})"

    def chunk_map(self, device: torch.device) -> Tensor:
        """The plan of a CUDA launch as one int64 tensor on ``device``, made once; empty for other devices.

        Layout: chunk size, chunks, L, padded P, then L + 1 padded offsets, L sizes, and each
            chunk's first parameter.
        """
        if device not in self._chunk_maps:
            self._chunk_maps[device] = self._build_chunk_map(
                CUDA_CHUNK_NUMEL if device.type == "cuda" else 0
            ).to(device)
        return self._chunk_maps[device]

    def _build_chunk_map(self, chunk_numel: int) -> Tensor:
        if chunk_numel == 0:
            return torch.empty(0, dtype=torch.int64)
        ends = torch.tensor(
            [padded_numel(numel) for numel in self.numels], dtype=torch.int64
        ).cumsum(0)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
        num_chunks = -(-self.padded_numel // chunk_numel)
        starts = torch.arange(num_chunks, dtype=torch.int64) * chunk_numel
        first_segments = torch.searchsorted(ends, starts, right=True)
        head = torch.tensor(
            [chunk_numel, num_chunks, len(self.numels), self.padded_numel], dtype=torch.int64
        )
        return torch.cat([head, offsets, self.param_numels, first_segments])


class StepOptions(NamedTuple):
    """The named choices of a step (He et al. 2024); see :class:`excessmtl_ext.ExcessMTL` for what each means."""

    fisher: Fisher = "sqrt"
    eps: float = 1e-7
    gradient_momentum: float = 0.0
    robust_step_size: float = 0.01
    num_warmup_steps: int = 1
    relative: bool = True
    min_weight: float = 0.0
    weight_total: float = 1.0
    rounding_seed: int = 0
    """Of the random bits that round bfloat16 state."""

    def raw_risk_scale(self, layout: ParamLayout) -> float:
        """Factor of a risk that is not divided by its baseline: 1 / P for the linear Fisher, else 1."""
        return 1.0 / layout.num_params if self.fisher == "linear" and layout.num_params > 0 else 1.0


class StepState(NamedTuple):
    """Every tensor that a step changes. All on one device; the [T] vectors are float64 whatever the gradients are."""

    sq_grad_sum: Tensor
    """S [T, padded P], float32, float64 for float64 gradients, or bfloat16 (rounded stochastically)."""
    grad_mean: Tensor
    """m [T, padded P], like S; [T, 0] without gradient momentum."""
    excess_risk: Tensor
    relative_excess_risk: Tensor
    baseline_excess_risk: Tensor
    log_task_weights: Tensor
    task_weights: Tensor
    num_steps: Tensor
    """[] int64: steps that counted."""
    num_task_steps: Tensor
    """[T] int64: steps in which each task was present."""
    num_skipped_steps: Tensor
    """[] int64: steps whose gradients were not finite."""
    found_nonfinite: Tensor
    """[T] bool: tasks whose gradients were not finite in the latest step."""
    ticket: Tensor
    """[1] int32: counts the blocks of a CUDA launch; 0 between launches."""


def init_state(
    num_tasks: int,
    layout: ParamLayout,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    has_momentum: bool = False,
    weight_total: float = 1.0,
) -> StepState:
    """State before the first step: zero sums, uniform weights.

    Args:
        num_tasks: T, between 1 and ``MAX_TASKS``.
        layout: How the shared parameters lie in the state.
        dtype: Of S and m: float32, float64 for float64 gradients, or bfloat16, which a step widens
            to float32 and rounds stochastically: see :func:`excessmtl_ext.reference.stochastically_rounded`.
        device: Where the gradients will be.
        has_momentum: Whether a running mean of the gradients is kept, of the size of S.
        weight_total: What the weights sum to.

    Raises:
        ValueError: ``num_tasks`` is out of range.
    """
    if not 1 <= num_tasks <= MAX_TASKS:
        raise ValueError(f"Expected `num_tasks` between 1 and {MAX_TASKS}, but got {num_tasks}.")
    tasks: dict[str, Any] = {"dtype": torch.float64, "device": device}
    return StepState(
        sq_grad_sum=torch.zeros(num_tasks, layout.padded_numel, dtype=dtype, device=device),
        grad_mean=torch.zeros(
            num_tasks, layout.padded_numel if has_momentum else 0, dtype=dtype, device=device
        ),
        excess_risk=torch.zeros(num_tasks, **tasks),
        relative_excess_risk=torch.zeros(num_tasks, **tasks),
        baseline_excess_risk=torch.zeros(num_tasks, **tasks),
        log_task_weights=torch.full((num_tasks,), -math.log(num_tasks), **tasks),
        task_weights=torch.full((num_tasks,), weight_total / num_tasks, **tasks),
        num_steps=torch.zeros((), dtype=torch.int64, device=device),
        num_task_steps=torch.zeros(num_tasks, dtype=torch.int64, device=device),
        num_skipped_steps=torch.zeros((), dtype=torch.int64, device=device),
        found_nonfinite=torch.zeros(num_tasks, dtype=torch.bool, device=device),
        ticket=torch.zeros(1, dtype=torch.int32, device=device),
    )


def _op(name: str, device: torch.device) -> Callable[..., None]:
    """The compiled op for tensors on ``device``, or its twin."""
    if _extension.has_op_for(device.type):
        return getattr(torch.ops.excessmtl_ext, name).default
    return getattr(reference, name)


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

    A non-finite gradient sets ``state.found_nonfinite``, counts in ``num_skipped_steps`` and leaves
    weights, risks and baselines alone; :func:`combine_` must follow with the same gradients to
    repair S and m.
    """
    _op("fused_step_", state.task_weights.device)(
        task_grads,
        layout.param_numels,
        layout.chunk_map(state.task_weights.device),
        grad_scale,
        *state,
        sqrt_fisher=options.fisher == "sqrt",
        **_step_keywords(options),
    )


def _step_keywords(options: StepOptions) -> dict[str, Any]:
    return {
        "eps": options.eps,
        "gradient_momentum": options.gradient_momentum,
        "robust_step_size": options.robust_step_size,
        "num_warmup_steps": options.num_warmup_steps,
        "relative": options.relative,
        "min_weight": options.min_weight,
        "weight_total": options.weight_total,
        "rounding_seed": options.rounding_seed,
    }


def _rounding_keywords(
    options: StepOptions, state: StepState | None, first_task: int
) -> dict[str, Any]:
    """What rows of bfloat16 state need besides themselves."""
    if state is None:
        return {}
    return {
        "num_steps": state.num_steps,
        "num_skipped_steps": state.num_skipped_steps,
        "rounding_seed": options.rounding_seed,
        "first_task": first_task,
    }


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
) -> None:
    """First third of :func:`fused_step_`: S and m of R tasks, and their raw risk sums (Eqs. 6-7).

    Args:
        task_grads: R * L gradients, task-major.
        layout: Sizes of the L parameters.
        sq_grad_sum: [R, padded P] rows of S, changed in place.
        grad_mean: [R, padded P] rows of m, or [R, 0].
        excess_risk_sum: [R] float64, written for the tasks that are present; not finite where a
            gradient is not.
        ticket: As in :class:`StepState`.
        options: The choices.
        grad_scale: As in :func:`fused_step_`.
        state: What the rows are of; only bfloat16 rows need it, whose rounding depends on the step.
        first_task: The task of the first row.
    """
    _op("accumulate_excess_risk_", sq_grad_sum.device)(
        task_grads,
        layout.param_numels,
        layout.chunk_map(sq_grad_sum.device),
        grad_scale,
        sq_grad_sum,
        grad_mean,
        excess_risk_sum,
        ticket,
        sqrt_fisher=options.fisher == "sqrt",
        eps=options.eps,
        gradient_momentum=options.gradient_momentum,
        **_rounding_keywords(options, state, first_task),
    )


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
    _op("update_task_risks_", excess_risk_sum.device)(
        excess_risk_sum,
        tasks,
        state.excess_risk,
        state.relative_excess_risk,
        state.baseline_excess_risk,
        state.num_steps,
        state.num_task_steps,
        state.found_nonfinite,
        gradient_momentum=options.gradient_momentum,
        num_warmup_steps=options.num_warmup_steps,
        relative=options.relative,
        raw_risk_scale=options.raw_risk_scale(layout),
    )


def update_task_weights_(tasks: Sequence[int], state: StepState, options: StepOptions) -> None:
    """Last third of :func:`fused_step_`: moves the weights of ``tasks`` (Eq. 9), counts the step or the skip.

    Args:
        tasks: Indices of the tasks that took part; the others keep their weights.
        state: Changed in place.
        options: The choices.
    """
    _op("update_task_weights_", state.task_weights.device)(
        tasks,
        state.relative_excess_risk,
        state.log_task_weights,
        state.task_weights,
        state.num_steps,
        state.num_skipped_steps,
        state.found_nonfinite,
        robust_step_size=options.robust_step_size,
        num_warmup_steps=options.num_warmup_steps,
        min_weight=options.min_weight,
        weight_total=options.weight_total,
    )


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
    r"""Writes :math:`\sum_i \alpha_i g_i` into ``outputs`` (He et al. 2024, Algorithm 1), or repairs a non-finite step.

    Args:
        task_grads: The T * L gradients of the step.
        outputs: L contiguous tensors, or none (repair only). ``outputs[l]`` may be the gradient of
            one task for parameter l; one without elements is passed over.
        layout: Sizes of the parameters.
        state: Gives weights and the flag; S and m are repaired where the flag is set, and
            ``outputs`` filled with NaN.
        options: The choices.
        grad_scale: As in the step; ``outputs`` keep the scale.
        accumulate: Add to ``outputs`` instead of overwriting them.
    """
    _op("combine_", state.task_weights.device)(
        task_grads,
        outputs,
        layout.param_numels,
        layout.chunk_map(state.task_weights.device),
        grad_scale,
        state.task_weights,
        state.found_nonfinite,
        state.sq_grad_sum,
        state.grad_mean,
        gradient_momentum=options.gradient_momentum,
        accumulate=accumulate,
        **_rounding_keywords(options, state, 0),
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
    _op("fused_step_combine_", state.task_weights.device)(
        task_grads,
        outputs,
        layout.param_numels,
        layout.chunk_map(state.task_weights.device),
        grad_scale,
        *state,
        sqrt_fisher=options.fisher == "sqrt",
        **_step_keywords(options),
        accumulate=accumulate,
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
    """:func:`combine_` for weights that come from anywhere: no state, nothing to repair.

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
    _op("combine_", task_weights.device)(
        task_grads,
        outputs,
        layout.param_numels,
        layout.chunk_map(task_weights.device),
        None,
        task_weights,
        found_nonfinite,
        task_weights.new_empty(num_tasks, 0),
        task_weights.new_empty(num_tasks, 0),
        gradient_momentum=0.0,
        accumulate=accumulate,
    )


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
    """Takes the gradients of R tasks out of their state again (up to rounding) if any of the R flags is set.

    Args:
        task_grads: The R * L gradients of the step.
        layout: Sizes of the parameters.
        sq_grad_sum: [R, padded P] rows of S, changed in place.
        grad_mean: [R, padded P] rows of m, or [R, 0].
        found_nonfinite: [R] bool.
        options: The choices of the step.
        grad_scale: As in the step.
        state: As in :func:`accumulate_excess_risk_`.
        first_task: As there.
    """
    _op("combine_", sq_grad_sum.device)(
        task_grads,
        [],
        layout.param_numels,
        layout.chunk_map(sq_grad_sum.device),
        grad_scale,
        torch.zeros(sq_grad_sum.shape[0], dtype=torch.float64, device=sq_grad_sum.device),
        found_nonfinite,
        sq_grad_sum,
        grad_mean,
        gradient_momentum=options.gradient_momentum,
        accumulate=False,
        **_rounding_keywords(options, state, first_task),
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
        log_weight: [] float64, the task's log-weight, of any normalisation.
        running_sum: [padded P], float32 or float64, zero before the first task; changed in place.
        running_log_max: [] float64, M, -inf before the first task; changed in place.
    """
    _op("fold_", running_sum.device)(
        task_grads,
        layout.param_numels,
        layout.chunk_map(running_sum.device),
        log_weight,
        running_sum,
        running_log_max,
    )


def cpu_capability() -> str:
    """Which CPU code path runs: ``"avx512"``, ``"avx2"``, ``"default"``, or ``"reference"`` without ops.

    ``EXCESSMTL_CPU_CAPABILITY=avx2`` (or ``default``) lowers it, read at the first op.
    """
    if not _extension.has_op_for("cpu"):
        return "reference"
    return torch.ops.excessmtl_ext.cpu_capability.default()


def _fake_of(name: str) -> Callable[..., None]:
    """The fake of an op that only mutates: it does nothing, but on one device.

    One meta tensor among others sends a call here, where it would pass for a step.
    """
    schema = getattr(torch.ops.excessmtl_ext, name).default._schema
    names = [argument.name for argument in schema.arguments]

    def fake(*args: Any, **kwargs: Any) -> None:
        devices: dict[torch.device, str] = {}
        for name, arg in (*zip(names, args, strict=False), *kwargs.items()):
            for tensor in arg if isinstance(arg, (list, tuple)) else [arg]:
                # `param_numels` is on the CPU, whatever the device of the step.
                if isinstance(tensor, Tensor) and (name, tensor.device.type) != (
                    "param_numels",
                    "cpu",
                ):
                    devices.setdefault(tensor.device, name)
        if len(devices) > 1:
            where = ", ".join(f"`{name}` on {device}" for device, name in devices.items())
            raise RuntimeError(f"Expected one device, but got {where}. Move them to one device.")

    return fake


def _register_fakes() -> None:
    for name in (
        "fused_step_",
        "fused_step_combine_",
        "accumulate_excess_risk_",
        "update_task_risks_",
        "update_task_weights_",
        "combine_",
        "fold_",
    ):
        torch.library.register_fake(f"excessmtl_ext::{name}", _fake_of(name))


if _extension.ops_available:
    _register_fakes()

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
    "fold_",
    "fused_step_",
    "fused_step_combine_",
    "init_state",
    "repair_",
    "segments",
    "update_task_risks_",
    "update_task_weights_",
    "weighted_sum_",
]
