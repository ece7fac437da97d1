"""What one workload of the fused step's benchmark gave, to and from JSON, and lines through time over size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timing import Ratio, Timing, ratio

from fused_step.contestants import Workload


@dataclass(frozen=True)
class Measurement:
    """The timings of one workload."""

    section: str
    workload: Workload
    timings: dict[str, Timing]
    cpu_capability: str

    def ratio(self, name: str, other: str) -> Ratio | None:
        if name in self.timings and other in self.timings:
            return ratio(self.timings[name], self.timings[other])
        return None

    def to_json(self) -> dict[str, Any]:
        workload = self.workload
        return {
            "section": self.section,
            "cpu_capability": self.cpu_capability,
            "num_tasks": workload.num_tasks,
            "numels": _run_lengths(workload.numels),
            "numel": workload.numel,
            "grad_dtype": str(workload.grad_dtype).removeprefix("torch."),
            "gradient_momentum": workload.gradient_momentum,
            "cache": workload.cache,
            "bytes_moved": workload.bytes_moved,
            "calls": {
                name: {
                    "median_us": timing.median_s * 1e6,
                    "min_us": timing.min_s * 1e6,
                    "quartiles_us": [value * 1e6 for value in timing.quartiles_s()],
                    "rounds": len(timing.samples),
                    "gb_per_s": workload.bytes_moved / timing.median_s * 1e-9,
                    "samples_us": [value * 1e6 for value in timing.samples],
                }
                for name, timing in self.timings.items()
            },
        }

    @staticmethod
    def from_json(facts: dict[str, Any]) -> Measurement:
        """Rebuilds what another process measured."""
        numels = tuple(numel for numel, count in facts["numels"] for _ in range(count))
        workload = Workload(
            facts["num_tasks"],
            numels,
            getattr(torch, facts["grad_dtype"]),
            facts["gradient_momentum"],
            facts["cache"],
        )
        timings = {
            name: Timing(tuple(value * 1e-6 for value in call["samples_us"]))
            for name, call in facts["calls"].items()
        }
        return Measurement(facts["section"], workload, timings, facts["cpu_capability"])


def _run_lengths(numels: Iterable[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for numel in numels:
        if runs and runs[-1][0] == numel:
            runs[-1][1] += 1
        else:
            runs.append([numel, 1])
    return runs


@dataclass(frozen=True)
class LineFit:
    """time = overhead + slope * numel, least squares of the relative error."""

    overhead_s: float
    s_per_element: float
    worst_deviation: float


def fit_line(numels: Sequence[int], seconds: Sequence[float]) -> LineFit:
    """Fits a line through (T * P, time), every size with the same relative weight."""
    rows = torch.tensor([[1.0 / t, n / t] for n, t in zip(numels, seconds, strict=True)])
    rows = rows.to(torch.float64)
    scale = rows.abs().amax(0)
    solution = torch.linalg.lstsq(rows / scale, torch.ones(len(rows), 1, dtype=torch.float64))
    overhead, slope = (solution.solution[:, 0] / scale).tolist()
    worst = max(abs(overhead + slope * n - t) / t for n, t in zip(numels, seconds, strict=True))
    return LineFit(overhead, slope, worst)


def linear_fits(results: Sequence[Measurement], cache_bytes: float) -> dict[str, LineFit]:
    """Fits one line where a call's data stays in the caches, one where it cannot: memory is slower.

    Args:
        results: Of one device.
        cache_bytes: That device's last-level cache.
    """
    linear = [m for m in results if m.section == "linear"]
    fits = {}
    regimes = {
        "in cache": [m for m in linear if 8 * m.workload.numel <= cache_bytes / 2],
        "in memory": [m for m in linear if m.workload.cache == "streaming"],
    }
    for name, part in regimes.items():
        if len(part) >= 3:
            fits[name] = fit_line(
                [m.workload.numel for m in part], [m.timings["fused"].min_s for m in part]
            )
    return fits
