"""Time of one fused step of ExcessMTL against what else computes it, and against the memory it has to move.

    python bench/bench_fused_step.py                  # this machine's CPU, under 4 minutes
    python bench/bench_fused_step.py --device cuda    # the same with GB/s against a device-to-device copy

Floor. A step reads each gradient once, and reads and writes its sum of squares: 12 bytes per
float32 element (bfloat16 and float16 gradients: 10, float64: 24). With gradient momentum it also
reads and writes the running mean: 20 (18, 40). The floor's time is measured, not computed: on the
CPU an in-place pass ``torch.add(src, dst, out=dst)`` over as many float32 elements as move the same
bytes, on CUDA a device-to-device copy of the same bytes (half read, half written).

Contestants:

- ``fused``: :func:`excessmtl_ext.functional.fused_step_`, called as a balancer calls it.
- ``op``: the same op with its arguments at hand (overhead section): no Python prepares them.
- ``floor``: see above.
- ``eager``: the usual loop, written after the published algorithm: concatenate every task's
  gradients, stack, then per task square, add, root, divide, dot; then the weights.
- ``compiled``: ``torch.compile`` of the same formula over all tasks; it has to concatenate too.
- ``foreach`` (CUDA): the same formula by ``torch._foreach_*``, which need not concatenate.
- ``reference``: :mod:`excessmtl_ext.reference`, the plain twin.

``--output`` (default: ``bench/results/fused_step_<hardware>_<yyyymm>``) receives config.json,
environment.json, measurements.json, fused_step.png and a README.md with the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import (
    CacheState,
    Ratio,
    Stopwatch,
    Timing,
    best_ratio,
    cpu_name,
    environment,
    last_level_cache_bytes,
    load_average,
    measure,
    ratio,
)
from torch import Tensor

from excessmtl_ext import _extension, functional, reference

SECTIONS = ("headline", "in_cache", "linear", "dtypes", "shapes", "overhead", "capabilities")
HEADLINE_NUMEL = 44_000_000
"""T * P of the comparison: two ResNet-50-sized tasks, far larger than any cache."""
ROBUST_STEP_SIZE = 0.01
EPS = 1e-7

TARGETS = {"floor": 1.12, "floor_in_cache": 1.3, "eager": 20.0, "compiled": 6.0}
"""At most that many times the floor; at least that many times faster than the others, on a CPU."""


@dataclass(frozen=True)
class Workload:
    """One input: T tasks with the same parameter sizes."""

    num_tasks: int
    numels: tuple[int, ...]
    grad_dtype: torch.dtype = torch.float32
    gradient_momentum: float = 0.0
    cache: CacheState = "warm"

    @property
    def numel(self) -> int:
        """T * P."""
        return self.num_tasks * sum(self.numels)

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float64 if self.grad_dtype == torch.float64 else torch.float32

    @property
    def bytes_moved(self) -> int:
        """The floor: gradients once; sums of squares, and means if there are any, twice."""
        states = 2 if self.gradient_momentum > 0 else 1
        return self.numel * (self.grad_dtype.itemsize + 2 * states * self.state_dtype.itemsize)

    def describe(self) -> str:
        kind = str(self.grad_dtype).removeprefix("torch.")
        momentum = f", momentum {self.gradient_momentum:g}" if self.gradient_momentum else ""
        sizes = f"{len(self.numels):,} x {self.numels[0]:,}"
        return f"T={self.num_tasks}, {sizes}, {kind}{momentum}, {self.cache}"


@dataclass(frozen=True)
class Measurement:
    """What one workload gave."""

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


# ---- contestants --------------------------------------------------------------------------------


class EagerLoop:
    """The published algorithm as it is usually written in PyTorch (He et al. 2024, Algorithm 1)."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        num_tasks, num_params = workload.num_tasks, sum(workload.numels)
        self.num_tasks, self.num_tensors = num_tasks, len(workload.numels)
        self.sq_grad_sum = torch.zeros(
            num_tasks, num_params, dtype=workload.state_dtype, device=device
        )
        self.task_weights = torch.full(
            (num_tasks,), 1.0 / num_tasks, dtype=workload.state_dtype, device=device
        )
        self.baseline: Tensor | None = None

    def joined(self, task_grads: Sequence[Tensor]) -> Tensor:
        """[T, P]: what every such implementation builds first."""
        count = self.num_tensors
        return torch.stack(
            [
                torch.cat([g.reshape(-1) for g in task_grads[i * count : (i + 1) * count]])
                for i in range(self.num_tasks)
            ]
        ).to(self.sq_grad_sum.dtype)

    def step(self, task_grads: Sequence[Tensor]) -> None:
        grads = self.joined(task_grads)
        excess_risk = torch.zeros_like(self.task_weights)
        for i in range(self.num_tasks):
            self.sq_grad_sum[i] += grads[i] ** 2
            fisher = torch.sqrt(self.sq_grad_sum[i] + EPS)
            excess_risk[i] = (grads[i] / fisher) @ grads[i]
        self.update_weights(excess_risk)

    def update_weights(self, excess_risk: Tensor) -> None:
        if self.baseline is None:
            self.baseline = excess_risk
            return
        weights = self.task_weights * torch.exp(ROBUST_STEP_SIZE * excess_risk / self.baseline)
        self.task_weights = weights / weights.sum()


