"""Prints what a sweep found, method by noise level, as Markdown: the numbers that CLAIMS.md stands on.

    python bench/reproduction/summary.py RESULTS

Means over seeds, with the standard deviation where there are several, of the test metric at the epoch that validation
chose.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

from excessmtl_ext.training.run.methods import METHODS
from excessmtl_ext.training.run.metrics import PRIMARY_METRIC
from excessmtl_ext.training.sweep.results import Row, SweepResults, read_results


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    results = read_results(parser.parse_args().results)
    tasks = results.settings["tasks"]
    clean = [task for task in tasks if not task["is_noisy"]]
    noisy = [task for task in tasks if task["is_noisy"]]
    kinds = {task["kind"] for task in tasks}
    metric = PRIMARY_METRIC[next(iter(kinds))] if len(kinds) == 1 else "score"

    def mean_of(group: list[Row]) -> Callable[[Row], float]:
        return lambda run: statistics.fmean(run[f"test/{task['name']}_{metric}"] for task in group)

    seeds = {run["seed"] for run in results.runs if run["method"] != "single-task"}
    print(
        f"{results.settings['dataset']}, {len(seeds)} seed(s), {results.settings['epochs']} epochs\n"
    )
    print_table(results, f"clean tasks, {metric}", mean_of(clean), alone=clean, metric=metric)
    print_table(results, f"noisy tasks, {metric}", mean_of(noisy), alone=noisy, metric=metric)
    print_table(results, f"all tasks, {metric}", mean_of(tasks), alone=tasks, metric=metric)
    print_weights(results, [task["name"] for task in clean])


def print_table(
    results: SweepResults,
    title: str,
    value: Callable[[Row], float],
    *,
    alone: list[Row],
    metric: str,
) -> None:
    """Prints one table: a row per method, a column per noise level; single-task runs are joined over their tasks."""
    noises = sorted({run["noise"] for run in results.runs})
    _print_header(title, noises)
    for method, label in ((name, METHODS[name].label) for name in METHODS):
        cells = []
        for noise in noises:
            if method == "single-task":
                cells.append(_single_task(results, noise, alone, metric))
            else:
                runs = [r for r in results.runs if r["method"] == method and r["noise"] == noise]
                cells.append(_spread([value(run) for run in runs]))
        if any(cells):
            print(f"| {label} | {' | '.join(cells)} |")
    print()


def print_weights(results: SweepResults, clean: list[str]) -> None:
    """Prints the clean tasks' summed weight, the mean over the last epoch."""
    noises = sorted({run["noise"] for run in results.runs})
    last = max(row["epoch"] for row in results.epochs)
    _print_header("clean tasks' weight, mean over the last epoch", noises)
    for method, label in ((name, METHODS[name].label) for name in METHODS):
        if method == "single-task":
            continue
        cells = [
            _spread(
                [
                    sum(row[f"balancer/{task}_mean_weight"] for task in clean)
                    for row in results.epochs
                    if (row["method"], row["noise"], row["epoch"]) == (method, noise, last)
                ]
            )
            for noise in noises
        ]
        if any(cells):
            print(f"| {label} | {' | '.join(cells)} |")
    print()


def _print_header(title: str, noises: list[float]) -> None:
    print(f"| {title}, at noise | {' | '.join(f'{noise:g}' for noise in noises)} |")
    print("|---" * (len(noises) + 1) + "|")


def _single_task(results: SweepResults, noise: float, tasks: list[Row], metric: str) -> str:
    """A clean task trained alone does not see the noise: its run at noise 0 serves all levels."""
    by_task = []
    for task in tasks:
        level = noise if task["is_noisy"] else 0.0
        by_task.append(
            [
                run[f"test/{task['name']}_{metric}"]
                for run in results.runs
                if (run["method"], run["task"], run["noise"])
                == ("single-task", task["name"], level)
            ]
        )
    if not by_task or not all(by_task):
        return ""
    return _spread([statistics.fmean(values) for values in zip(*by_task, strict=False)])


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    return f"{mean:.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
