"""Runs the cells of the estimator study, several at a time; stops and goes on at any point.

    python bench/reproduction/estimator/screen.py sarcos --data-root DATA --output RESULTS --jobs 2
    python bench/reproduction/estimator/screen.py sarcos --stage candidates ...
    python bench/reproduction/estimator/screen.py multimnist --stage full --sweep SWEEP ...

The runs at full size that `excessmtl sweep` has done already, in its folder SWEEP, are taken from there.
A finished run is one row of RESULTS/STAGE_DATASET.csv; runs that stand there are skipped.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import multiprocessing
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

# Before torch, which reads it once: several runs share the machine's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from candidates import CandidateExcessMTL
from grid import Cell, candidate_cells, full_cells, screen_cells
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from excessmtl_ext.data import MultiTaskData
from excessmtl_ext.training.run.config import TrainConfig
from excessmtl_ext.training.run.loop import train
from excessmtl_ext.training.run.methods import METHODS, Method, make_balancer
from excessmtl_ext.training.run.metrics import PRIMARY_METRIC
from excessmtl_ext.training.run.record import (
    CONFIG,
    FINAL_METRICS,
    METRICS,
    TIMES,
    describe_environment,
    read_table,
)
from excessmtl_ext.training.run.workloads import WORKLOADS

METHODS["candidate"] = Method("Candidate", "#000000", CandidateExcessMTL)

STAGES = {"screen": screen_cells, "candidates": candidate_cells, "full": full_cells}

COLUMNS = [
    *("key", "stage", "dataset", "noise", "seed", "batch_size", "method", "step_size"),
    *("warmup_epochs", "options", "clean", "noisy", "clean_last", "noisy_last"),
    *("clean_weight_first_epoch", "least_clean_weight", "last_clean_weight"),
    *("least_relative_weight", "least_effective_num_tasks", "last_effective_num_tasks"),
    *("epochs", "seconds"),
]


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset")
    parser.add_argument("--stage", choices=tuple(STAGES), default="screen")
    parser.add_argument("--data-root")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=int, help="Run at most so many cells.")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="Run only these.")
    parser.add_argument("--sweep", type=Path, help="Take finished runs of this sweep's folder.")
    arguments = parser.parse_args()

    cells = [
        cell
        for cell in STAGES[arguments.stage](arguments.dataset)
        if arguments.batch_sizes is None or cell.batch_size in arguments.batch_sizes
    ]
    arguments.output.mkdir(parents=True, exist_ok=True)
    table = arguments.output / f"{arguments.stage}_{arguments.dataset}.csv"
    done = _finished(table)
    if arguments.sweep is not None:
        for cell in cells:
            folder = find_run(arguments.sweep, cell)
            if cell.key() not in done and folder is not None:
                _append(table, read_run(cell, folder))
                done.add(cell.key())
    open_cells = [cell for cell in cells if cell.key() not in done][: arguments.limit]
    (arguments.output / "environment.json").write_text(
        json.dumps(describe_environment("cpu"), indent=2) + "\n"
    )
    with (
        multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        ) as bar,
    ):
        task = bar.add_task(table.name, total=len(cells), completed=len(cells) - len(open_cells))
        run = functools.partial(run_cell, data_root=arguments.data_root)
        for row in pool.imap_unordered(run, open_cells):
            _append(table, row)
            bar.advance(task)


def run_cell(cell: Cell, data_root: str | None) -> dict[str, Any]:
    """Trains one cell and returns its row."""
    torch.set_num_threads(1)
    config = cell.config(data_root)
    _cache_data(cell.dataset)
    if cell.warmup_epochs:
        data = WORKLOADS[cell.dataset].load(config)
        steps = -(-len(data.train) // cell.batch_size)
        config = TrainConfig(
            **{
                **config.__dict__,
                "method_options": {
                    **config.method_options,
                    "num_warmup_steps": cell.warmup_epochs * steps,
                },
            }
        )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run")
        return read_run(cell, Path(folder) / "run", seconds=time.perf_counter() - started)


def find_run(sweep: Path, cell: Cell) -> Path | None:
    """Returns the folder of the sweep's finished run that the cell asks for, or None.

    Settings are compared as the balancer states them: the recommended preset is a set of options here and a method
    there.
    """
    if cell.warmup_epochs:
        return None  # the number of warm-up steps is known only with the data
    wanted = cell.config(data_root=None)
    same = ("dataset", "epochs", "batch_size", "lr", "weight_decay", "noise", "seed")
    for folder in sorted(sweep.glob(f"runs/*_noise{cell.noise:g}_seed{cell.seed}")):
        if not (folder / FINAL_METRICS).is_file():
            continue
        found = json.loads((folder / CONFIG).read_text())
        balancer = make_balancer(
            cell.method,
            [torch.nn.Parameter(torch.zeros(1))],
            num_tasks=len(json.loads((folder / FINAL_METRICS).read_text())["tasks"]),
            robust_step_size=cell.step_size,
            options=cell.balancer_options(),
        )
        if (
            settings_of(found["balancer"]) <= settings_of(repr(balancer))
            and all(found[name] == getattr(wanted, name) for name in same)
            and wanted.num_train in (None, found["num_train"])
        ):
            return folder
    return None


def settings_of(balancer: str) -> set[str]:
    """Returns the class and the settings a balancer states; a later version may state more, at their defaults."""
    return {balancer.partition("(")[0], *re.findall(r"\w+=[^,()]+", balancer)}


def read_run(cell: Cell, folder: Path, seconds: float | None = None) -> dict[str, Any]:
    """Returns a finished run's row; its time is that of its training where none is given."""
    metrics = json.loads((folder / FINAL_METRICS).read_text())
    rows = read_table(folder / METRICS)
    if seconds is None:
        seconds = sum(row["train_seconds"] for row in read_table(folder / TIMES))
    return {
        "key": cell.key(),
        "stage": cell.stage,
        "dataset": cell.dataset,
        "noise": cell.noise,
        "seed": cell.seed,
        "batch_size": cell.batch_size,
        "method": cell.method,
        "step_size": cell.step_size,
        "warmup_epochs": cell.warmup_epochs,
        "options": json.dumps(cell.options, sort_keys=True),
        **summary(metrics, rows, num_warmup_epochs=cell.warmup_epochs),
        "epochs": cell.epochs(),
        "seconds": round(seconds, 2),
    }


