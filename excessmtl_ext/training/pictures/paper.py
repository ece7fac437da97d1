"""The figures of He et al. 2024, drawn from the committed tables of sweeps: results.csv, epochs.csv, sweep.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from excessmtl_ext.training.pictures.paper_panels import (
    ESTIMATING,
    count_epochs,
    draw_band,
    draw_single_task,
    draw_spread,
    finish_figure,
    label_weight,
    metric_label,
    spread_note,
    zoom,
)
from excessmtl_ext.training.pictures.style import (
    TEXT_COLOUR,
    new_figure,
    plain,
    save_figure,
    style_axes,
)
from excessmtl_ext.training.pictures.sweep_view import SINGLE_TASK, SweepView
from excessmtl_ext.training.run.methods import METHODS
from excessmtl_ext.training.run.workloads import WORKLOADS
from excessmtl_ext.training.sweep.results import Row, SweepResults

# Which figure of the paper shows a data set over the noise levels.
NOISE_FIGURES = {"multimnist": 6, "office-home": 7, "nyuv2": 8, "sarcos": 9}

MOML = "moml"

CLEAN_COLOUR, NOISY_COLOUR = "#0072B2", "#D55E00"

# Between two powers of ten a logarithmic axis has no labelled ticks.
LOG_SCALE_FROM = 30


@dataclass(frozen=True)
class FigureReport:
    """What became of one figure of the paper.

    Attributes:
        name: Such as ``"Fig. 6, MultiMNIST"``.
        path: Where it was drawn; None if it was not.
        missing: The run that it would need.
    """

    name: str
    path: Path | None = None
    missing: str = ""


def draw_paper_figures(
    sweeps: Sequence[SweepResults], output: Path, *, draw_toy: Callable[[Path], Any]
) -> list[FigureReport]:
    """Draws what the sweeps hold of Figs. 1 to 9, and says what the others need.

    Args:
        sweeps: From `read_results`; of one data set or of several.
        output: Folder for the pictures.
        draw_toy: Draws Fig. 1, which needs no sweep.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    output.mkdir(parents=True, exist_ok=True)
    toy = output / "fig1_toy.png"
    draw_toy(toy)
    reports = [FigureReport("Fig. 1, toy problem", toy)]
    views = [SweepView(sweep) for sweep in sweeps if sweep.runs]
    names = _file_names(views)
    for view, name in zip(views, names, strict=True):
        for number, what, draw in (
            (2, "excess risk", draw_excess_risk),
            (3, "training", draw_curves_over_epochs),
            (4, "loss profile", draw_loss_profile),
            (5, "moml", draw_moml),
            (NOISE_FIGURES.get(view.dataset), "noise levels", draw_noise_levels),
        ):
            label = f"Fig. {number}" if number else "Like Fig. 6"
            prefix = f"fig{number}_" if number else ""
            path = output / f"{prefix}{name}_{what.replace(' ', '_')}.png"
            missing = draw(view, path)
            reports.append(
                FigureReport(f"{label}, {view.title}: {what}", None if missing else path, missing)
            )
    drawn = {view.dataset for view in views}
    reports += [
        FigureReport(
            f"Fig. {number}, {WORKLOADS[dataset].title}", None, f"excessmtl sweep {dataset}"
        )
        for dataset, number in NOISE_FIGURES.items()
        if dataset not in drawn
    ]
    return reports


def draw_noise_levels(view: SweepView, path: Path) -> str:
    """Draws Figs. 6 to 9: all tasks, the clean tasks and their weight over the noise level.

    Returns:
        What is missing; empty if the figure was drawn.
    """
    methods = [name for name in view.methods if name not in (SINGLE_TASK, MOML)]
    return _draw_over_noise(view, methods, path)


def draw_moml(view: SweepView, path: Path) -> str:
    """Draws Fig. 5: ExcessMTL and MOML, which knows clean labels; see `draw_noise_levels`."""
    if MOML not in view.methods:
        return f"excessmtl sweep {view.dataset} --methods moml,... into the same folder"
    return _draw_over_noise(view, [*_estimating(view), *_present(view, "uniform", MOML)], path)


