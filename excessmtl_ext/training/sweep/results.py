"""The tables of a sweep: one row per finished run, one row per epoch, small enough to be committed."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excessmtl_ext.training.run.files import WAY_OUT, read_json, read_table, write_atomically
from excessmtl_ext.training.run.finished import TASKS_SCHEMA, read_epochs, read_final_metrics
from excessmtl_ext.training.run.metrics import PRIMARY_METRIC
from excessmtl_ext.training.run.record import FINAL_METRICS, TIMES, read_config
from excessmtl_ext.training.run.schema import AtLeast, OneOf
from excessmtl_ext.training.run.workloads import WORKLOADS

SWEEP = "sweep.json"
RESULTS = "results.csv"
EPOCHS = "epochs.csv"
STEP_SIZES = "step_sizes.csv"

# What tells two runs of a sweep apart. `task` is the one that a single-task run trains, else empty.
KEYS = ("dataset", "method", "task", "noise", "seed")
TEXT_COLUMNS = frozenset({"dataset", "method", "task"})

# A test accuracy of 10,000 samples has four digits; the tables go to git.
_FLOAT_FORMAT = ".6g"

_SCHEMA = {"dataset": OneOf(tuple(WORKLOADS)), "epochs": AtLeast(1), "tasks": TASKS_SCHEMA}

Row = dict[str, Any]


@dataclass(frozen=True)
class FinishedRun:
    """The rows of one finished run.

    Attributes:
        result: Its row of results.csv.
        epochs: Its rows of epochs.csv.
    """

    result: Row
    epochs: list[Row]


@dataclass(frozen=True)
class SweepResults:
    """What a sweep's folder says without the folders of its runs.

    Attributes:
        folder: Where it was read from.
        settings: Content of sweep.json.
        runs: Rows of results.csv; numbers are floats, an empty field is absent.
        epochs: Rows of epochs.csv, likewise.
    """

    folder: Path
    settings: dict[str, Any]
    runs: list[Row]
    epochs: list[Row]


def is_finished(folder: Path, epochs: int) -> bool:
    """Returns whether the folder holds a run that has gone through all of ``epochs``.

    Raises:
        ValueError: the file that says so is damaged.
    """
    if not (folder / FINAL_METRICS).is_file():
        return False
    return read_final_metrics(folder)["final"]["epoch"] >= epochs


def read_finished_run(folder: Path) -> FinishedRun:
    """Reads the rows of a finished run from its folder.

    Raises:
        FileNotFoundError: a file of the run is missing.
        ValueError: a file of the run is damaged.
    """
    config = read_config(folder)
    metrics = read_final_metrics(folder)
    keys = {name: config.get(name) for name in KEYS}
    selected = metrics["selected"]
    times = read_table(folder / TIMES, needs=("train_seconds",))
    result = {
        **keys,
        "robust_step_size": config.get("robust_step_size"),
        "epochs": config["epochs"],
        "num_train": config.get("num_train"),
        "selected_epoch": int(selected["epoch"]),
        metrics["selection"]: selected[metrics["selection"]],
        **{name: value for name, value in selected.items() if name.startswith("test/")},
        **{f"final_weight/{task}": w for task, w in metrics["final_task_weights"].items()},
        "skipped_steps": metrics["num_skipped_steps"],
        "train_seconds": sum(row["train_seconds"] for row in times),
    }
    return FinishedRun(result, [{**keys, **row} for row in read_epochs(folder)])


def write_results(folder: Path, runs: Iterable[FinishedRun]) -> None:
    """Replaces results.csv and epochs.csv of a sweep's folder; the rows are sorted by their keys."""
    ordered = sorted(runs, key=lambda run: [str(run.result[name] or "") for name in KEYS])
    write_table(folder / RESULTS, [run.result for run in ordered])
    write_table(folder / EPOCHS, [row for run in ordered for row in run.epochs])


def read_results(folder: Path) -> SweepResults:
    """Reads the tables that a sweep has written.

    Raises:
        FileNotFoundError: the folder holds no sweep, or none of its runs has finished.
        ValueError: a file is damaged.
    """
    for name in (SWEEP, RESULTS, EPOCHS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"Expected `results` to be a folder that `excessmtl sweep` has filled, but {folder} has no {name}."
            )
    settings = read_json(folder / SWEEP, schema=_SCHEMA)
    results = SweepResults(
        folder,
        settings,
        read_rows(folder / RESULTS, (*KEYS, "epochs", "num_train")),
        read_rows(folder / EPOCHS, (*KEYS, "epoch")),
    )
    _check_rows(results)
    return results


def common_metric(tasks: Sequence[Mapping[str, Any]]) -> str:
    """Returns the primary metric of tasks of one kind; tasks of different kinds have only the score in common."""
    kinds = {task["kind"] for task in tasks}
    return PRIMARY_METRIC[kinds.pop()] if len(kinds) == 1 else "score"


def _check_rows(results: SweepResults) -> None:
    """Raises ValueError where a table lacks what the figures need, and names it."""
    tasks = [task["name"] for task in results.settings["tasks"]]
    if not tasks or len(set(tasks)) < len(tasks):
        path = results.folder / SWEEP
        raise ValueError(f"Expected {path} to name the tasks once each, but got {tasks}. {WAY_OUT}")
    metric = common_metric(results.settings["tasks"])
    path = results.folder / RESULTS
    for row in results.runs:
        counts = [row.get(name, math.nan) for name in ("epochs", "num_train", "seed")]
        if not all(0 <= count < math.inf and count == int(count) for count in counts):
            raise _damaged(path, row, "whole numbers of epochs, samples and seed")
        if not 0 <= row.get("noise", math.nan) <= 1:
            raise _damaged(path, row, "a noise from 0 to 1")
        _check_columns(
            path, row, [f"test/{task}_{name}" for task in tasks for name in ("loss", metric)]
        )
    path = results.folder / EPOCHS
    keys = {tuple(row.get(name) for name in KEYS) for row in results.runs}
    seen = {tuple(row.get(name) for name in KEYS) for row in results.epochs}
    for key in keys - seen:
        raise _damaged(path, dict(zip(KEYS, key, strict=True)), "rows of each run")
    for row in results.epochs:
        weights = [f"balancer/{task}_mean_weight" for task in tasks]
        measured = [
            name for task in tasks for name in (f"train/{task}_loss", f"test/{task}_{metric}")
        ]
        _check_columns(path, row, [*weights, *measured])
        if not 0 < sum(row[name] for name in weights) < math.inf:
            raise _damaged(path, row, "weights that are not all 0")


def _check_columns(path: Path, row: Row, names: Iterable[str]) -> None:
    missing = [name for name in names if name not in row]
    if missing:
        raise _damaged(path, row, f"a number for {', '.join(missing)}")


def _damaged(path: Path, row: Row, expected: str) -> ValueError:
    key = ", ".join(f"{name} {row.get(name)}" for name in KEYS if row.get(name) not in (None, ""))
    return ValueError(
        f"Expected {path} to hold {expected}, but it does not for {key or 'a row'}. {WAY_OUT}"
    )


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows whose columns may differ: the header has them all, in the order of their first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_format(row.get(name)) for name in columns])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def _format(value: Any) -> Any:
    if value is None:
        return ""
    return format(value, _FLOAT_FORMAT) if isinstance(value, float) else value


def read_rows(path: Path, needs: Sequence[str] = ()) -> list[Row]:
    """Reads one of a sweep's tables, which has the columns ``needs``; an empty number is absent from its row.

    Raises:
        ValueError: the file is no such table.
    """
    return read_table(path, TEXT_COLUMNS, needs=needs, has_gaps=True)
