"""Cost of a step with ``balancer.split``, as a multiple of a plain step of the same network.

    python bench/bench_split.py                      # the five networks of bench_training_step.py, and 500 tasks
    python bench/bench_split.py --workloads mlp tasks --rounds 21

A step empties ``.grad``, runs encoder and heads, calls ``backward`` on the sum of the losses, and takes a step
of Adam. The rows differ in what the heads are given: the features, or the copies that ``split`` returns. Rows
run in turn, round after round, in one process and one thread. A ratio is the median over rounds of the ratio
within a round, in CPU time of the process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from training_step.workloads import (
    ADAM,
    NUM_BATCHES,
    Workload,
    named_workloads,
    task_sweep,
)

from excessmtl_ext import ExcessMTL

EQ_9: dict[str, Any] = {
    "robust_step_size": 0.01,
    "combine": "sum",
    "fisher": "sqrt",
    "gradient_momentum": 0.0,
}
ROWS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "split": {},
    "split, full adapter": {"feature_adapter": "full"},
    "split, Eq. 9": EQ_9,
}


def networks() -> dict[str, Workload]:
    """The networks by key."""
    (many_tasks,) = task_sweep((500,), quick=False)
    return {**named_workloads(quick=False), "tasks": many_tasks}


def make_step(workload: Workload, options: dict[str, Any] | None) -> Callable[[], None]:
    """A function that takes one training step."""
    torch.manual_seed(0)
    model = workload.make_model()
    generator = torch.Generator().manual_seed(1)
    batches = [workload.make_batch(generator) for _ in range(NUM_BATCHES)]
    optimizer = torch.optim.Adam(model.parameters(), **ADAM)
    num_tasks = workload.num_tasks
    balancer = None if options is None else ExcessMTL(num_tasks=num_tasks, **options)
    turn = iter(range(10**9))

    def step() -> None:
        batch = batches[next(turn) % NUM_BATCHES]
        optimizer.zero_grad()
        z = model.encoder(batch.inputs)
        copies = [z] * num_tasks if balancer is None else balancer.split(z)
        losses = [
            loss(head(copy), target)
            for loss, head, copy, target in zip(
                workload.losses, model.heads, copies, batch.targets, strict=True
            )
        ]
        torch.stack(losses).sum().backward()
        optimizer.step()

    return step


def measure(workload: Workload, rounds: int) -> dict[str, tuple[float, float]]:
    """Per row the median ratio to the first one, and the shortest time in ms."""
    steps = {name: make_step(workload, options) for name, options in ROWS.items()}
    for step in steps.values():
        for _ in range(3):
            step()
    start = time.process_time()
    steps["plain"]()
    repeats = max(1, int(0.05 / (time.process_time() - start)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            for _ in range(repeats):
                step()
            times[name].append((time.process_time() - start) / repeats)
    return {
        name: (
            statistics.median(
                mine / plain for mine, plain in zip(each, times["plain"], strict=True)
            ),
            1e3 * min(each),
        )
        for name, each in times.items()
    }


def main() -> None:
    """Prints a Markdown table."""
    known = networks()
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workloads", nargs="+", choices=known, default=list(known))
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | " + " | ".join(ROWS) + " |")
    print("|---" * (1 + len(ROWS)) + "|")
    for key in arguments.workloads:
        found = measure(known[key], arguments.rounds)
        cells = [f"{ratio:.2f} ({shortest:.1f} ms)" for ratio, shortest in found.values()]
        print(f"| {known[key].title} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