def draw_curves_over_epochs(view: SweepView, path: Path) -> str:
    """Draws Fig. 3: the clean tasks' weight and both kinds of tasks over the epochs; see `draw_noise_levels`."""
    methods = [name for name in view.methods if name != SINGLE_TASK]
    noise = view.shown_noise
    if not methods:
        return f"excessmtl sweep {view.dataset} --noise {noise:g}"
    figure = new_figure(11.5, 4.4)
    axes = figure.subplots(1, 3)
    columns = [
        [f"balancer/{task}_mean_weight" for task in view.clean],
        [f"test/{task}_{view.metric}" for task in view.clean],
        [f"test/{task}_{view.metric}" for task in view.noisy],
    ]
    for name in methods:
        for panel, (ax, names) in enumerate(zip(axes, columns, strict=True)):
            reduce = _share(view, names) if panel == 0 else _mean_of(names)
            curves = [[reduce(row) for row in view.epochs(run)] for run in view.runs(name, noise)]
            length = min((len(curve) for curve in curves), default=0)
            if length:
                values = np.array([curve[:length] for curve in curves])
                draw_band(ax, np.arange(1, length + 1), values, name)
    label_weight(axes[0], view, "epoch")
    axes[1].set_title("Clean tasks")
    axes[2].set_title("Noisy tasks, on clean test labels")
    for ax, names in ((axes[1], view.clean), (axes[2], view.noisy)):
        ax.set_xlabel("epoch")
        ax.set_ylabel(metric_label(view.metric))
        draw_single_task(ax, view, names, [noise])
        zoom(ax, view.metric)
    for ax in axes:
        style_axes(ax)
        count_epochs(ax)
    finish_figure(
        figure,
        axes[1],
        path,
        f"{view.title} during training, {noise:.0%} label noise: {view.describe(methods)}{spread_note(view)}",
    )
    return ""


def draw_excess_risk(view: SweepView, path: Path) -> str:
    """Draws Fig. 2: each task's true excess risk and its estimate over the epochs, one column per estimator.

    True is the training loss on the labels that the method sees, less the lowest that the task reaches alone at the
    same noise, or in the run itself where no such run is at hand.
    """
    methods = [
        name
        for name in _estimating(view)
        if any(len(view.epochs(run)) > 1 for run in view.runs(name, view.shown_noise))
    ]
    if not methods:
        return f"excessmtl sweep {view.dataset} --methods excessmtl-official,... with at least 2 epochs"
    noise = view.shown_noise
    figure = new_figure(3.7 * len(methods) + 1.2, 6.2)
    grid = figure.subplots(2, len(methods), squeeze=False, sharex=True)
    converged = {task: _converged_loss(view, task, noise) for task in view.tasks}
    for column, name in enumerate(methods):
        true_axes, estimate_axes = grid[0][column], grid[1][column]
        pairs: list[tuple[float, float]] = []
        for task in view.tasks:
            true, estimated = [], []
            for run in view.runs(name, noise):
                rows = view.epochs(run)
                losses = [row[f"train/{task}_loss"] for row in rows]
                lowest = converged[task]
                floor = min(losses) if lowest is None else min(lowest, *losses)
                true.append([loss - floor for loss in losses])
                risk = f"balancer/{task}_excess_risk"
                estimated.append([row.get(risk, math.nan) for row in rows])
            length = min(map(len, true))
            true, estimated = ([run[:length] for run in each] for each in (true, estimated))
            pairs += zip(np.ravel(true), np.ravel(estimated), strict=True)
            for ax, values in ((true_axes, true), (estimate_axes, estimated)):
                mean = np.mean(values, axis=0)
                colour = NOISY_COLOUR if task in view.noisy else CLEAN_COLOUR
                label = "noisy tasks" if task in view.noisy else "clean tasks"
                ax.plot(np.arange(1, len(mean) + 1), mean, color=colour, linewidth=1.8, label=label)
        true_axes.set_title(METHODS[name].label)
        estimates = [estimate for _, estimate in pairs]
        title = f"rank correlation with the truth {_rank_correlation(pairs):.2f}"
        if min(estimates) > 0 and max(estimates) > LOG_SCALE_FROM * min(estimates):
            estimate_axes.set_yscale("log")
            title += " (log scale)"
        else:
            estimate_axes.set_ylim(bottom=0)
        estimate_axes.set_title(title)
        estimate_axes.set_xlabel("epoch")
        for ax in (true_axes, estimate_axes):
            style_axes(ax)
            count_epochs(ax)
        true_axes.set_ylim(bottom=0)
    grid[0][0].set_ylabel("true excess risk\n(training loss − converged loss)")
    grid[1][0].set_ylabel("estimated excess risk\n(each method's own unit)")
    if any(value is not None for value in converged.values()):
        basis = "converged: lowest training loss of the task alone"
    else:
        basis = "converged: lowest training loss of the run itself"
    finish_figure(
        figure,
        grid[0][0],
        path,
        f"{view.title}, {noise:.0%} label noise: {view.describe(methods)}\n{basis}",
    )
    return ""


