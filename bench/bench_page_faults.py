"""Training steps of a row alone in its process: what freed gradients cost when nobody else keeps the heap up.

    python bench/bench_page_faults.py --output bench/results/page_faults_<hardware>_<yyyymm>
    python bench/bench_page_faults.py --workloads resnet18 --rows lower_bound exact --rounds 1

bench_training_step.py runs all rows in one process, where what one row holds keeps malloc from giving back what
another frees. A training program is alone: glibc returns the top of the heap to the kernel, which clears each page
again when the next step touches it. Here a process makes one row and takes its steps; rows take turns, round after
round. Reported per step: wall time, the process' own time in user code and in the kernel (which other load inflates
less), and page faults. ``exact_unpinned`` is ``exact`` without the gradient that a balancer keeps for this reason
(excessmtl_ext/heap_pin.py).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from reporting import environment, load_average, short_conditions, write_folder
from training_step.rows import ROWS
from training_step.steps import Step
from training_step.workloads import Problem, Template, Workload, named_workloads, param_sweep

from excessmtl_ext.engines.heap_pin import HeapPin

UNPINNED = "exact_unpinned"
DEFAULT_ROWS = ("uniform", "lower_bound", UNPINNED, "exact", "torchjd_excess_sequential")
WARM_UP = 4
COLUMNS = {"wall_ms": "wall, ms", "user_ms": "user, ms", "kernel_ms": "kernel, ms"}


def workloads(*, quick: bool) -> dict[str, Workload]:
    """The networks of bench_training_step.py with the largest gradients."""
    named = named_workloads(quick=quick)
    found = {key: named[key] for key in ("resnet18", "segnet", "transformer")}
    return {**found, "parameters": param_sweep([5_000_000], quick=quick)[0]}


# ---- one row, in its own process ------------------------------------------------------------------


def measure_here(workload: Workload, key: str, steps: int) -> dict[str, float]:
    """Milliseconds and page faults per step of this process."""
    if key == UNPINNED:
        HeapPin.move = lambda self, task_grads: None  # type: ignore[method-assign]
    row = ROWS["exact" if key == UNPINNED else key]
    step = Step(row, Problem(Template(workload, torch.device("cpu"))))
    for _ in range(WARM_UP):
        step()
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(steps):
        step()
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "wall_ms": wall / steps * 1e3,
        "user_ms": (after.ru_utime - before.ru_utime) / steps * 1e3,
        "kernel_ms": (after.ru_stime - before.ru_stime) / steps * 1e3,
        "faults": (after.ru_minflt - before.ru_minflt) / steps,
    }


# ---- all rows -------------------------------------------------------------------------------------


def measure(workload: str, row: str, arguments: argparse.Namespace) -> dict[str, float]:
    """:func:`measure_here` in a fresh interpreter."""
    command = [sys.executable, __file__, "--measure", workload, row]
    command += ["--steps", str(arguments.steps), *(["--quick"] if arguments.quick else [])]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def table(samples: dict[str, list[dict[str, float]]]) -> list[str]:
    """A line per row: medians over rounds, lowest and highest in brackets."""
    lines = [
        "| row | " + " | ".join(COLUMNS.values()) + " | page faults |",
        "|---|---|---|---|---|",
    ]
    for key, found in samples.items():
        label = "ExcessMTL, no gradient kept" if key == UNPINNED else ROWS[key].label
        cells = []
        for name in (*COLUMNS, "faults"):
            values = [sample[name] for sample in found]
            form = ",.0f" if name == "faults" or max(values) >= 100 else ".3g"
            cells.append(
                f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"
            )
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def report(
    measured: dict[str, dict[str, list[dict[str, float]]]], facts: dict[str, Any], *, quick: bool
) -> str:
    """The README."""
    known = workloads(quick=quick)
    lines = [
        "# Page faults of a training step",
        "",
        f"{short_conditions(facts)} Load average: before {facts['load_averages']['before']}, after "
        f"{facts['load_averages']['after']}.",
        "",
        f"`{facts['command']}`. Each row alone in a process, per step; medians over rounds (lowest-highest). What the",
        "columns are: the head of `bench_page_faults.py`.",
    ]
    for key, samples in measured.items():
        lines += ["", f"### {known[key].title}", "", *table(samples)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = list(workloads(quick=True))
    parser.add_argument("--workloads", nargs="+", choices=names, default=names)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, UNPINNED], default=list(DEFAULT_ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does the bench work?")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure is not None:
        workload, row = arguments.measure
        found = measure_here(workloads(quick=arguments.quick)[workload], row, arguments.steps)
        print(json.dumps(found))
        return
    facts = environment(torch.device("cpu"))
    loads = {"before": load_average()}
    measured: dict[str, dict[str, list[dict[str, float]]]] = {
        workload: {row: [] for row in arguments.rows if row == UNPINNED or not ROWS[row].missing()}
        for workload in arguments.workloads
    }
    for workload, rows in measured.items():
        for _ in range(arguments.rounds):
            for row, samples in rows.items():
                samples.append(measure(workload, row, arguments))
        print("\n".join(table(rows)), flush=True)
    facts["load_averages"] = {**loads, "after": load_average()}
    if arguments.output is None:
        return
    config = {
        name: value for name, value in vars(arguments).items() if name not in ("output", "measure")
    }
    text = report(measured, facts, quick=arguments.quick)
    write_folder(arguments.output, text, config=config, environment=facts, measurements=measured)


if __name__ == "__main__":
    main()
