"""The command behind bench_fused_step.py: measures the plans, narrower code paths in processes of their own."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from reporting import (
    BENCH,
    conditions,
    default_output,
    environment,
    load_average,
    open_device,
)
from rich.console import Console
from timing import Stopwatch, measure

from excessmtl_ext import functional
from fused_step.contestants import EPS, ROBUST_STEP_SIZE, make_calls
from fused_step.measurement import Measurement
from fused_step.plans import SECTIONS, Plan, fits_in_memory, make_plans
from fused_step.report import TARGETS, make_tables, verdicts, write_results

SCRIPT = BENCH / "bench_fused_step.py"
DESCRIPTION = "Times one fused step of ExcessMTL against what else computes it, and against the memory it has to move."
CAPABILITIES = ("avx2", "default")


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


def run_capabilities(arguments: argparse.Namespace, console: Console) -> list[Measurement]:
    """Measures the narrower code paths, each in a process of its own: the choice is made once per process."""
    results = []
    for capability in CAPABILITIES:
        command = [
            sys.executable,
            str(SCRIPT),
            "--child",
            "--threads",
            str(torch.get_num_threads()),
        ]
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
    """Measures the headline and in-cache sizes, as a process of :func:`run_capabilities`."""
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


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION)
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


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
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
    config["output"] = output = arguments.output or default_output("fused_step", device)
    config = {k: v.name if isinstance(v, Path) else v for k, v in config.items()}
    config |= {"eps": EPS, "robust_step_size": ROBUST_STEP_SIZE, "targets": TARGETS}
    write_results(output, config, facts, results)

    for table in make_tables(results, facts):
        console.print(table.to_rich())
    console.print(conditions(facts))
    for line in verdicts(results, device.type):
        console.print(line)
    console.print(f"Written to {output}")
