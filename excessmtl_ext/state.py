"""What a step works on: how the parameters lie in the flat state, the state itself, the choices.

Symbols: T tasks, L shared parameter tensors, P their elements in all. State is flat, [T, padded P]:
every parameter's segment is padded to ``SEGMENT_ALIGNMENT`` elements (``csrc/step_state.h``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Fisher = Literal["sqrt", "linear"]

MAX_TASKS = 512
"""Most tasks of one step: the kernels keep a bit per task in their arguments."""

MAX_LOG_STEP = 1e100
"""Largest step of a log-weight: keeps the exponent finite when a baseline is vanishingly small."""

SEGMENT_ALIGNMENT = 32
"""Elements to which each parameter's segment of the state is padded: one 128-byte line of float32."""

CUDA_CHUNK_NUMEL = 8192
"""Padded parameters per block and task of a CUDA launch: 32 KiB of float32, 8 vectors of 4 for each of 256 threads."""

SMALLEST_EPS = 1.1754943508222875e-38
"""Below the smallest normal float32 the reciprocal root of eps is infinite, and 0 * inf is NaN."""


def padded_numel(numel: int) -> int:
    """Rounds the size of a parameter up to the size of its segment."""
    return (numel + SEGMENT_ALIGNMENT - 1) // SEGMENT_ALIGNMENT * SEGMENT_ALIGNMENT


def segments(flat: Tensor, param_numels: Tensor) -> Iterator[Tensor]:
    """Yields each parameter's part [..., n_l] of a flat state tensor [..., padded P], as views."""
    offset = 0
    for numel in param_numels.tolist():
        yield flat[..., offset : offset + numel]
        offset += padded_numel(numel)


