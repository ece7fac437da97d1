"""Prints the README's table of results from the committed sweeps: what each task gains or pays against Uniform.

    python bench/reproduction/headline.py            # the table
    python bench/reproduction/headline.py --write    # into README.md, between its two marks

Test metrics at the epoch that validation chose, means over seeds, at the highest noise below 1 that all sweeps share.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "reproduction" / "results"
NOISE = 0.8
# Methods by row, with what the README calls them.
METHODS = {
    "excessmtl-recommended": 'ExcessMTL, `robust_step_size=3, combine="sum"`',
    "uniform": "Uniform",
    "groupdro": "GroupDRO",
    "single-task": "each task alone",
}
# Sweeps by column: the metric, its name with the direction, and the digits that its spread leaves.
SWEEPS = {
    "multimnist": ("MultiMNIST", "accuracy", "accuracy ↑", 3),
    "sarcos": ("SARCOS", "nmse", "error ↓", 4),
}
MARKS = ("<!-- results: bench/reproduction/headline.py --write -->", "<!-- end of results -->")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table into README.md")
    if not parser.parse_args().write:
        print(table())
        return
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")


def with_table(text: str) -> str:
    """The README with the table between its marks."""
    first, last = (re.escape(mark) for mark in MARKS)
    new = f"{MARKS[0]}\n{table()}\n{MARKS[1]}"
    text, count = re.subn(f"{first}\n.*?{last}", lambda _: new, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(
            f"Expected README.md to hold the two marks once, but found them {count} times."
        )
    return text


def table() -> str:
    """The table in Markdown: a row per method, two columns per data set."""
    columns: list[dict[str, str]] = []
    heads = []
    for dataset, (title, metric, name, digits) in SWEEPS.items():
        tasks, runs = _read(dataset)
        for group, is_noisy in (("clean", False), ("noisy", True)):
            names = [task["name"] for task in tasks if task["is_noisy"] is is_noisy]
            means = {method: _mean(runs, method, names, is_noisy, metric) for method in METHODS}
            columns.append({m: _cell(means[m], means["uniform"], digits, m) for m in METHODS})
            heads.append(f"{title} {name}: {group}")
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for method, label in METHODS.items():
        lines.append(f"| {label} | {' | '.join(column[method] for column in columns)} |")
    return "\n".join(lines)


def _read(dataset: str) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The tasks of a data set's committed sweep and its runs."""
    (folder,) = RESULTS.glob(f"{dataset}_*cores_*")
    tasks = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["tasks"]
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        return tasks, list(csv.DictReader(file))


def _mean(
    runs: list[dict[str, str]], method: str, tasks: list[str], is_noisy: bool, metric: str
) -> float:
    """The mean over seeds and tasks; a clean task that is trained alone has runs at no noise only."""
    noise = 0.0 if method == "single-task" and not is_noisy else NOISE
    chosen = [run for run in runs if run["method"] == method and float(run["noise"]) == noise]
    values = [
        float(run[f"test/{task}_{metric}"])
        for run in chosen
        for task in tasks
        if run["task"] in ("", task)
    ]
    if not values:
        raise ValueError(f"Expected runs of {method} at noise {noise:g}, but found none.")
    return statistics.fmean(values)


def _cell(value: float, uniform: float, digits: int, method: str) -> str:
    if method == "uniform":
        return f"{value:.{digits}f}"
    # Of the rounded numbers, so that a reader who subtracts finds the same.
    difference = f"{round(value, digits) - round(uniform, digits):+.{digits}f}".replace("-", "−")
    return f"{value:.{digits}f} ({difference})"


if __name__ == "__main__":
    main()
