"""100,000 steps of seven drifting tasks: do the weights still sum to 1, does memory grow, does a step cost what it did?

usage: long_run.py [--steps N] [--output FILE.json]

The problem: task i pulls P shared parameters towards a target that wanders, under gradient noise of its
own size, so that gradients never vanish and no weight comes to rest. The state is float32, and beside
it the same steps are taken with float64 state: the difference is what rounding the sum of squares has
cost.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from reporting import environment
from torch import Tensor

from excessmtl_ext import ExcessMTL

NUM_TASKS, NUM_PARAMS = 7, 50


class Drift:
    """Parameters, and targets that take a small random step each time."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.parameters = torch.zeros(NUM_PARAMS)
        self.targets = self._noise(NUM_TASKS, NUM_PARAMS)
        self.noise = torch.linspace(0.05, 2.0, NUM_TASKS)[:, None]

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def task_grads(self) -> Tensor:
        """[T, P]; the targets move on."""
        self.targets += 0.01 * self._noise(NUM_TASKS, NUM_PARAMS)
        return self.parameters - self.targets + self.noise * self._noise(NUM_TASKS, NUM_PARAMS)


def rss_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def num_tensors() -> int:
    """Tensors that Python knows of."""
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def run(num_steps: int) -> dict[str, Any]:
    """Takes the steps; looks at memory and cost after the first and after the last tenth."""
    drift = Drift()
    # The raw risk divided by its baseline is about 1, so weights move by a few per cent of themselves a step.
    narrow = ExcessMTL.from_preset(
        "official", num_tasks=NUM_TASKS, robust_step_size=0.02, weight_scale="simplex"
    )
    wide = ExcessMTL.from_preset(
        "official", num_tasks=NUM_TASKS, robust_step_size=0.02, weight_scale="simplex"
    )
    tenth = max(num_steps // 10, 1)
    times: list[float] = []
    largest_error, memory, tensors = 0.0, [], []
    for step in range(num_steps):
        grads = drift.task_grads()
        rows = [[row] for row in grads]
        begin = time.perf_counter()
        weights = narrow.update_weights(rows)
        times.append(time.perf_counter() - begin)
        wide.update_weights([[row.double()] for row in grads])
        largest_error = max(largest_error, abs(float(weights.sum()) - 1.0))
        drift.parameters -= 0.01 * (weights.float() @ grads)
        if step + 1 in (tenth, num_steps):
            gc.collect()
            memory.append(rss_mib())
            tensors.append(num_tensors())
    sums, exact = narrow.sq_grad_sum[:, :NUM_PARAMS].double(), wide.sq_grad_sum[:, :NUM_PARAMS]
    return {
        "num_steps": int(narrow.num_steps),
        "largest_error_of_the_sum": largest_error,
        "rss_mib_after_a_tenth_and_at_the_end": memory,
        "tensors_after_a_tenth_and_at_the_end": tensors,
        "step_us_in_the_first_tenth": 1e6 * statistics.median(times[:tenth]),
        "step_us_in_the_last_tenth": 1e6 * statistics.median(times[-tenth:]),
        "smallest_weight": float(narrow.task_weights.min()),
        "sq_grad_sum_relative_error": float(((sums - exact) / exact).abs().max()),
        "sq_grad_sum_bound": num_steps * 2.0**-24,
        "task_weights_relative_error": float(
            ((narrow.task_weights - wide.task_weights) / wide.task_weights).abs().max()
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    result = run(args.steps)
    result["seconds"] = time.perf_counter() - begin
    text = json.dumps({"result": result, "environment": environment(torch.device("cpu"))}, indent=2)
    if args.output:
        args.output.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
