"""The usual loop against the op, with malloc as it is and with malloc that keeps what is freed.

    python bench/bench_malloc.py
    python bench/bench_malloc.py --output bench/results/malloc_intel_xeon_2_cores_1_thread_202611

glibc maps tensors above 32 MiB anew at each allocation, and the kernel clears every page of them. The usual loop makes
many such tensors per step, the op none: much of the distance between them is page faults. With
``MALLOC_MMAP_THRESHOLD_`` and ``MALLOC_TRIM_THRESHOLD_`` above all sizes, freed memory is used again. Each setting runs
in a process of its own, in which loop and op take turns; numbers are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from fused_step.contestants import Workload, make_calls
from fused_step.plans import split_evenly
from reporting import environment, load_average, short_conditions, write_folder

NUM_TASKS, NUM_TENSORS = 2, 8
CONTESTANTS = {"fused": "the op", "floor": "in-place pass", "eager": "the usual loop"}
SETTINGS: dict[str, dict[str, str]] = {
    "malloc as it is": {},
    "malloc keeps what is freed": {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 33),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
        "MALLOC_TOP_PAD_": str(1 << 28),
    },
}


def measure_here(numel: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of wall time, CPU time and page faults of each contestant, in this process."""
    workload = Workload(NUM_TASKS, split_evenly(numel // NUM_TASKS, NUM_TENSORS))
    calls = make_calls(workload, tuple(CONTESTANTS), torch.device("cpu"))
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            call()
            wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
            if turn > 0:  # the first one sizes the heap
                samples[name].append(
                    {
                        "wall_ms": wall * 1e3,
                        "user_ms": (after.ru_utime - before.ru_utime) * 1e3,
                        "kernel_ms": (after.ru_stime - before.ru_stime) * 1e3,
                        "faults": float(after.ru_minflt - before.ru_minflt),
                    }
                )
    found = {
        name: {key: statistics.median(each[key] for each in taken) for key in taken[0]}
        for name, taken in samples.items()
    }
    for name, taken in samples.items():
        pairs = zip(taken, samples["fused"], strict=True)
        found[name]["ratio"] = statistics.median(
            (one["user_ms"] + one["kernel_ms"]) / max(other["user_ms"] + other["kernel_ms"], 1e-3)
            for one, other in pairs
        )
    return found


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--numel", type=int, default=44_000_000, help="elements of all gradients")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure:
        print(json.dumps(measure_here(arguments.numel, arguments.rounds)))
        return
    facts, loads = environment(torch.device("cpu")), {"before": load_average()}
    command = [sys.executable, __file__, "--measure", "--numel", str(arguments.numel)]
    command += ["--rounds", str(arguments.rounds)]
    lines = [
        "| setting | | wall, ms | user, ms | kernel, ms | page faults | CPU time / the op's |",
        "|---|---|---|---|---|---|---|",
    ]
    measured: dict[str, Any] = {}
    for setting, variables in SETTINGS.items():
        process = subprocess.run(
            command, env={**os.environ, **variables}, capture_output=True, text=True, check=True
        )
        measured[setting] = json.loads(process.stdout)
        for name, row in measured[setting].items():
            lines.append(
                f"| {setting} | {CONTESTANTS[name]} | {row['wall_ms']:.3g} | {row['user_ms']:.3g} | "
                f"{row['kernel_ms']:.3g} | {row['faults']:,.0f} | {row['ratio']:.1f} |"
            )
    print("\n".join(lines), flush=True)
    if arguments.output is None:
        return
    facts["load_averages"] = {**loads, "after": load_average()}
    text = "\n".join(
        [
            "# The usual loop and the page faults of malloc",
            "",
            f"{short_conditions(facts)} Load average: before {loads['before']}, after "
            f"{facts['load_averages']['after']}.",
            "",
            f"`{facts['command']}`. One step of {NUM_TASKS} tasks, {arguments.numel:,} elements of gradients, one",
            f"thread; medians of {arguments.rounds} turns. Compare CPU times: other work ran on the machine.",
            "",
            *lines,
        ]
    )
    config = {"numel": arguments.numel, "rounds": arguments.rounds, "settings": SETTINGS}
    write_folder(
        arguments.output, text + "\n", config=config, environment=facts, measurements=measured
    )


if __name__ == "__main__":
    main()