def draw_loss_profile(view: SweepView, path: Path) -> str:
    """Draws Fig. 4: each task's test loss as a multiple of what it reaches alone, without noise and with 80 %."""
    from matplotlib.colors import TwoSlopeNorm

    methods = [name for name in view.methods if name != SINGLE_TASK]
    levels = [noise for noise in sorted({0.0, view.shown_noise}) if noise in view.noise]
    alone = {
        (task, noise): view.alone(task, noise, f"test/{task}_loss")
        for task in view.tasks
        for noise in levels
    }
    if not methods or not all(alone.values()):
        return f"excessmtl sweep {view.dataset} --methods single-task,... --noise 0,0.8"
    cell_width = 0.95 if len(view.tasks) <= 4 else 0.72
    width = 2.6 + len(levels) * (cell_width * len(view.tasks) + 0.5)
    figure = new_figure(max(width, 8.5), 1.9 + 0.42 * len(methods))
    axes = figure.subplots(1, len(levels), squeeze=False, sharey=True)[0]
    ratios = {noise: np.full((len(methods), len(view.tasks)), np.nan) for noise in levels}
    for noise in levels:
        for i, name in enumerate(methods):
            for j, task in enumerate(view.tasks):
                losses = [run[f"test/{task}_loss"] for run in view.runs(name, noise)]
                if losses:
                    mean_alone = statistics.fmean(alone[task, noise])
                    ratios[noise][i, j] = (
                        statistics.fmean(losses) / mean_alone if mean_alone else math.nan
                    )
    logs = {noise: _log2(each) for noise, each in ratios.items()}
    largest = max(
        (float(value) for each in logs.values() for value in np.abs(each[np.isfinite(each)])),
        default=0.0,
    )
    limit = min(max(largest, 1.0), 3.0)  # from half to double at least; an eighth to eight at most
    norm = TwoSlopeNorm(vcenter=0, vmin=-limit, vmax=limit)
    image = None
    for ax, noise in zip(axes, levels, strict=True):
        # A loss that is halved is as far from 1 as one that is doubled.
        image = ax.imshow(logs[noise], cmap="RdBu_r", norm=norm, aspect="auto")
        for (i, j), ratio in np.ndenumerate(ratios[noise]):
            if np.isnan(ratio):
                continue
            colour = "white" if abs(logs[noise][i, j]) > 0.6 * limit else "black"
            ax.text(j, i, f"{ratio:.2f}", ha="center", va="center", color=colour, fontsize=9)
        ax.set_title(f"{noise:.0%} label noise", fontsize=10, color=TEXT_COLOUR)
        names = [plain(f"{task}\n(noisy)" if task in view.noisy else task) for task in view.tasks]
        ax.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=8.5)
        ax.set_yticks(range(len(methods)), [METHODS[name].label for name in methods], fontsize=9)
        ax.tick_params(colors=TEXT_COLOUR, length=0)
        ax.spines[:].set_visible(False)
    assert image is not None
    bar = figure.colorbar(image, ax=axes, ticks=[-limit, 0, limit], shrink=0.8, pad=0.02)
    bar.ax.set_yticklabels(
        [f"x {2**-limit:.2g}", "equal", f"x {2**limit:.2g}"], fontsize=8.5, color=TEXT_COLOUR
    )
    bar.outline.set_visible(False)  # type: ignore[operator]
    figure.suptitle(
        f"{view.title}: test loss / test loss of the task trained alone (below 1 is better)\n"
        f"{view.describe([*methods, SINGLE_TASK])}",
        fontsize=11,
        color=TEXT_COLOUR,
        x=0.01,
        ha="left",
    )
    save_figure(figure, path)
    return ""