def summary(
    metrics: dict[str, Any], rows: list[dict[str, float]], num_warmup_epochs: int = 0
) -> dict[str, float]:
    """Returns what the study reports of a run.

    ``clean`` and ``noisy`` are means over the clean and the noisy tasks of the test metric (accuracy, or normalised
    mean squared error) at the epoch chosen on validation; ``..._last`` at the last. Weights are those at the ends of
    epochs: ``least_clean_weight`` the least sum over the clean tasks from the end of the first epoch on (or of the
    warm-up where that is later), ``least_relative_weight`` the least a_i * T of any task.
    """
    tasks = metrics["tasks"]
    clean = [task for task in tasks if not task["is_noisy"]]
    noisy = [task for task in tasks if task["is_noisy"]]
    moving = rows[min(num_warmup_epochs, len(rows) - 1) :]

    def mean(row: dict[str, float], group: list[dict[str, Any]]) -> float:
        return sum(
            row[f"test/{task['name']}_{PRIMARY_METRIC[task['kind']]}"] for task in group
        ) / len(group)

    def weights(row: dict[str, float], group: list[dict[str, Any]]) -> list[float]:
        return [row[f"balancer/{task['name']}_weight"] for task in group]

    def effective(row: dict[str, float]) -> float:
        return 1.0 / sum(weight**2 for weight in weights(row, tasks))

    return {
        "clean": mean(metrics["selected"], clean),
        "noisy": mean(metrics["selected"], noisy),
        "clean_last": mean(metrics["final"], clean),
        "noisy_last": mean(metrics["final"], noisy),
        "clean_weight_first_epoch": sum(weights(moving[0], clean)),
        "least_clean_weight": min(sum(weights(row, clean)) for row in moving),
        "last_clean_weight": sum(weights(rows[-1], clean)),
        "least_relative_weight": min(min(weights(row, tasks)) for row in rows) * len(tasks),
        "least_effective_num_tasks": min(effective(row) for row in rows),
        "last_effective_num_tasks": effective(rows[-1]),
    }


@functools.cache
def _cache_data(dataset: str) -> None:
    """Keeps the data of the last few noise levels and seeds: loading would cost as much as a short run."""
    workload = WORKLOADS[dataset]
    load = workload.load
    kept: dict[Any, MultiTaskData] = {}

    def load_once(config: TrainConfig) -> MultiTaskData:
        key = (config.noise, config.seed, config.num_train, config.data_root)
        if key not in kept:
            while len(kept) >= 4:
                kept.pop(next(iter(kept)))
            kept[key] = load(config)
        return kept[key]

    object.__setattr__(workload, "load", load_once)


def _finished(table: Path) -> set[str]:
    if not table.is_file():
        return set()
    # A run killed while writing leaves half a line: the next row must not join it.
    content = table.read_text()
    if not content.endswith("\n"):
        table.write_text(content[: content.rfind("\n") + 1])
    with table.open(newline="") as file:
        return {row["key"] for row in csv.DictReader(file)}


def _append(table: Path, row: dict[str, Any]) -> None:
    is_new = not table.is_file()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(
            {name: format(v, ".6g") if isinstance(v, float) else v for name, v in row.items()}
        )


if __name__ == "__main__":
    main()
