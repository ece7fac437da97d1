"""What the fused step's benchmark measures: sections, sizes, contestants, and how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from reporting import last_level_cache_bytes
from timing import CacheState

from fused_step.contestants import Workload

SECTIONS = ("headline", "in_cache", "linear", "dtypes", "shapes", "overhead", "capabilities")
HEADLINE_NUMEL = 44_000_000
"""T * P of the comparison: two ResNet-50-sized tasks, far larger than any cache."""
GPU_CACHE_BYTES = 50 << 20
"""L2 of an H100."""


@dataclass(frozen=True)
class Plan:
    """Workloads of a section, the contestants, and seconds of wall clock for each workload."""

    section: str
    workloads: tuple[Workload, ...]
    names: tuple[str, ...]
    budget_s: float


def split_evenly(numel: int, num_tensors: int) -> tuple[int, ...]:
    """Sizes of equal tensors that add up to about ``numel``."""
    return (max(1, numel // num_tensors),) * num_tensors


def cache_state(numel: int, device: torch.device) -> CacheState:
    """Streaming where the data of one call is four times the last-level cache."""
    cache_bytes = GPU_CACHE_BYTES if device.type == "cuda" else last_level_cache_bytes()
    return "streaming" if 8 * numel >= 4 * cache_bytes else "warm"


def make_plans(device: torch.device, *, quick: bool, use_compile: bool) -> list[Plan]:
    """What a run measures, in order. ``quick`` shrinks every size: it shows that the bench works, nothing else."""
    is_cuda = device.type == "cuda"
    others = ("eager", *(["compiled"] if use_compile else []), *(["foreach"] if is_cuda else []))
    everyone = ("fused", "floor", *others, "reference")
    shrink = 1000 if quick else 1
    seconds = 0.05 if quick else 1.0

    def of_size(numel: int, num_tasks: int = 2, num_tensors: int = 8, **kwargs: Any) -> Workload:
        per_task = max(1, numel // shrink // num_tasks)
        kwargs.setdefault("cache", cache_state(numel, device))
        return Workload(num_tasks, split_evenly(per_task, num_tensors), **kwargs)

    largest = 2_000_000_000 if is_cuda else 100_000_000
    sizes = [size for power in range(4, 10) for size in (10**power, 2 * 10**power, 5 * 10**power)]
    momentum: dict[str, Any] = {"gradient_momentum": 0.98}
    half, brain, double = torch.float16, torch.bfloat16, torch.float64
    shapes_numel = 4_000_000
    shapes = [
        of_size(shapes_numel, num_tasks, num_tensors, cache=cache)
        for num_tasks in (2, 7, 40, 512)
        for num_tensors in (4, max(4, shapes_numel // num_tasks // 1000))
        for cache in ("warm", "cold")
    ]
    shapes.append(of_size(shapes_numel, 512, 1))
    return [
        Plan("headline", (of_size(HEADLINE_NUMEL),), everyone, 20 * seconds),
        Plan(
            "in_cache",
            (of_size(10**6), of_size(10**6, cache="cold"), of_size(10**5)),
            everyone,
            4 * seconds,
        ),
        Plan(
            "linear",
            tuple(of_size(size) for size in sizes if size <= largest),
            ("fused", "floor"),
            2 * seconds,
        ),
        Plan(
            "dtypes",
            (
                of_size(HEADLINE_NUMEL, **momentum),
                of_size(HEADLINE_NUMEL, grad_dtype=brain),
                of_size(HEADLINE_NUMEL, grad_dtype=brain, **momentum),
                of_size(HEADLINE_NUMEL, grad_dtype=half),
                of_size(HEADLINE_NUMEL, grad_dtype=double),
            ),
            ("fused", "floor"),
            3 * seconds,
        ),
        Plan("shapes", tuple(shapes), ("fused", "floor"), 2 * seconds),
        Plan(
            "overhead",
            (Workload(2, (100,) * 10), Workload(2, (100,))),
            ("fused", "op", *others, "reference"),
            3 * seconds,
        ),
    ]


def fits_in_memory(workload: Workload, names: Sequence[str], device: torch.device) -> bool:
    """Whether the contestants' tensors and temporaries fit together on the GPU; always true on the CPU."""
    if device.type != "cuda":
        return True
    copies = {"fused": 1, "op": 1, "floor": 3, "compiled": 2, "eager": 5, "foreach": 3}
    state_bytes = workload.numel * workload.state_dtype.itemsize
    needed = (
        sum(copies.get(name, 4) for name in names) + (2 if workload.gradient_momentum else 1)
    ) * state_bytes
    return needed < 0.9 * torch.cuda.mem_get_info(device)[0]