class ParamLayout:
    """How L parameters of given sizes lie in the flat state: each padded to ``SEGMENT_ALIGNMENT`` elements.

    Args:
        numels: Elements of each shared parameter, in order.

    Attributes:
        numels: The sizes, as given.
        param_numels: The sizes as an int64 tensor [L] on the CPU, as the ops take them.
        num_params: P, the sum of the sizes.
        padded_numel: Columns of the state.
        chunk_maps: :meth:`chunk_map` by device; made on the first look.
        raw_risk_scale: Factor of a risk that is not divided by its baseline, by the kind of Fisher diagonal.
    """

    def __init__(self, numels: Sequence[int]) -> None:
        self.numels: tuple[int, ...] = tuple(int(numel) for numel in numels)
        if any(numel < 0 for numel in self.numels):
            raise ValueError(f"Expected `numels` >= 0, but got {self.numels}.")
        self.param_numels = torch.tensor(self.numels, dtype=torch.int64, device="cpu")
        self.num_params = sum(self.numels)
        self.padded_numel = sum(padded_numel(numel) for numel in self.numels)
        self.chunk_maps = ChunkMaps(self)
        per_param = 1.0 / self.num_params if self.num_params > 0 else 1.0
        self.raw_risk_scale: dict[Fisher, float] = {"linear": per_param, "sqrt": 1.0}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParamLayout) and self.numels == other.numels

    def __hash__(self) -> int:
        return hash(self.numels)

    def __repr__(self) -> str:
        return f"ParamLayout(numels={list(self.numels)})"

    def views(self, flat: Tensor) -> list[Tensor]:
        """Returns each parameter's part [..., n_l] of a flat state tensor [..., padded P]."""
        return list(segments(flat, self.param_numels))

    def chunk_map(self, device: torch.device) -> Tensor:
        """Returns the plan of a CUDA launch as one int64 tensor on ``device``, made once; empty for other devices.

        Layout: chunk size, chunks, L, padded P, then L + 1 padded offsets, L sizes, and each
            chunk's first parameter.
        """
        return self.chunk_maps[device]

    def build_chunk_map(self, chunk_numel: int) -> Tensor:
        """Returns the plan for chunks of a given size; empty for size 0."""
        if chunk_numel == 0:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        host: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
        ends = torch.tensor([padded_numel(numel) for numel in self.numels], **host).cumsum(0)
        offsets = torch.cat([torch.zeros(1, **host), ends])
        num_chunks = -(-self.padded_numel // chunk_numel)
        starts = torch.arange(num_chunks, **host) * chunk_numel
        first_segments = torch.searchsorted(ends, starts, right=True)
        head = torch.tensor([chunk_numel, num_chunks, len(self.numels), self.padded_numel], **host)
        return torch.cat([head, offsets, self.param_numels, first_segments])


class ChunkMaps(dict[torch.device, Tensor]):
    """The chunk maps of a layout: a dict, so that a step finds one without a call."""

    def __init__(self, layout: ParamLayout) -> None:
        super().__init__()
        self._layout = layout

    def __missing__(self, device: torch.device) -> Tensor:
        chunk_numel = CUDA_CHUNK_NUMEL if device.type == "cuda" else 0
        self[device] = self._layout.build_chunk_map(chunk_numel).to(device)
        return self[device]

    def __reduce__(self) -> tuple[type[ChunkMaps], tuple[ParamLayout]]:
        return ChunkMaps, (self._layout,)  # a copy makes its own


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

    @property
    def sqrt_fisher(self) -> bool:
        """Whether the Fisher diagonal is taken to the root."""
        return self.fisher == "sqrt"

    def raw_risk_scale(self, layout: ParamLayout) -> float:
        """Returns the factor of a risk that is not divided by its baseline: 1 / P for the linear Fisher, else 1."""
        return layout.raw_risk_scale[self.fisher]


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
    """Returns the state before the first step: zero sums, uniform weights.

    Args:
        num_tasks: T, between 1 and ``MAX_TASKS``.
        layout: How the shared parameters lie in the state.
        dtype: Of S and m: float32, float64 for float64 gradients, or bfloat16, which a step widens
            to float32 and rounds stochastically: see :func:`excessmtl_ext.stochastic_rounding.stochastically_rounded`.
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


class MoveOptions(NamedTuple):
    """The choices besides :class:`StepOptions`: weights within bounds, gradients at one size, a floor per task."""

    max_log_ratio: float | None = None
    """kappa, see :mod:`excessmtl_ext.bounded_moves`; None: the mirror steps of Eq. 9."""
    per_tensor: bool = False
    """Whether gradients are brought to one size per tensor, see :mod:`excessmtl_ext.gradient_sizes`."""
    has_floors: bool = False
    """Whether ``weight_floors`` of the state are the floors; ``StepOptions.min_weight`` for all otherwise."""

    @property
    def is_plain(self) -> bool:
        """Whether none of them is taken: nothing but :class:`StepState` is needed then."""
        return self.max_log_ratio is None and not self.per_tensor and not self.has_floors


class MoveState(NamedTuple):
    """What a step keeps besides :class:`StepState`, on its device; float64 unless said."""

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
    weight_floors: Tensor
    """[T], as shares of the weights' sum; an option, not saved."""


def init_move_state(
    num_tasks: int,
    num_tensors: int,
    priorities: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
    *,
    floors: Sequence[float] | None = None,
) -> MoveState:
    """Returns the state of :class:`MoveOptions` before the first step.

    Args:
        num_tasks: T.
        num_tensors: L, or 0 where it is not known yet.
        priorities: T positive numbers, or None for equal ones.
        device: Where the gradients will be.
        floors: T numbers >= 0 that sum to 1 at most, or None for zeros.
    """
    per_task = torch.zeros(num_tasks, dtype=torch.float64, device=device)
    per_tensor = torch.zeros(num_tasks, num_tensors, dtype=torch.float64, device=device)
    shares = torch.tensor(priorities or [1.0] * num_tasks, dtype=torch.float64, device="cpu")
    least = torch.tensor(floors or [0.0] * num_tasks, dtype=torch.float64, device="cpu")
    return MoveState(
        risk_share_sum=per_task,
        num_gradient_steps=per_task.long(),
        momentum_mass=per_task.clone(),
        momentum_sq_mass=per_task.clone(),
        tensor_mean_square=per_tensor,
        num_tensor_steps=per_tensor.long(),
        tensor_weights=per_tensor.clone(),
        log_priorities=(shares / shares.sum()).log().to(device),
        weight_floors=least.to(device),
    )
