"""Compares ExcessMTL's default with uniform weights under other batch sizes and optimizers.

    python bench/reproduction/optimizers.py --data-root DATA --output RESULTS     resumes where it stopped

Every data set of the benchmark at its noisy dose, seeds 0 to 2: Adam with batches of 64 and 1024, AdamW
with decoupled decay, SGD with momentum. The learning rate of SGD is the one of ``SGD_RATES`` with the
best score on the noisy validation labels of a seed that is not reported: under uniform weights, for
both, or under each method by itself. All else is the benchmark's. README.md is made from scores.csv.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from excessmtl_ext.training.benchmark.datasets import Dataset, find_datasets
from excessmtl_ext.training.benchmark.methods import Method, find_methods
from excessmtl_ext.training.benchmark.plan import TUNING_SEED
from excessmtl_ext.training.benchmark.trial import Trial, run_trial

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reporting import append_rows, environment, read_rows, short_conditions, write_folder

METHODS = ("uniform", "excessmtl-recommended")
SEEDS = (0, 1, 2)
SGD_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
SGD = partial(torch.optim.SGD, momentum=0.9)
ADAMW = torch.optim.AdamW
SETUPS: dict[str, dict[str, Any]] = {
    "Adam, batch 64": {"batch_size": 64},
    "Adam, batch 1024": {"batch_size": 1024},
    "AdamW, decay 0.01": {"make_optimizer": ADAMW, "weight_decay": 0.01},
    "SGD, momentum 0.9, one learning rate": {"make_optimizer": SGD},
    "SGD, momentum 0.9, own learning rates": {"make_optimizer": SGD},
}
OWN_RATES = "SGD, momentum 0.9, own learning rates"
COLUMNS = ("dataset", "dose", "setup", "lr", "method", "seed", "group", "epoch", "score")
T_95 = {2: 4.303}
"""Two-sided 95 % quantiles of Student's t by degrees of freedom."""


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
    table = arguments.output / "scores.csv"
    methods = find_methods(METHODS)
    for key, dataset in find_datasets(arguments.datasets).items():
        for name, changes in SETUPS.items():
            setup = replace(dataset, **changes)
            done = {
                (row["method"], row["seed"]): row["lr"]
                for row in read_rows(table)
                if (row["dataset"], row["setup"]) == (key, name)
            }
            rates = {method: float(rate) for (method, _), rate in done.items()}
            for method in METHODS:
                missing = [seed for seed in SEEDS if (method, str(seed)) not in done]
                if missing and setup.make_optimizer is SGD:
                    tuned = method if name == OWN_RATES else METHODS[0]
                    if tuned not in rates:
                        rates[tuned] = _best_rate(setup, methods[tuned], arguments.data_root)
                    setup = replace(setup, lr=rates[tuned])
                for seed in missing:
                    result = _run(setup, methods[method], seed, arguments.data_root)
                    facts_of = [key, setup.ranked_dose, name, setup.lr, method, seed]
                    append_rows(table, COLUMNS, [[*facts_of, *row] for row in scores_of(result)])
                    print(f"{key}, {name}, {method}, seed {seed}", flush=True)
    write_folder(arguments.output, make_readme(read_rows(table), facts), environment=facts)


def _run(dataset: Dataset, method: Method, seed: int, data_root: str) -> dict[str, Any]:
    trial = Trial(dataset.key, dataset.ranked_dose, method.key, 0, seed)
    return run_trial(trial, dataset, method, data_root=data_root)


def _best_rate(dataset: Dataset, method: Method, data_root: str) -> float:
    """Returns the learning rate with the best score on noisy validation labels."""
    found = {}
    for rate in SGD_RATES:
        try:
            result = _run(replace(dataset, lr=rate), method, TUNING_SEED, data_root)
        except FloatingPointError:  # diverges
            continue
        found[rate] = max(map(_observed, result["epochs"]))
    return max(found, key=lambda rate: found[rate] if math.isfinite(found[rate]) else -math.inf)


def _observed(row: Mapping[str, Any]) -> float:
    return statistics.fmean(row["scores"]["observed"].values())


def scores_of(result: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Yields group, epoch and score of a trial: at the epoch that users would choose, and the mean of the last two."""
    epochs = result["epochs"]
    best = max(epochs, key=_observed)
    for group in ("clean", "noisy", "all"):
        names = [
            task["name"]
            for task in result["tasks"]
            if group == "all" or task["is_noisy"] == (group == "noisy")
        ]
        for epoch, rows in (("selected", [best]), ("last two", epochs[-2:])):
            score = statistics.fmean(row["scores"]["test"][name] for row in rows for name in names)
            yield [group, epoch, f"{score:.5f}"]


def gains(
    rows: Sequence[Mapping[str, str]], dataset: str, setup: str, group: str, epoch: str
) -> list[float]:
    """Returns the differences from uniform weights in points, seed by seed."""
    score = {
        (row["method"], row["seed"]): float(row["score"])
        for row in rows
        if (row["dataset"], row["setup"], row["group"], row["epoch"])
        == (dataset, setup, group, epoch)
    }
    baseline, method = METHODS
    return [100 * (score[method, str(seed)] - score[baseline, str(seed)]) for seed in SEEDS]


def make_readme(rows: Sequence[Mapping[str, str]], facts: Mapping[str, Any]) -> list[str]:
    """Returns README.md: paired differences from uniform weights, means and 95 % intervals over the seeds."""
    lines = ["# Other batch sizes and optimizers", "", short_conditions(facts), ""]
    lines += [
        "What ExcessMTL's default gains over uniform weights in points of the score, mean and 95 % interval over the",
        f"differences of seeds {', '.join(map(str, SEEDS))}. Intervals that leave out 0 are bold.",
        "Where two learning rates stand, the first is that of uniform weights.",
        "`bench/reproduction/optimizers.py` writes this folder.",
    ]
    for epoch in ("selected", "last two"):
        lines += ["", f"## {epoch.capitalize()} epoch" + ("s" if epoch == "last two" else "")]
        for setup in SETUPS:
            lines += ["", f"### {setup}", ""]
            lines += [
                "| | learning rates | clean tasks | noisy tasks | all tasks |",
                "|---" * 5 + "|",
            ]
            of_setup = [row for row in rows if row["setup"] == setup]
            for dataset, dose in dict.fromkeys((row["dataset"], row["dose"]) for row in of_setup):
                rates = dict.fromkeys(row["lr"] for row in of_setup if row["dataset"] == dataset)
                cells = [
                    _cell(gains(rows, dataset, setup, group, epoch))
                    for group in ("clean", "noisy", "all")
                ]
                lines.append(f"| {dataset}, {dose} | {', '.join(rates)} | {' | '.join(cells)} |")
    return lines


def _cell(differences: Sequence[float]) -> str:
    if min(differences) < -100.0:
        return "diverges"
    mean = statistics.fmean(differences)
    half = T_95[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    text = f"{mean:+.1f} ± {half:.1f}"
    return f"**{text}**" if abs(mean) > half else text


if __name__ == "__main__":
    main()
