"""The command behind bench_training_step.py: plans, checks, weighs and times the rows, and goes on where it stopped."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reporting import (
    conditions,
    default_output,
    environment,
    format_ratio,
    load_average,
    open_device,
    write_json,
)
from rich.console import Console
from rich.progress import Progress
from timing import measure_steps

from excessmtl_ext.memory import measured_peak
from training_step.measurement import Measurement, RowResult
from training_step.report import TARGETS, make_table, missing_rows, verdicts, write_report
from training_step.rows import EPS, ROWS, Row
from training_step.steps import Step, difference, filled_grads, make_step
from training_step.workloads import (
    ADAM,
    NUM_BATCHES,
    PARAM_COUNTS,
    ROBUST_STEP_SIZE,
    TASK_COUNTS,
    Problem,
    Template,
    Workload,
    named_workloads,
    param_sweep,
    task_sweep,
)

DESCRIPTION = "Measures time and peak memory of a training step: each balancer and mode, the lower bound, peers."
PEAK_STEPS = 3


def peak_bytes(row: Row, template: Template) -> int:
    """Returns the most bytes torch's allocator held for this row's model, method and first steps at one time."""

    def run() -> None:
        step = make_step(row, Problem(template))
        for _ in range(PEAK_STEPS):
            step()

    gc.collect()
    return measured_peak(run, template.device)


@dataclass(frozen=True)
class Effort:
    """How long a workload is measured."""

    rounds: int
    budget_s: float
    clock: Callable[[], float] | None = None


def run_workload(
    workload: Workload, rows: Sequence[Row], device: torch.device, effort: Effort, console: Console
) -> Measurement:
    """Checks, weighs and times the rows of one workload.

    A peer that fails has its reason recorded and is left out; a row of this package that fails ends
    the run, and so does any row that computes something else than it should.
    """
    load_before = load_average()
    template = Template(workload, device)
    results: dict[str, RowResult] = {}
    steps: dict[str, Step] = {}
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(workload.key, total=len(rows) + effort.rounds)
        for row in rows:
            progress.update(bar, description=f"{workload.key}: checking {row.label}")
            results[row.key] = _prepare(row, template)
            progress.advance(bar)
        # Models and optimizer states of all rows live from here on; peaks are known, so nobody is charged for them.
        for row in rows:
            if results[row.key].reason is None:
                steps[row.key] = make_step(row, Problem(template))
        progress.update(bar, description=f"{workload.key}: timing")
        timings = measure_steps(
            steps,
            device,
            periods={row.key: row.period for row in rows},
            rounds=effort.rounds,
            budget_s=effort.budget_s,
            clock=effort.clock,
            on_round=lambda rounds: progress.update(bar, completed=len(rows) + rounds),
        )
    del steps
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Measurement(
        workload.key,
        workload.title,
        workload.section,
        workload.num_tasks,
        template.num_shared,
        sum(parameter.numel() for parameter in template.model.parameters()),
        {
            key: RowResult(timings.get(key), result.peak_bytes, result.difference, result.reason)
            for key, result in results.items()
        },
        {row.key: row.label for row in rows},
        {"before": load_before, "after": load_average()},
    )


def _prepare(row: Row, template: Template) -> RowResult:
    """Compares a row with what it must agree with, and measures its peak; a result without a timing."""
    reason = row.missing()
    if reason is not None:
        return RowResult(reason=reason)
    if row.kind == "peer":
        try:
            step = make_step(row, Problem(template))
            step()
        except Exception as error:  # whatever another package raises on this network
            first_line = (str(error).splitlines() or [""])[0]
            return RowResult(reason=f"{type(error).__name__}: {first_line}"[:200])
    found = None
    if row.agrees_with is not None:
        found = difference(row, ROWS[row.agrees_with], template)
    else:
        for _ in filled_grads(row, template):
            pass
    return RowResult(peak_bytes=peak_bytes(row, template), difference=found)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    names = [*named_workloads(quick=True), "tasks", "parameters"]
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's choice)")
    parser.add_argument("--workloads", nargs="+", choices=names, default=names)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="default: all")
    parser.add_argument("--rounds", type=int, default=21, help="samples per row (default: 21)")
    parser.add_argument(
        "--budget-s",
        type=float,
        default=120.0,
        help="no round begins after this many seconds of a workload, but five there are (default: 120)",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU time of this process in place of the wall clock: where other programs run",
    )
    parser.add_argument("--task-counts", nargs="+", type=int, default=list(TASK_COUNTS))
    parser.add_argument("--param-counts", nargs="+", type=int, default=list(PARAM_COUNTS))
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does the bench work?")
    parser.add_argument("--fresh", action="store_true", help="measure finished workloads again")
    parser.add_argument(
        "--redraw", action="store_true", help="README and pictures from what is measured already"
    )
    return parser.parse_args(argv)


def plan(arguments: argparse.Namespace) -> list[tuple[Workload, list[Row]]]:
    """Chooses the workloads and their rows, in the order of the run."""
    rows = [
        row
        for row in ROWS.values()
        if (arguments.rows is None or row.key in arguments.rows)
        and not (row.is_captured and torch.device(arguments.device).type != "cuda")
    ]
    in_sweeps = [row for row in rows if row.in_sweeps]
    named = named_workloads(quick=arguments.quick)
    planned = [(named[key], rows) for key in arguments.workloads if key in named]
    if "tasks" in arguments.workloads:
        sweep = task_sweep(arguments.task_counts, quick=arguments.quick)
        planned += [(workload, in_sweeps) for workload in sweep]
    if "parameters" in arguments.workloads:
        sweep = param_sweep(arguments.param_counts, quick=arguments.quick)
        planned += [(workload, in_sweeps) for workload in sweep]
    return planned


def circumstances(arguments: argparse.Namespace, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what must be equal for a measurement to stand beside those of this run."""
    kept = ("device", "cpu", "gpu", "num_threads", "torch", "python", "commit", "is_dirty", "ops")
    return {
        **{name: facts[name] for name in kept if name in facts},
        "rows": list(ROWS) if arguments.rows is None else sorted(arguments.rows),
        "rounds": arguments.rounds,
        "budget_s": arguments.budget_s,
        "quick": arguments.quick,
        **({"clock": "CPU time"} if arguments.cpu_time else {}),
    }


