"""The tables of a sweep: one row per finished run, one row per epoch, small enough to be committed."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excessmtl_ext.training.run.files import read_json, read_table, write_atomically
from excessmtl_ext.training.run.finished import read_epochs, read_final_metrics
from excessmtl_ext.training.run.record import FINAL_METRICS, TIMES, read_config

SWEEP = "sweep.json"
RESULTS = "results.csv"
EPOCHS = "epochs.csv"

# What tells two runs of a sweep apart. `task` is the one that a single-task run trains, else empty.
KEYS = ("dataset", "method", "task", "noise", "seed")
TEXT_COLUMNS = frozenset({"dataset", "method", "task"})

# A test accuracy of 10,000 samples has four digits; the tables go to git.
_FLOAT_FORMAT = ".6g"

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
    settings = read_json(folder / SWEEP)
    runs, epochs = (read_rows(folder / name, KEYS) for name in (RESULTS, EPOCHS))
    return SweepResults(folder, settings, runs, epochs)


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
