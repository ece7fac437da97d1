"""Reads what a run has left in its folder, and checks that it is what a run leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from excessmtl_ext.data import TaskKind
from excessmtl_ext.training.run.files import WAY_OUT, read_columns, read_json, read_table
from excessmtl_ext.training.run.progress import SELECTION_METRIC
from excessmtl_ext.training.run.record import FINAL_METRICS, METRICS, TASK_WEIGHTS
from excessmtl_ext.training.run.schema import AtLeast, Nullable, OneOf

TASKS_SCHEMA = [{"name": str, "kind": OneOf(get_args(TaskKind)), "is_noisy": bool}]

# null: a number that was not finite.
_ROW_SCHEMA = {str: Nullable(float)}
_FINAL_SCHEMA = {
    "selection": str,
    "tasks": TASKS_SCHEMA,
    "selected": _ROW_SCHEMA,
    "final": _ROW_SCHEMA,
    "final_task_weights": {str: float},
    "noisy_tasks": [str],
    "num_skipped_steps": AtLeast(0),
}


def selection_metric(task: str | None) -> str:
    """Returns the metric that epochs are selected by; of a run that trains one ``task`` alone, that task's score."""
    return SELECTION_METRIC if task is None else f"validation/{task}_score"


def read_final_metrics(folder: Path) -> dict[str, Any]:
    """Reads the metrics.json of a finished run.

    Raises:
        FileNotFoundError: the run has not finished, or the folder holds none.
        ValueError: the file is damaged.
    """
    path = folder / FINAL_METRICS
    metrics = read_json(path, schema=_FINAL_SCHEMA)
    names = [task["name"] for task in metrics["tasks"]]
    if not names or metrics["final_task_weights"].keys() != set(names):
        raise _damaged(path, f"a weight of each of its tasks, {', '.join(names) or 'none'}")
    for row in (metrics["selected"], metrics["final"]):
        if not (row.get("epoch") or 0) >= 1:
            raise _damaged(path, "the number of each epoch")
    if metrics["selected"].get(metrics["selection"]) is None:
        raise _damaged(path, f"a number for {metrics['selection']} of the selected epoch")
    return metrics


def read_tasks(folder: Path) -> list[dict[str, Any]]:
    """Reads name, kind and ``is_noisy`` of the tasks of a finished run, at least one, from its metrics.json.

    Raises:
        FileNotFoundError: the run has not finished, or the folder holds none.
        ValueError: the file is damaged.
    """
    path = folder / FINAL_METRICS
    tasks = read_json(path, schema={"tasks": TASKS_SCHEMA})["tasks"]
    if not tasks:
        raise _damaged(path, "at least one task")
    return tasks


def read_epochs(folder: Path, needs: Iterable[str] = ()) -> list[dict[str, float]]:
    """Reads the metrics.csv of a run: one row per finished epoch, at least one.

    Raises:
        FileNotFoundError: the run has not finished an epoch, or the folder holds none.
        ValueError: the file is damaged.
    """
    path = folder / METRICS
    rows = read_table(path, needs=("epoch", "step", *needs))
    if [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)) or not rows:
        raise _damaged(path, "one row for each epoch from 1 on")
    steps = [row["step"] for row in rows]
    per_epoch = steps[0]
    if not 1 <= per_epoch < math.inf or steps != [per_epoch * row["epoch"] for row in rows]:
        raise _damaged(path, "as many steps in each epoch")
    return rows


def read_task_names(folder: Path) -> list[str]:
    """Returns the names of a run's tasks, in order, from its task_weights.csv.

    Raises:
        FileNotFoundError: the run has not finished an epoch, or the folder holds none.
        ValueError: the file is damaged.
    """
    first, *names = read_columns(folder / TASK_WEIGHTS)
    if first != "step" or not names:
        raise _damaged(folder / TASK_WEIGHTS, "a column `step` and one for each task")
    return names


def read_weights(folder: Path, tasks: Iterable[str]) -> list[dict[str, float]]:
    """Reads the task_weights.csv of a run, which has a column for each of its ``tasks``.

    Raises:
        FileNotFoundError: the run has not finished an epoch, or the folder holds none.
        ValueError: the file is damaged.
    """
    path, names = folder / TASK_WEIGHTS, list(tasks)
    rows = read_table(path, needs=("step", *names))
    for row in rows:
        weights = [row[name] for name in names]
        if not all(0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
            raise _damaged(path, "weights that are at least 0 and not all 0")
    if any(not 0 < row["step"] < math.inf for row in rows):
        raise _damaged(path, "steps from 1 on")
    return rows


def _damaged(path: Path, expected: str) -> ValueError:
    return ValueError(f"Expected {path} to hold {expected}, but it does not. {WAY_OUT}")
