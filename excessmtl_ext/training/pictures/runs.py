"""Figures of finished runs: the weight of the clean tasks and the accuracies over time, one colour per method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from excessmtl_ext.training.pictures.style import TEXT_COLOUR, new_figure, save_figure, style_axes
from excessmtl_ext.training.run.files import WAY_OUT, read_json
from excessmtl_ext.training.run.finished import read_epochs, read_tasks, read_weights
from excessmtl_ext.training.run.methods import METHODS
from excessmtl_ext.training.run.record import CONFIG, FINAL_METRICS
from excessmtl_ext.training.run.schema import Nullable

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class RunCurves:
    """What figures show of one run.

    Attributes:
        method: Key of `METHODS`.
        epochs: Where it was evaluated.
        clean_score: Mean test score of the tasks without noise, of those that are trained; NaN if there is none.
        noisy_score: The same of the noisy tasks, on clean labels.
        weight_epochs: Where its weights were noted, in epochs; from 0.
        clean_weight: Share of the weights that the clean tasks have; equal weights at 0.
    """

    method: str
    epochs: np.ndarray
    clean_score: np.ndarray
    noisy_score: np.ndarray
    weight_epochs: np.ndarray
    clean_weight: np.ndarray


def read_run(folder: Path) -> RunCurves:
    """Reads the curves of a finished run from its tables.

    Raises:
        FileNotFoundError: the run has not finished, or the folder holds none.
        ValueError: a file is damaged.
    """
    if not (folder / FINAL_METRICS).is_file():
        raise FileNotFoundError(
            f"Expected a finished run in {folder}, but it has no {FINAL_METRICS}."
        )
    described = read_tasks(folder)
    config = read_json(folder / CONFIG, schema={"method": str, "task": Nullable(str)})
    tasks = [task["name"] for task in described]
    metrics = read_epochs(folder, needs=[f"test/{name}_score" for name in tasks])
    weights = read_weights(folder, tasks)
    clean = [task["name"] for task in described if not task["is_noisy"]]
    # The heads of the others are as they were initialised.
    trained = [config["task"]] if config.get("task") else tasks
    if not set(trained) <= set(tasks):
        raise ValueError(
            f"Expected {folder / CONFIG} to name a task of the run, one of {', '.join(tasks)}, "
            f"but got {config['task']!r}. {WAY_OUT}"
        )

    def mean_score(names: Iterable[str]) -> np.ndarray:
        columns = [[row[f"test/{name}_score"] for row in metrics] for name in names]
        return np.mean(columns, axis=0) if columns else np.full(len(metrics), np.nan)

    steps_per_epoch = metrics[0]["step"] / metrics[0]["epoch"]
    # The tables begin after the first steps; every method begins at equal weights.
    weight_steps = [0.0, *(row["step"] for row in weights)]
    clean_weights = [
        len(clean) / len(tasks),
        *(sum(row[task] for task in clean) / sum(row[task] for task in tasks) for row in weights),
    ]
    return RunCurves(
        method=config["method"],
        epochs=np.array([row["epoch"] for row in metrics]),
        clean_score=mean_score(task for task in trained if task in clean),
        noisy_score=mean_score(task for task in trained if task not in clean),
        weight_epochs=np.array(weight_steps) / steps_per_epoch,
        clean_weight=np.array(clean_weights),
    )


def draw_training(
    runs: Sequence[RunCurves], path: Path, *, title: str, what: str = "score"
) -> None:
    """Draws three panels over the epochs: clean weight, clean score, noisy tasks' score on clean test labels.

    Runs of one method are drawn as their mean with a band of one standard deviation.

    Args:
        runs: At least one; runs of one method have the same length.
        path: Where to write the PNG.
        title: Data set, noise and number of seeds.
        what: What the score is, ``"accuracy"`` where all tasks are classifications.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = new_figure(10.5, 3.9)
    weight_axes, clean_axes, noisy_axes = figure.subplots(1, 3)
    _draw_curves(weight_axes, runs, lambda run: (run.weight_epochs, run.clean_weight))
    _draw_curves(clean_axes, runs, lambda run: (run.epochs, run.clean_score))
    _draw_curves(noisy_axes, runs, lambda run: (run.epochs, run.noisy_score))

    weight_axes.set_title("Weight of the clean tasks")
    weight_axes.set_ylim(-0.02, 1.02)
    clean_axes.set_title(f"Clean tasks: test {what}")
    noisy_axes.set_title(f"Noisy tasks: {what} on clean test labels")
    _cut_off_start(clean_axes, [run.clean_score for run in runs])
    _cut_off_start(noisy_axes, [run.noisy_score for run in runs])
    for axes in (weight_axes, clean_axes, noisy_axes):
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0, right=max(float(run.epochs[-1]) for run in runs))
        style_axes(axes)

    handles, labels = clean_axes.get_legend_handles_labels()
    figure.suptitle(title, fontsize=11, color=TEXT_COLOUR, x=0.01, ha="left")
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9.5
    )
    save_figure(figure, path)


def _cut_off_start(axes: Axes, curves: Sequence[np.ndarray]) -> None:
    """Starts the axis at the lowest value after a tenth of the epochs: before, all methods are about to rise."""
    curves = [curve for curve in curves if not np.isnan(curve).any()]
    if not curves:
        return
    lowest = min(float(curve[len(curve) // 10 :].min()) for curve in curves)
    highest = max(float(curve.max()) for curve in curves)
    margin = 0.05 * max(highest - lowest, 0.02)
    axes.set_ylim(lowest - margin, highest + margin)


def _draw_curves(
    axes: Axes,
    runs: Sequence[RunCurves],
    curve: Callable[[RunCurves], tuple[np.ndarray, np.ndarray]],
) -> None:
    """Draws mean and spread per method, in the order of `METHODS`."""
    for name, method in METHODS.items():
        curves = [curve(run) for run in runs if run.method == name]
        if not curves:
            continue
        x = curves[0][0]
        y = np.stack([values for _, values in curves])
        mean = y.mean(axis=0)
        style: dict[str, Any] = {"color": method.colour}
        axes.plot(x, mean, linewidth=1.8, label=method.label, solid_capstyle="round", **style)
        if len(curves) > 1:
            spread = y.std(axis=0, ddof=1)
            axes.fill_between(x, mean - spread, mean + spread, alpha=0.18, linewidth=0, **style)