def read_measurements(output: Path) -> tuple[dict[str, Any], dict[str, Measurement]]:
    """Reads circumstances and finished workloads of a results folder; nothing where there is none."""
    path = output / "measurements.json"
    if not path.exists():
        return {}, {}
    content = json.loads(path.read_text())
    found = [Measurement.from_json(facts) for facts in content["measurements"]]
    return content["circumstances"], {m.key: m for m in found}


def write_measurements(
    output: Path, circumstances: dict[str, Any], done: Mapping[str, Measurement]
) -> None:
    content = {
        "circumstances": circumstances,
        "measurements": [m.to_json() for m in done.values()],
    }
    write_json(output / "measurements.json", content)


def redraw(output: Path) -> None:
    """Rewrites README and pictures of a results folder from its measurements."""
    _, done = read_measurements(output)
    if not done:
        sys.exit(f"Expected measurements.json in `--output` {output}, but there is none.")
    facts = json.loads((output / "environment.json").read_text())
    write_report(output, facts, list(done.values()))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # Where nobody looks, tables need not be squeezed into a terminal's width.
    console = Console(width=None if sys.stdout.isatty() else 150)
    if arguments.redraw and arguments.output is not None:
        redraw(arguments.output)
        return
    device = open_device(arguments.device)
    output = arguments.output or default_output("training_step", device)
    if arguments.redraw:
        redraw(output)
        return

    begin = time.perf_counter()
    loads = {"before": load_average()}
    facts = environment(device)
    ours = circumstances(arguments, facts)
    theirs, done = read_measurements(output)
    if arguments.fresh or theirs != json.loads(json.dumps(ours)):
        if done and not arguments.fresh:
            changed = sorted(
                name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)
            )
            console.print(f"Starting anew: {', '.join(changed)} changed since {output.name}.")
        done = {}
    output.mkdir(parents=True, exist_ok=True)
    planned = plan(arguments)
    clock = time.process_time if arguments.cpu_time else None
    effort = Effort(arguments.rounds, arguments.budget_s, clock)
    for workload, rows in planned:
        if workload.key in done:
            console.print(f"{workload.key}: measured already", highlight=False)
            continue
        begin_workload = time.perf_counter()
        m = run_workload(workload, rows, device, effort, console)
        done[workload.key] = m
        write_measurements(output, ours, done)
        taken = time.perf_counter() - begin_workload
        distance = format_ratio(m.ratio("exact", "lower_bound"))
        console.print(
            f"{workload.title}: ExcessMTL / lower bound {distance} [{taken:.0f} s]",
            highlight=False,
            markup=False,
        )

    facts["load_averages"] = {**loads, "after": load_average()}
    facts["wall_s"] = round(time.perf_counter() - begin, 1)
    config = {name: value for name, value in vars(arguments).items() if name != "redraw"}
    config |= {"output": output.name, "rows": arguments.rows or list(ROWS)}
    config |= {"adam": ADAM, "robust_step_size": ROBUST_STEP_SIZE, "eps": EPS, "targets": TARGETS}
    config |= {"num_batches": NUM_BATCHES, "peak_steps": PEAK_STEPS}
    write_json(output / "config.json", config)
    write_json(output / "environment.json", facts)
    results = list(done.values())
    write_report(output, facts, results)

    for m in results:
        console.print(make_table(m).to_rich())
    for line in [conditions(facts), *verdicts(results), *missing_rows(results)]:
        console.print(line, highlight=False, markup=False)
    console.print(f"Written to {output}")
