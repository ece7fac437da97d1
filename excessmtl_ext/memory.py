"""Memory that a balancer holds and that a step of it adds, counted by kind, and measured."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from excessmtl_ext.state import CUDA_CHUNK_NUMEL, ParamLayout
from excessmtl_ext.step import Engine, WeightingRule, has_floor

When = Literal["always", "step", "streamed step"]

CPU_CHUNK_NUMEL = 16_384
"""Padded parameters per partial sum of the CPU ops (csrc/cpu/chunks.h)."""

_BYTES_OF_PARTIAL = 8


@dataclass(frozen=True)
class MemoryEntry:
    """Bytes of one kind.

    Attributes:
        name: Of the tensor, or of the kind.
        num_bytes: How many.
        when: ``"always"``: between steps too. ``"step"``: while ``backward`` runs, at its fullest.
            ``"streamed step"``: the same between ``accumulate`` and ``finish``.
        detail: Shape and type, or what it is.
    """

    name: str
    num_bytes: int
    when: When
    detail: str


@dataclass(frozen=True)
class MemoryReport:
    """What :meth:`excessmtl_ext.Balancer.memory_report` found; ``print`` shows it as a table.

    Not counted: the network, its activations and head gradients, the optimizer, and copies of
    gradients that are strided or of mixed types.

    Attributes:
        num_tasks: T.
        num_params: P.
        entries: What is held, and what a step adds.
        measured_bytes: See ``measured_by``.
        measured_by: How the peak was measured, in words.
    """

    num_tasks: int
    num_params: int
    entries: tuple[MemoryEntry, ...]
    measured_bytes: int
    measured_by: str

    def total_bytes(self, when: When) -> int:
        """Returns the sum over the entries of one kind; those of a step do not contain what is always held."""
        return sum(entry.num_bytes for entry in self.entries if entry.when == when)

    @property
    def state_bytes(self) -> int:
        """Always held."""
        return self.total_bytes("always")

    def __str__(self) -> str:
        lines = [f"Memory of {self.num_tasks} tasks and {self.num_params:,} shared parameters, MiB"]
        for when in ("always", "step", "streamed step"):
            entries = [entry for entry in self.entries if entry.when == when]
            lines += [
                f"  {when:<14}{entry.name:<22}{entry.num_bytes / 2**20:>12,.2f}  {entry.detail}"
                for entry in entries
            ]
            if entries:
                lines.append(f"  {when:<14}{'in all':<22}{self.total_bytes(when) / 2**20:>12,.2f}")
        lines.append(
            f"  {'measured':<14}{'peak':<22}{self.measured_bytes / 2**20:>12,.2f}  {self.measured_by}"
        )
        return "\n".join(lines)


class MeasuredRule(WeightingRule, Protocol):
    """A rule with its engine and its state."""

    engine: Engine
    can_stream: bool


def make_memory_report(
    rule: MeasuredRule, step: Callable[[], object] | None = None
) -> MemoryReport:
    """See :meth:`excessmtl_ext.Balancer.memory_report`."""
    layout = rule.layout
    if layout is None:
        raise ValueError(
            "Expected a balancer that knows its parameters, but this one was made without them and has seen no "
            "gradient. Make the report after the first step."
        )
    measured_bytes, measured_by = _measured(step, rule.task_weights.device)
    # After the measured step: before the first one state has no size and gradients no type.
    return MemoryReport(
        num_tasks=rule.num_tasks,
        num_params=_num_shared(rule),
        entries=(*_held(rule), *_of_step(rule), *_of_streamed_step(rule)),
        measured_bytes=measured_bytes,
        measured_by=measured_by,
    )


def measured_peak(run: Callable[[], object], device: torch.device) -> int:
    """Returns the most bytes that torch's allocator held at a time during ``run``, beyond those it held before.

    On CUDA ``torch.cuda.max_memory_allocated``; on the CPU the running sum of the allocator's events in torch's
    profiler. Memory that does not come from torch's allocator (oneDNN's scratch buffers) is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    return peak_of(profiler)


def peak_of(profiler: profile) -> int:
    """Returns the peak of the CPU allocator's bytes that a profiler has seen, without what was there before."""
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    recorded: list[Any] = profiler.profiler.kineto_results.events()
    events = [
        (event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]"
    ]
    events.sort(key=lambda event: event[0])
    held = peak = 0
    for _, num_bytes in events:
        held += num_bytes
        peak = max(peak, held)
    return peak


def _measured(step: Callable[[], object] | None, device: torch.device) -> tuple[int, str]:
    if step is not None:
        return measured_peak(step, device), "what `step` added at its fullest (torch's allocator)"
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "of this process so far (torch's allocator)"
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib * 1024, "of this process so far, everything in it (resident set)"


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _held(rule: MeasuredRule) -> list[MemoryEntry]:
    large, small = [], 0
    for name in rule.state_names:
        tensor = getattr(rule, name)
        if tensor.dim() == 2:
            large.append(MemoryEntry(name, tensor.nbytes, "always", _describe(tensor)))
        else:
            small += tensor.nbytes
    held = [*large, MemoryEntry("per task", small, "always", "weights, risks, counters")]
    if rule.engine.num_held_bytes > 0:
        what = "one, so that malloc keeps the memory of the others"
        held.append(MemoryEntry("gradient", rule.engine.num_held_bytes, "always", what))
    return held


def _layout(rule: MeasuredRule) -> ParamLayout:
    assert rule.layout is not None  # make_memory_report has seen to it
    return rule.layout


def _num_shared(rule: MeasuredRule) -> int:
    """Returns P; the state may be that of fewer, or of others (``estimate_from``)."""
    shared = rule.shared_parameters
    if shared is None:
        return _layout(rule).num_params
    return sum(parameter.numel() for parameter in shared)


def _bytes_per_param(rule: MeasuredRule) -> int:
    """Returns the bytes of a gradient's element: those of the parameter's type where it is known, else of float32."""
    shared = rule.shared_parameters
    return shared[0].element_size() if shared else 4


def _of_step(rule: MeasuredRule) -> list[MemoryEntry]:
    layout = _layout(rule)
    gradient = _num_shared(rule) * _bytes_per_param(rule)
    num_rows, what = rule.engine.live_task_grads(rule)
    entries = [MemoryEntry("gradients", round(num_rows * gradient), "step", what)]
    if "task_grads" in rule.requires:
        chunk = CUDA_CHUNK_NUMEL if rule.task_weights.is_cuda else CPU_CHUNK_NUMEL
        partials = rule.num_tasks * -(-layout.padded_numel // chunk) * _BYTES_OF_PARTIAL
        entries.append(MemoryEntry("temporaries", partials, "step", "partial sums of the risks"))
    return entries


def _of_streamed_step(rule: MeasuredRule) -> list[MemoryEntry]:
    if not rule.can_stream:
        return []
    layout = _layout(rule)
    element = _bytes_per_param(rule)
    sums = 2 if has_floor(rule) else 1
    wide = max(element, 4)
    return [
        MemoryEntry(
            "running sums",
            sums * layout.padded_numel * wide,
            "streamed step",
            f"{sums} x [{layout.padded_numel}]",
        ),
        MemoryEntry(
            "gradients", layout.num_params * element, "streamed step", "one task's, then `.grad`"
        ),
    ]
