"""Peak memory of a training step over T and P: ExcessMTL's modes, a loop in plain PyTorch, and torchjd.

usage: python bench/bench_memory.py [--points 2x25000000,40x25000000] [--rows exact,streaming] [--output DIR]

Every row runs in a process of its own (a fork of one that has imported everything), since a resident
set never tells whose it was: the method takes two steps on a small network, the large one is made, then
the high-water mark is reset and two steps are taken: the first makes the state, the second holds it
while the gradients are at their most. Reported is the mark beyond that of the same two steps under a
plain summed loss, whose one gradient and activations every row has too. SGD without momentum holds
nothing. Large blocks come from the system one by one (mallopt), so a block that is freed is gone. Linux only.

A row that asks for more than --limit-gib in all is refused the memory and reported as such. How busy
the machine is changes nothing but the time this takes.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import math
import multiprocessing
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from reporting import environment, short_conditions, write_folder
from torch import Tensor
from torch.nn import functional as nnf
from training_step.rows import ROWS, FillGrads
from training_step.workloads import Batch, Problem, Template, Workload

from excessmtl_ext import ExcessMTL
from excessmtl_ext.models import mlp

MIB = 1 << 20
INPUTS, BATCH = 64, 4
POINTS = "2x25000000,10x25000000,40x25000000,40x5000000,40x1000000"
SMALL = 10_000
M_MMAP_THRESHOLD = -3  # malloc.h


# ---- rows -----------------------------------------------------------------------------------------


def _ours(*, streaming: bool, **options: Any) -> Callable[[Problem], FillGrads]:
    def made(problem: Problem) -> FillGrads:
        balancer = ExcessMTL(problem.shared, num_tasks=problem.num_tasks, **options)

        def fill(features: Tensor, losses: list[Tensor]) -> None:
            if not streaming:
                balancer.backward(losses)
                return
            for task, loss in enumerate(losses):
                balancer.accumulate(task, loss, retain_graph=task < len(losses) - 1)
            balancer.finish()

        return fill

    return made


BFLOAT16 = {"state_dtype": torch.bfloat16}
MOMENTUM = {"gradient_momentum": 0.98, "fisher": "linear"}
METHODS: dict[str, tuple[str, Callable[[Problem], FillGrads]]] = {
    "uniform": ("plain summed loss", ROWS["uniform"].make),
    "exact": ("ExcessMTL", _ours(streaming=False)),
    "exact_bfloat16": ("ExcessMTL, bfloat16 state", _ours(streaming=False, **BFLOAT16)),
    "streaming": ("ExcessMTL, streaming", _ours(streaming=True)),
    "streaming_bfloat16": (
        "ExcessMTL, streaming, bfloat16 state",
        _ours(streaming=True, **BFLOAT16),
    ),
    "streaming_momentum": (
        "ExcessMTL with momentum, streaming",
        _ours(streaming=True, **MOMENTUM),
    ),
    "streaming_momentum_bfloat16": (
        "ExcessMTL with momentum, streaming, bfloat16 state",
        _ours(streaming=True, **MOMENTUM, **BFLOAT16),
    ),
    "eager": ("plain PyTorch, the published algorithm", ROWS["eager"].make),
    "torchjd_excess": ("torchjd 0.18 ExcessMTL", ROWS["torchjd_excess"].make),
    "torchjd_excess_sequential": (
        "torchjd 0.18 ExcessMTL, chunks of 1",
        ROWS["torchjd_excess_sequential"].make,
    ),
}


# ---- one row, in its own process ------------------------------------------------------------------


def make_problem(num_tasks: int, num_params: int) -> Problem:
    """An MLP of three hidden layers with about ``num_params`` shared parameters, a head per task, and plain SGD."""
    linear = INPUTS + 3  # P = (inputs + 1) w + 2 (w^2 + w)
    width = max(4, round((math.sqrt(linear**2 + 8 * num_params) - linear) / 4))
    workload = Workload(
        key="memory",
        title=f"MLP 3 x {width}",
        section="parameters",
        make_model=lambda: mlp((INPUTS,), [1] * num_tasks, hidden=(width,) * 3),
        make_batch=lambda generator: Batch(
            torch.randn(BATCH, INPUTS, generator=generator),
            [torch.randn(BATCH, 1, generator=generator) for _ in range(num_tasks)],
        ),
        losses=(nnf.mse_loss,) * num_tasks,
    )
    problem = Problem(Template(workload, torch.device("cpu")))
    problem.optimizer = torch.optim.SGD(problem.model.parameters(), lr=1e-4)  # type: ignore[assignment]
    return problem


def take_steps(problem: Problem, fill: FillGrads, count: int) -> None:
    for _ in range(count):
        problem.optimizer.zero_grad()
        fill(*problem.forward())
        problem.optimizer.step()


def high_water_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(
        "Expected VmHWM in /proc/self/status, but it is not there. Run this on Linux."
    )


def measure_here(key: str, num_tasks: int, num_params: int, limit_bytes: int) -> dict[str, Any]:
    """The high-water mark of this process beyond what it had with the network made."""
    make = METHODS[key][1]
    small = make_problem(num_tasks, SMALL)
    take_steps(small, make(small), 2)
    del small
    problem = make_problem(num_tasks, num_params)
    facts = {"num_params": sum(parameter.numel() for parameter in problem.shared)}
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again
    before = high_water_bytes()
    try:
        take_steps(problem, make(problem), 2)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        return {**facts, "peak_bytes": None}
    return {**facts, "peak_bytes": high_water_bytes() - before}


# ---- all rows -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """What one process found; ``peak_bytes`` None: it was refused the memory."""

    key: str
    num_tasks: int
    num_params: int
    peak_bytes: int | None


def _measure_into(
    connection: Connection, key: str, num_tasks: int, num_params: int, limit_bytes: int
) -> None:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    connection.send(measure_here(key, num_tasks, num_params, limit_bytes))


def measure(key: str, num_tasks: int, num_params: int, limit_gib: float) -> Peak:
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    limit_bytes = int(limit_gib * (1 << 30))
    process = context.Process(
        target=_measure_into, args=(sending, key, num_tasks, num_params, limit_bytes)
    )
    process.start()
    sending.close()
    try:
        facts = receiving.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"Row `{key}` ended with exit code {process.exitcode} and no result."
        ) from None
    process.join()
    return Peak(key, num_tasks, facts["num_params"], facts["peak_bytes"])


def table(peaks: list[Peak], limit_gib: float) -> str:
    """Per T and P: the mark, what it has beyond the plain step, and that in units of T * P float32."""
    lines = []
    for point in dict.fromkeys((peak.num_tasks, peak.num_params) for peak in peaks):
        rows = [peak for peak in peaks if (peak.num_tasks, peak.num_params) == point]
        plain = next((p.peak_bytes for p in rows if p.key == "uniform"), None) or 0
        num_tasks, num_params = point
        lines += [
            f"### T = {num_tasks}, P = {num_params:,}: one gradient is {4 * num_params / MIB:,.0f} MiB",
            "",
            "| row | peak MiB | beyond the plain step, MiB | in T * P float32 |",
            "|---|---|---|---|",
        ]
        for peak in rows:
            if peak.peak_bytes is None:
                cells = [f"more than {limit_gib:g} GiB in all", "", ""]
            else:
                beyond = peak.peak_bytes - plain
                share = "" if peak.key == "uniform" else f"{beyond / (4 * math.prod(point)):.2f}"
                cells = [
                    f"{peak.peak_bytes / MIB:,.0f}",
                    "" if peak.key == "uniform" else f"{beyond / MIB:,.0f}",
                    share,
                ]
            lines.append(f"| {METHODS[peak.key][0]} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def report(peaks: list[Peak], facts: dict[str, Any], limit_gib: float) -> str:
    return "\n".join(
        [
            "# Peak memory of a training step",
            "",
            short_conditions(facts),
            "",
            f"`{facts['command']}`. Each row in a process of its own: the high-water mark of its resident set",
            "over two steps of an MLP (batch 4, plain SGD), beyond what the process had with the network made.",
            "How it is measured: the head of `bench_memory.py`.",
            "",
            table(peaks, limit_gib),
        ]
    )


def write(output: Path, peaks: list[Peak], facts: dict[str, Any], config: dict[str, Any]) -> None:
    write_folder(
        output,
        report(peaks, facts, config["limit_gib"]),
        config=config,
        environment=facts,
        measurements=[asdict(peak) for peak in peaks],
    )


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--points", default=POINTS, help="TxP, with commas between")
    parser.add_argument("--rows", default=",".join(METHODS), help="keys, with commas between")
    parser.add_argument("--limit-gib", type=float, default=11.0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    points = [tuple(map(int, point.split("x"))) for point in arguments.points.split(",")]
    torch.set_num_threads(1)  # no thread that a fork would miss
    if importlib.util.find_spec("torchjd") is not None:
        importlib.import_module("torchjd.autojac")
    facts = environment(torch.device("cpu"))
    config = {
        "points": arguments.points,
        "rows": arguments.rows,
        "limit_gib": arguments.limit_gib,
        "batch": BATCH,
        "inputs": INPUTS,
    }
    peaks = []
    for num_tasks, num_params in points:
        for key in arguments.rows.split(","):
            if reason := ROWS[key].missing() if key in ROWS else None:
                print(f"{key}: {reason}")
                continue
            peaks.append(measure(key, num_tasks, num_params, arguments.limit_gib))
            print(peaks[-1], flush=True)
            if arguments.output is not None:
                write(arguments.output, peaks, facts, config)
    print(table(peaks, arguments.limit_gib))


if __name__ == "__main__":
    main()
