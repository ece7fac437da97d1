"""Counts how often ``balancer.report()`` calls the right tasks noisy.

    python bench/reproduction/report_check.py --data-root DATA --output RESULTS     resumes where it stopped

Every data set of the benchmark at both of its doses, seeds 60 to 62, ExcessMTL's default and uniform
weights on gradients of one size; gradients are recorded on every fifth step. README.md is made from
findings.csv.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from excessmtl_ext import Balancer, ExcessMTL, Uniform
from excessmtl_ext.report import BalancerReport
from excessmtl_ext.training.benchmark.datasets import Dataset, find_datasets
from excessmtl_ext.training.benchmark.methods import Method
from excessmtl_ext.training.benchmark.trial import Trial, run_trial

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reporting import append_rows, environment, read_rows, short_conditions, write_folder

SEEDS = (60, 61, 62)
METHODS: dict[str, Callable[..., Balancer]] = {
    "ExcessMTL": ExcessMTL,
    "Uniform": lambda shared, **options: Uniform(shared, combine="per_tensor", **options),
}
COLUMNS = (
    "dataset",
    "dose",
    "has_noise",
    "seed",
    "method",
    "task",
    "is_noisy",
    "is_called_noisy",
    "noise_share",
    "gradient_trend",
)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--datasets", nargs="+", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = environment(torch.device("cpu"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    table = arguments.output / "findings.csv"
    done = {(row["dataset"], row["dose"], row["seed"], row["method"]) for row in read_rows(table)}
    for key, dataset in find_datasets(arguments.datasets).items():
        for dose in dataset.doses:
            for seed in SEEDS:
                for method in METHODS:
                    if (key, dose, str(seed), method) in done:
                        continue
                    trial = Trial(key, dose, method, 0, seed)
                    append_rows(
                        table, COLUMNS, list(_findings(trial, dataset, arguments.data_root))
                    )
                    print(trial, flush=True)
    write_folder(arguments.output, make_readme(read_rows(table), facts), environment=facts)


def _findings(trial: Trial, dataset: Dataset, data_root: str) -> Iterator[list[Any]]:
    """Yields the rows of a trial: what its report says of each task."""
    made: list[Balancer] = []

    def build(shared: list[torch.Tensor], **options: Any) -> Balancer:
        made.append(METHODS[trial.method](shared, **options))
        made[0].record_history(every=5, gradients=True)
        return made[0]

    result = run_trial(
        trial, dataset, Method(trial.method, trial.method, build), data_root=data_root
    )
    report: BalancerReport = made[0].report()
    has_noise = trial.dose == dataset.ranked_dose
    for task, found in zip(result["tasks"], report.tasks, strict=True):
        others = [other for other in report.tasks if other is not found]
        yield [
            trial.dataset,
            trial.dose,
            int(has_noise),
            trial.seed,
            trial.method,
            task["name"],
            int(has_noise and task["is_noisy"]),
            int(found.is_noisy(others)),
            f"{found.noise_share or 0.0:.4f}",
            f"{found.gradient_trend or 0.0:.4f}",
        ]


def make_readme(rows: Sequence[Mapping[str, str]], facts: Mapping[str, Any]) -> list[str]:
    """Returns README.md: tasks called noisy, out of those that were and of those that were not."""
    lines = ["# Tasks that the report calls noisy", "", short_conditions(facts), ""]
    lines += [
        f"`balancer.report()` at the end of training, seeds {', '.join(map(str, SEEDS))}. A task counts once per seed.",
        "Diamonds' cut, colour and clarity cannot be read off the sizes that they are learned from: their error is",
        "irreducible with all labels right. `bench/reproduction/report_check.py` writes this folder.",
    ]
    for method in METHODS:
        lines += ["", f"## {method}", ""]
        lines += [
            "| | noisy tasks found | others called noisy beside them | called noisy with all labels right |",
            "|---" * 4 + "|",
        ]
        of_method = [row for row in rows if row["method"] == method]
        for dataset in [*dict.fromkeys(row["dataset"] for row in of_method), "all"]:
            own = [row for row in of_method if dataset in ("all", row["dataset"])]
            groups = (
                [row for row in own if row["is_noisy"] == "1"],
                [row for row in own if row["is_noisy"] == "0" and row["has_noise"] == "1"],
                [row for row in own if row["has_noise"] == "0"],
            )
            cells = [
                f"{sum(row['is_called_noisy'] == '1' for row in group)} of {len(group)}"
                for group in groups
            ]
            lines.append(f"| {dataset} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
