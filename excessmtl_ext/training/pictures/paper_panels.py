"""The panels that the figures of He et al. 2024 are made of: curves, bands, axes, legends."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from excessmtl_ext.training.pictures.style import TEXT_COLOUR, save_figure
from excessmtl_ext.training.pictures.sweep_view import SINGLE_TASK, SweepView
from excessmtl_ext.training.run.methods import METHODS
from excessmtl_ext.training.run.metrics import HIGHER_IS_BETTER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Methods that estimate excess risks; their lines are wide.
ESTIMATING = tuple(name for name in METHODS if name.startswith("excessmtl"))

METRIC_LABELS = {
    "score": "score (1 is perfect)",
    "accuracy": "accuracy",
    "nmse": "normalised squared error",
    "miou": "mean intersection over union",
    "relative_error": "relative error",
    "mean_angle": "mean angle in degrees",
}


def label_weight(ax: Axes, view: SweepView, x_label: str) -> None:
    share = len(view.clean) / len(view.tasks)
    ax.axhline(share, color=METHODS["uniform"].colour, linewidth=1, linestyle=":")
    ax.annotate(
        f"{share:.3g}",
        (1.01, share),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=8.5,
        color=TEXT_COLOUR,
    )
    ax.set_title("Weight of the clean tasks" + (", last epoch" if x_label != "epoch" else ""))
    ax.set_ylabel("share of all weights")
    ax.set_xlabel(x_label)
    ax.set_ylim(-0.03, 1.03)


def draw_single_task(
    ax: Axes,
    view: SweepView,
    tasks: Sequence[str],
    levels: Sequence[float],
    *,
    is_over_noise: bool = False,
) -> None:
    """Draws what the tasks reach alone, dashed, where all of them have such runs."""
    means = []
    for noise in levels:
        values = [view.alone(task, noise, f"test/{task}_{view.metric}") for task in tasks]
        if not values or not all(values):
            return
        means.append(statistics.fmean(statistics.fmean(each) for each in values))
    method = METHODS[SINGLE_TASK]
    style: dict[str, Any] = {
        "color": method.colour,
        "linestyle": "--",
        "linewidth": 1.2,
        "label": method.label,
    }
    if is_over_noise:
        ax.plot([100 * noise for noise in levels], means, **style)
    else:
        ax.axhline(means[0], **style)


def draw_band(ax: Axes, x: np.ndarray, values: np.ndarray, method: str) -> None:
    """Draws the mean over seeds, the first axis of ``values``, and a band of one standard deviation."""
    mean = values.mean(axis=0)
    ax.plot(x, mean, **line_style(method))
    if len(values) > 1:
        spread = values.std(axis=0, ddof=1)
        colour = METHODS[method].colour
        ax.fill_between(x, mean - spread, mean + spread, alpha=0.13, linewidth=0, color=colour)


def draw_spread(
    ax: Axes, x: Sequence[float], values: Sequence[Sequence[float]], method: str
) -> None:
    """Draws means over seeds, whose number may differ from point to point, and a band of one standard deviation."""
    mean = np.array([statistics.fmean(each) for each in values])
    spread = np.array([statistics.stdev(each) if len(each) > 1 else 0.0 for each in values])
    ax.plot(x, mean, marker="o", markersize=3.5, **line_style(method))
    colour = METHODS[method].colour
    ax.fill_between(x, mean - spread, mean + spread, alpha=0.13, linewidth=0, color=colour)


def line_style(method: str) -> dict[str, Any]:
    is_ours = method in ESTIMATING
    return {
        "color": METHODS[method].colour,
        "label": METHODS[method].label,
        "linewidth": 2.2 if is_ours else 1.3,
        "zorder": 3 if is_ours else 2.5,
        "solid_capstyle": "round",
    }


def zoom(ax: Axes, metric: str) -> None:
    """Cuts off where all methods are about to improve: the first epochs of the worst would set the scale."""
    lines = [np.asarray(line.get_ydata(), dtype=float) for line in ax.get_lines()]
    tails = np.concatenate([line[len(line) // 5 :] for line in lines] or [np.empty(0)])
    every = np.concatenate(lines or [np.empty(0)])
    tails, every = tails[np.isfinite(tails)], every[np.isfinite(every)]
    if not len(tails):
        return
    low, high = tails.min(), tails.max()
    if HIGHER_IS_BETTER[metric]:
        high = every.max()
    else:
        low = every.min()
    margin = 0.05 * max(high - low, 1e-3)
    ax.set_ylim(low - margin, high + margin)


def finish_figure(figure: Figure, labelled: Axes, path: Path, title: str) -> None:
    """Adds the title, and the legend under the panels, and writes the file."""
    handles, labels = labelled.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.suptitle(title, fontsize=11, color=TEXT_COLOUR, x=0.01, ha="left")
    columns = min(len(unique), 5 if figure.get_figwidth() > 9 else 3)
    figure.legend(
        unique.values(),
        unique.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9.5,
    )
    save_figure(figure, path)


def spread_note(view: SweepView) -> str:
    has_seeds = any(row["seed"] != view.results.runs[0]["seed"] for row in view.results.runs)
    return " (mean ± standard deviation)" if has_seeds else ""


def count_epochs(ax: Axes) -> None:
    """Starts at the first epoch; there is nothing between two."""
    from matplotlib.ticker import MaxNLocator

    ax.set_xlim(left=1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def metric_label(metric: str) -> str:
    arrow = "higher is better" if HIGHER_IS_BETTER[metric] else "lower is better"
    return f"test {METRIC_LABELS[metric]} ({arrow})"
