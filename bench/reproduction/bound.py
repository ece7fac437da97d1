"""Compares bounds on the weights of ExcessMTL's default, on seeds that no results page reports.

    python bench/reproduction/bound.py --data-root DATA --output RESULTS     resumes where it stopped

Every data set of the benchmark at its noisy dose, seeds 50 to 52, ``max_log_ratio`` 0, 0.2, 0.35 and
0.7: equal weights, or weights that differ by a factor of at most 1.2, 1.4 and 2. README.md is made
from scores.csv.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from excessmtl_ext import Balancer, ExcessMTL, Uniform
from excessmtl_ext.training.benchmark.datasets import find_datasets
from excessmtl_ext.training.benchmark.methods import Method
from excessmtl_ext.training.benchmark.trial import Trial, run_trial

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reporting import append_rows, environment, read_rows, short_conditions, write_folder

BOUNDS = (0.0, 0.2, 0.35, 0.7)
SEEDS = (50, 51, 52)
COLUMNS = ("dataset", "dose", "seed", "max_log_ratio", "group", "epoch", "score")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = environment(torch.device("cpu"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    table = arguments.output / "scores.csv"
    done = {(row["dataset"], row["seed"], row["max_log_ratio"]) for row in read_rows(table)}
    for seed in SEEDS:
        for key, dataset in find_datasets(()).items():
            for bound in ("uniform", *map(str, BOUNDS)):
                if (key, str(seed), bound) in done:
                    continue
                trial = Trial(key, dataset.ranked_dose, bound, 0, seed)
                result = run_trial(trial, dataset, _method(bound), data_root=arguments.data_root)
                append_rows(table, COLUMNS, list(rows_of(result, bound)))
                print(trial)
    write_folder(arguments.output, make_readme(read_rows(table), facts), environment=facts)


def _method(bound: str) -> Method:
    def build(shared: list[torch.Tensor], **options: Any) -> Balancer:
        if bound == "uniform":
            return Uniform(shared, **options)
        return ExcessMTL(shared, max_log_ratio=float(bound), **options)

    return Method(bound, bound, build)


def rows_of(result: Mapping[str, Any], bound: str) -> Iterator[list[Any]]:
    """Yields the scores of a trial: clean and noisy tasks, at the epoch that users would choose and in the last two."""
    epochs, trial = result["epochs"], result["trial"]
    best = max(epochs, key=lambda row: statistics.fmean(row["scores"]["observed"].values()))
    for group in ("clean", "noisy"):
        names = [task["name"] for task in result["tasks"] if task["is_noisy"] == (group == "noisy")]

        def score(row: Mapping[str, Any], names: Sequence[str] = names) -> float:
            return statistics.fmean(row["scores"]["test"][name] for name in names)

        for epoch, value in (
            ("selected", score(best)),
            ("last two", statistics.fmean(map(score, epochs[-2:]))),
        ):
            yield [
                trial["dataset"], trial["dose"], trial["seed"], bound, group, epoch, f"{value:.5f}"
            ]  # fmt: skip


def make_readme(rows: Sequence[Mapping[str, str]], facts: Mapping[str, Any]) -> list[str]:
    """Returns README.md: differences from uniform weights in points, means over the seeds."""
    lines = ["# The bound on the weights", "", short_conditions(facts), ""]
    lines += [
        "Difference from uniform weights in points, clean / noisy tasks, means over seeds "
        f"{', '.join(map(str, SEEDS))}.",
        "No other page reports these seeds. `bench/reproduction/bound.py` writes this folder.",
    ]
    for epoch in ("selected", "last two"):
        lines += ["", f"## {epoch.capitalize()}", ""]
        lines += [f"| | {' | '.join(f'`max_log_ratio={bound:g}`' for bound in BOUNDS)} |"]
        lines += ["|---" * (len(BOUNDS) + 1) + "|"]
        for dataset, dose in dict.fromkeys((row["dataset"], row["dose"]) for row in rows):
            means = {
                (bound, group): statistics.fmean(
                    float(row["score"])
                    for row in rows
                    if (row["dataset"], row["max_log_ratio"], row["group"], row["epoch"])
                    == (dataset, bound, group, epoch)
                )
                for bound in ("uniform", *map(str, BOUNDS))
                for group in ("clean", "noisy")
            }
            cells = [
                " / ".join(
                    f"{100 * (means[str(bound), group] - means['uniform', group]):+.1f}"
                    for group in ("clean", "noisy")
                )
                for bound in BOUNDS
            ]
            lines.append(f"| {dataset}, {dose} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