class CompiledStep(EagerLoop):
    """The same formula over all tasks at once, compiled into as few kernels as ``torch.compile`` finds."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        super().__init__(workload, device)
        torch._dynamo.reset()  # one workload's graph must not become the next one's dynamic shapes
        self._excess_risk = torch.compile(self._formula, fullgraph=True, dynamic=False)

    def _formula(self, task_grads: Sequence[Tensor], sq_grad_sum: Tensor) -> Tensor:
        grads = self.joined(task_grads)
        sq_grad = grads * grads
        sq_grad_sum.add_(sq_grad)
        return (sq_grad / torch.sqrt(sq_grad_sum + EPS)).sum(1)

    def step(self, task_grads: Sequence[Tensor]) -> None:
        self.update_weights(self._excess_risk(task_grads, self.sq_grad_sum))


class ForeachStep(EagerLoop):
    """The same formula tensor by tensor with multi-tensor kernels: no concatenation, four temporaries of T * P."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        super().__init__(workload, device)
        self._sums = [part for row in self.sq_grad_sum for part in row.split(list(workload.numels))]

    def step(self, task_grads: Sequence[Tensor]) -> None:
        grads = [g.reshape(-1).to(self.sq_grad_sum.dtype) for g in task_grads]
        sq_grads = torch._foreach_mul(grads, grads)
        torch._foreach_add_(self._sums, sq_grads)
        fisher = torch._foreach_add(self._sums, EPS)
        torch._foreach_sqrt_(fisher)
        torch._foreach_div_(sq_grads, fisher)
        # Shares are not negative, so the 1-norm is their sum.
        parts = torch.stack(torch._foreach_norm(sq_grads, 1))
        self.update_weights(parts.view(self.num_tasks, self.num_tensors).sum(1))


def make_task_grads(workload: Workload, device: torch.device) -> list[Tensor]:
    """T * L gradients, task-major, of the size of real ones."""
    generator = torch.Generator(device=device).manual_seed(0)
    return [
        torch.empty(numel, device=device)
        .normal_(std=1e-2, generator=generator)
        .to(workload.grad_dtype)
        for _ in range(workload.num_tasks)
        for numel in workload.numels
    ]