def _draw_over_noise(view: SweepView, methods: Sequence[str], path: Path) -> str:
    if len(view.noise) < 2 or not methods:
        return f"excessmtl sweep {view.dataset} with at least two levels in --noise"
    figure = new_figure(11.5, 4.4)
    axes = figure.subplots(1, 3)
    columns = [
        [f"test/{task}_{view.metric}" for task in view.tasks],
        [f"test/{task}_{view.metric}" for task in view.clean],
        [f"balancer/{task}_mean_weight" for task in view.clean],
    ]
    for name in methods:
        for panel, (ax, names) in enumerate(zip(axes, columns, strict=True)):
            levels = [noise for noise in view.noise if view.runs(name, noise)]
            if panel == 2:
                # Some methods solve for new weights at each step: a mean says more than the last one.
                share = _share(view, names)
                values = [
                    [share(view.epochs(run)[-1]) for run in view.runs(name, noise)]
                    for noise in levels
                ]
            else:
                mean = _mean_of(names)
                values = [[mean(run) for run in view.runs(name, noise)] for noise in levels]
            draw_spread(ax, [100 * noise for noise in levels], values, name)
    axes[0].set_title("All tasks")
    axes[1].set_title("Clean tasks")
    for ax, names in ((axes[0], view.tasks), (axes[1], view.clean)):
        ax.set_xlabel("label noise of the noisy tasks in %")
        ax.set_ylabel(metric_label(view.metric))
        draw_single_task(ax, view, names, view.noise, is_over_noise=True)
    label_weight(axes[2], view, "label noise of the noisy tasks in %")
    for ax in axes:
        style_axes(ax)
        ax.set_xticks([100 * noise for noise in view.noise])
    finish_figure(
        figure,
        axes[0],
        path,
        f"{view.title}, on clean test labels: {view.describe(methods)}{spread_note(view)}",
    )
    return ""


def _converged_loss(view: SweepView, task: str, noise: float) -> float | None:
    """Returns the lowest training loss of the task alone, over all seeds and epochs."""
    losses = [
        row[f"train/{task}_loss"]
        for run in view.runs(SINGLE_TASK, noise, task)
        for row in view.epochs(run)
    ]
    return min(losses, default=None)


def _rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Returns Spearman's coefficient over tasks, epochs and seeds."""
    true, estimated = (np.argsort(np.argsort(values)) for values in np.array(pairs).T)
    return float(np.corrcoef(true, estimated)[0, 1])


def _log2(ratios: np.ndarray) -> np.ndarray:
    """Returns the logarithms; NaN where there is none."""
    return np.log2(ratios, where=ratios > 0, out=np.full_like(ratios, np.nan))


def _mean_of(columns: Sequence[str]) -> Callable[[Row], float]:
    """Returns the mean of some columns of a row; NaN of none, as where no task is clean."""
    return lambda row: statistics.fmean(row[name] for name in columns) if columns else math.nan


def _share(view: SweepView, columns: Sequence[str]) -> Callable[[Row], float]:
    """Returns the weights in ``columns`` as a part of all weights, whatever they sum to."""
    every = [f"balancer/{task}_mean_weight" for task in view.tasks]
    return lambda row: sum(row[name] for name in columns) / sum(row[name] for name in every)


def _estimating(view: SweepView) -> list[str]:
    return _present(view, *ESTIMATING)


def _present(view: SweepView, *names: str) -> list[str]:
    return [name for name in names if name in view.methods]


def _file_names(views: Sequence[SweepView]) -> list[str]:
    """Names pictures by data set, and by folder where two sweeps have the same."""
    datasets = [view.dataset for view in views]
    return [
        view.dataset
        if datasets.count(view.dataset) == 1
        else f"{view.dataset}_{view.results.folder.resolve().name}"
        for view in views
    ]