def make_calls(
    workload: Workload, names: Sequence[str], device: torch.device
) -> dict[str, Callable[[], object]]:
    """Builds the contestants named, each with state of its own, on the same gradients."""
    task_grads = make_task_grads(workload, device)
    layout = functional.ParamLayout(workload.numels)
    options = functional.StepOptions(
        eps=EPS,
        gradient_momentum=workload.gradient_momentum,
        robust_step_size=ROBUST_STEP_SIZE,
    )

    def new_state() -> functional.StepState:
        return functional.init_state(
            workload.num_tasks,
            layout,
            dtype=workload.state_dtype,
            device=device,
            has_momentum=workload.gradient_momentum > 0,
        )

    def fused() -> Callable[[], object]:
        state = new_state()
        return lambda: functional.fused_step_(task_grads, layout, state, options)

    def with_arguments(function: Callable[..., object]) -> Callable[[], object]:
        arguments = [task_grads, layout.param_numels, layout.chunk_map(device), None, *new_state()]
        keywords = dict(options._asdict(), sqrt_fisher=options.fisher == "sqrt")
        del keywords["fisher"]
        return lambda: function(*arguments, **keywords)

    def floor() -> Callable[[], object]:
        if device.type == "cuda":
            source = torch.zeros(workload.bytes_moved // 2, dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            return lambda: target.copy_(source)
        numel = max(1, workload.bytes_moved // 12)
        source, target = torch.full((numel,), 1e-3), torch.zeros(numel)
        return lambda: torch.add(source, target, out=target)

    def steps_of(kind: type[EagerLoop]) -> Callable[[], object]:
        loop = kind(workload, device)
        return lambda: loop.step(task_grads)

    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "fused": fused,
        "op": lambda: with_arguments(torch.ops.excessmtl_ext.fused_step_.default),
        "floor": floor,
        "eager": lambda: steps_of(EagerLoop),
        "compiled": lambda: steps_of(CompiledStep),
        "foreach": lambda: steps_of(ForeachStep),
        "reference": lambda: with_arguments(reference.fused_step_),
    }
    return {name: makers[name]() for name in names}


# ---- workloads ----------------------------------------------------------------------------------


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
    cache_bytes = (50 << 20) if device.type == "cuda" else last_level_cache_bytes()
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


def run_plan(plan: Plan, stopwatch: Stopwatch, console: Console) -> list[Measurement]:
    """Measures the workloads of a plan."""
    results = []
    for workload in plan.workloads:
        names = list(plan.names)
        while not fits_in_memory(workload, names, stopwatch.device) and len(names) > 1:
            console.print(f"  {names[-1]}: not enough memory for {workload.describe()}")
            names.pop()
        calls = make_calls(workload, names, stopwatch.device)
        timings = measure(calls, stopwatch, cache=workload.cache, budget_s=plan.budget_s)
        results.append(Measurement(plan.section, workload, timings, functional.cpu_capability()))
        fastest = timings["fused"].median_s
        console.print(f"  {workload.describe()}: {fastest * 1e6:,.1f} us", highlight=False)
        del calls
        if stopwatch.device.type == "cuda":
            torch.cuda.empty_cache()
    return results


CAPABILITIES = ("avx2", "default")


def run_capabilities(arguments: argparse.Namespace, console: Console) -> list[Measurement]:
    """Measures the narrower code paths, each in a process of its own: the choice is made once per process."""
    results = []
    for capability in CAPABILITIES:
        command = [sys.executable, __file__, "--child", "--threads", str(torch.get_num_threads())]
        command += ["--quick"] if arguments.quick else []
        done = subprocess.run(
            command,
            env=dict(os.environ, EXCESSMTL_CPU_CAPABILITY=capability),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"The run with capability {capability} failed: {done.stderr}")
        found = [Measurement.from_json(facts) for facts in json.loads(done.stdout)]
        if found[0].cpu_capability != capability:
            console.print(f"  {capability}: not on this machine")
            continue
        results += found
    return results


def child_measurements(device: torch.device, *, quick: bool) -> list[Measurement]:
    """What a process of :func:`run_capabilities` measures: the headline and in-cache sizes."""
    console = Console(quiet=True)
    plans = make_plans(device, quick=quick, use_compile=False)
    workloads = [
        dataclasses.replace(workload)
        for plan in plans
        if plan.section in ("headline", "in_cache")
        for workload in plan.workloads
        if workload.cache != "cold"
    ]
    plan = Plan("capabilities", tuple(workloads), ("fused", "floor"), 0.05 if quick else 2.5)
    return run_plan(plan, Stopwatch(device), console)


# ---- what is shown ------------------------------------------------------------------------------


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


def linear_fits(results: Sequence[Measurement]) -> dict[str, LineFit]:
    """One line where a call's data stays in the caches, one where it cannot: memory is slower."""
    linear = [m for m in results if m.section == "linear"]
    fits = {}
    in_cache_bytes = last_level_cache_bytes() / 2
    regimes = {
        "in cache": [m for m in linear if 8 * m.workload.numel <= in_cache_bytes],
        "in memory": [m for m in linear if m.workload.cache == "streaming"],
    }
    for name, part in regimes.items():
        if len(part) >= 3:
            fits[name] = fit_line(
                [m.workload.numel for m in part], [m.timings["fused"].min_s for m in part]
            )
    return fits


@dataclass(frozen=True)
class TableText:
    """A table for the console and for the README."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def to_markdown(self) -> str:
        lines = [f"### {self.title}", "", "| " + " | ".join(self.header) + " |"]
        lines.append("|" + "---|" * len(self.header))
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def to_rich(self) -> Table:
        table = Table(*self.header, title=self.title)
        for row in self.rows:
            table.add_row(*row)
        return table


def _time(timing: Timing) -> str:
    low, high = timing.quartiles_s()
    scale, unit = (1e3, "ms") if timing.median_s >= 1e-3 else (1e6, "us")
    return f"{timing.median_s * scale:.3g} {unit} ({low * scale:.3g}-{high * scale:.3g})"


def _ratio(value: Ratio | None) -> str:
    if value is None:
        return "-"
    return f"{value.median:.3g} ({value.low:.3g}-{value.high:.3g})"


def _compared(section: str, title: str, results: Sequence[Measurement]) -> TableText | None:
    """Fused against everybody: time, ratio to the floor, and how many times slower each other one is."""
    part = [m for m in results if m.section == section]
    if not part:
        return None
    others = [n for n in ("eager", "compiled", "foreach", "reference") if n in part[0].timings]
    rows = []
    for m in part:
        fused = m.timings["fused"]
        rows.append(
            (
                f"{m.workload.numel:.3g}",
                m.workload.describe(),
                *([m.cpu_capability] if section == "capabilities" else []),
                _time(fused),
                f"{m.workload.bytes_moved / fused.median_s * 1e-9:.3g}",
                f"{fused.median_s / m.workload.numel * 1e9:.3g}",
                _ratio(m.ratio("fused", "floor")),
                f"{best_ratio(fused, m.timings['floor']):.3g}",
                *(_ratio(m.ratio(name, "fused")) for name in others),
            )
        )
    header = (
        "T*P",
        "workload",
        *(["path"] if section == "capabilities" else []),
        "fused",
        "GB/s",
        "ns/element",
        "fused / floor",
        "fastest samples",
        *(f"{name} / fused" for name in others),
    )
    return TableText(title, header, rows)


def _overhead(results: Sequence[Measurement]) -> TableText | None:
    part = [m for m in results if m.section == "overhead"]
    if not part:
        return None
    names = list(part[0].timings)
    rows = [(m.workload.describe(), *(_time(m.timings[name]) for name in names)) for m in part]
    return TableText("Small steps: what a call costs", ("workload", *names), rows)


def make_tables(results: Sequence[Measurement]) -> list[TableText]:
    """All tables of a run."""
    titles = {
        "headline": "Far beyond the caches",
        "in_cache": "In cache, and flushed before each call",
        "capabilities": "Narrower instruction sets (EXCESSMTL_CPU_CAPABILITY)",
        "dtypes": "Gradient types and momentum",
        "shapes": "Few and many tasks, big and small tensors",
        "linear": "Time against size",
    }
    tables = [_compared(section, title, results) for section, title in titles.items()]
    tables.append(_overhead(results))
    fits = linear_fits(results)
    if fits:
        rows = [
            (
                name,
                f"{fit.overhead_s * 1e6:.3g} us",
                f"{fit.s_per_element * 1e9:.3g} ns",
                f"{fit.worst_deviation:.0%}",
            )
            for name, fit in fits.items()
        ]
        header = ("regime", "overhead", "per element", "largest deviation")
        tables.append(
            TableText(
                "Line through the fastest samples: time = overhead + slope * T*P", header, rows
            )
        )
    return [table for table in tables if table is not None]


def draw(results: Sequence[Measurement], path: Path, title: str) -> None:
    """Writes the picture: time per element over size, ratio to the floor over size, and the others' times."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    linear = [m for m in results if m.section == "linear"]
    for name, colour in (("fused", "tab:blue"), ("floor", "tab:gray")):
        sizes = [m.workload.numel for m in linear]
        per_element = [m.timings[name].median_s / m.workload.numel * 1e9 for m in linear]
        left.loglog(sizes, per_element, "o-", color=colour, label=name)
    for name, marker in (("eager", "s"), ("compiled", "^"), ("foreach", "v"), ("reference", "d")):
        part = [m for m in results if m.section in ("headline", "in_cache") and name in m.timings]
        part = [m for m in part if m.workload.cache != "cold"]
        if part:
            left.loglog(
                [m.workload.numel for m in part],
                [m.timings[name].median_s / m.workload.numel * 1e9 for m in part],
                marker,
                label=name,
            )
    left.set(xlabel="T * P", ylabel="ns per element", title="Time per element")
    left.legend()

    ratios = [m.ratio("fused", "floor") for m in linear]
    points = [(m.workload.numel, r) for m, r in zip(linear, ratios, strict=True) if r is not None]
    if points:
        middle.semilogx([n for n, _ in points], [r.median for _, r in points], "o-")
        middle.fill_between(
            [n for n, _ in points],
            [r.low for _, r in points],
            [r.high for _, r in points],
            alpha=0.2,
        )
    middle.axhline(1.0, color="tab:gray", linewidth=1)
    middle.axhline(TARGETS["floor"], color="tab:green", linestyle="--", label="goal in memory")
    middle.axhline(
        TARGETS["floor_in_cache"], color="tab:orange", linestyle="--", label="goal in cache"
    )
    middle.set(xlabel="T * P", ylabel="fused / same-bytes pass", title="Distance from the floor")
    middle.set_ylim(0, 4)
    middle.legend()

    headline = next((m for m in results if m.section == "headline"), None)
    if headline is not None:
        names = list(headline.timings)
        bars = right.barh(names, [headline.timings[name].median_s * 1e3 for name in names])
        right.bar_label(bars, fmt="%.3g", padding=3)
        right.set_xscale("log")
        right.margins(x=0.15)  # room for the labels
        right.xaxis.set_minor_formatter(NullFormatter())  # over one decade they overlap
        right.invert_yaxis()
        right.set(xlabel="ms", title=f"One step, {headline.workload.describe()}")
    figure.suptitle(textwrap.fill(title, 150), fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def verdicts(results: Sequence[Measurement], device_type: str) -> list[str]:
    """Each goal with what was measured; undecided where medians and fastest samples disagree.

    They do on a busy machine: two threads that wait for one another then lose a time slice, the fused step and the
    floor alike, and the ratio of two such samples is 1 whatever was measured.

    For the other contestants there is a goal on the CPU only. A GPU runs the eager loop near its memory's speed too, so
    the ratio is that of the bytes: about 72 per element against 12.
    """
    lines = []
    for m in results:
        in_memory = m.section == "headline"
        if not in_memory and not (m.section == "in_cache" and m.workload.numel >= 10**6):
            continue
        if m.workload.cache == "cold":
            continue
        goal = TARGETS["floor" if in_memory else "floor_in_cache"]
        checks = [("fused / floor", m.ratio("fused", "floor"), goal, True)]
        if in_memory:
            checks += [
                (
                    f"{name} / fused",
                    m.ratio(name, "fused"),
                    TARGETS[name] if device_type == "cpu" else None,
                    False,
                )
                for name in ("eager", "compiled")
            ]
        for what, value, limit, is_upper in checks:
            if value is None:
                continue
            numerator, denominator = what.split(" / ")
            best = best_ratio(m.timings[numerator], m.timings[denominator])
            if limit is None:
                lines.append(
                    f"{what} at T*P = {m.workload.numel:.3g}: {_ratio(value)}, fastest samples {best:.3g}, no goal"
                )
                continue
            are_met = {(v <= limit if is_upper else v >= limit) for v in (value.median, best)}
            verdict = "undecided" if len(are_met) == 2 else "met" if True in are_met else "missed"
            lines.append(
                f"{what} at T*P = {m.workload.numel:.3g}: {_ratio(value)}, fastest samples "
                f"{best:.3g}, goal {'at most' if is_upper else 'at least'} {limit:g}: {verdict}"
            )
    return lines


def conditions(facts: dict[str, Any]) -> str:
    """One paragraph: hardware, versions, commit, load."""
    load = ", ".join(f"{moment} {values}" for moment, values in facts["load_averages"].items())
    cores = f"{facts['cpu_count']} cores, {facts['num_threads']} threads"
    if gpu := facts.get("gpu"):
        hardware = (
            f"{gpu['name']} (compute capability {gpu['capability']}, {gpu['multiprocessors']} SMs), "
            f"ops compiled for {facts['ops']['cuda_architectures']}, host {facts['cpu']}, {cores}"
        )
    else:
        hardware = (
            f"{facts['cpu']}, {cores}, last-level cache {facts['last_level_cache_mib']:.0f} MiB, "
            f"path {facts['cpu_capability']}"
        )
    return (
        f"{hardware}, torch {facts['torch']}, Python {facts['python']}, commit {facts['commit'][:10]}"
        f"{' with local changes' if facts['is_dirty'] else ''}, {facts['date']}. "
        f"Load average (1, 5, 15 minutes): {load}."
    )


def write_results(
    output: Path, config: dict[str, Any], facts: dict[str, Any], results: Sequence[Measurement]
) -> None:
    """Writes the five files of a results folder."""
    output.mkdir(parents=True, exist_ok=True)
    fits = {name: dataclasses.asdict(fit) for name, fit in linear_fits(results).items()}
    measurements = {"measurements": [m.to_json() for m in results], "linear_fits": fits}
    for name, content in (
        ("config", config),
        ("environment", facts),
        ("measurements", measurements),
    ):
        # One line per measurement keeps the file readable and a diff small.
        text = json.dumps(content, indent=1)
        text = re.sub(
            r"\[\s+((?:-?[\d.e+-]+,?\s+)+)\]", lambda m: f"[{' '.join(m[1].split())}]", text
        )
        (output / f"{name}.json").write_text(text + "\n")
    draw(results, output / "fused_step.png", conditions(facts))
    missing_gpu = (
        "" if "gpu" in facts else "No CUDA numbers: this machine has no GPU that torch can use.\n"
    )
    readme = [
        "# One fused step",
        "",
        f"{conditions(facts)}",
        "",
        f"`{facts['command']}`, {facts['wall_s']:.0f} s. Medians (quartiles) of interleaved samples;",
        "ratios are medians of the ratios within a round. The floor moves the same bytes: see the head",
        "of `bench_fused_step.py`. Where the load exceeds the cores, read the column of the fastest samples.",
        missing_gpu,
        "![time per element, distance from the floor, others](fused_step.png)",
        "",
        *(f"- {line}" for line in verdicts(results, torch.device(facts["device"]).type)),
        "",
        *(table.to_markdown() for table in make_tables(results)),
    ]
    (output / "README.md").write_text("\n".join(readme).rstrip() + "\n")


def default_output(device: torch.device) -> Path:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    hardware = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    cores = "" if device.type == "cuda" else f"_{os.cpu_count()}_cores"
    folder = f"fused_step_{hardware}{cores}_{time.strftime('%Y%m')}"
    return Path(__file__).parent / "results" / folder


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's choice)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does the bench work?")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out (it needs a compiler)"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def open_device(name: str) -> torch.device:
    """The device asked for, or an end with the reason."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "Expected `--device` cuda to be there, but torch sees no CUDA device. Nothing measured."
        )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if not _extension.has_op_for(device.type):
        sys.exit(
            f"Expected compiled ops for {device.type}, but there are none "
            f"({_extension.unavailable_reason or 'built without CUDA'}). Nothing measured."
        )
    return device


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = open_device(arguments.device)
    if arguments.child:
        found = child_measurements(device, quick=arguments.quick)
        print(json.dumps([m.to_json() for m in found]))
        return

    console = Console()
    begin = time.perf_counter()
    loads = {"before": load_average()}
    stopwatch = Stopwatch(device)
    results: list[Measurement] = []
    for plan in make_plans(device, quick=arguments.quick, use_compile=not arguments.no_compile):
        if plan.section in arguments.sections:
            console.print(f"[bold]{plan.section}[/bold] ({', '.join(plan.names)})")
            results += run_plan(plan, stopwatch, console)
    if "capabilities" in arguments.sections and device.type == "cpu":
        console.print("[bold]capabilities[/bold]")
        results += run_capabilities(arguments, console)
    loads["after"] = load_average()

    facts = environment(device)
    facts["load_averages"] = loads
    facts["wall_s"] = round(time.perf_counter() - begin, 1)
    config = {name: value for name, value in vars(arguments).items() if name != "child"}
    config["output"] = output = arguments.output or default_output(device)
    config = {k: v.name if isinstance(v, Path) else v for k, v in config.items()}
    config |= {"eps": EPS, "robust_step_size": ROBUST_STEP_SIZE, "targets": TARGETS}
    write_results(output, config, facts, results)

    for table in make_tables(results):
        console.print(table.to_rich())
    console.print(conditions(facts))
    for line in verdicts(results, device.type):
        console.print(line)
    console.print(f"Written to {output}")


if __name__ == "__main__":
    main()
