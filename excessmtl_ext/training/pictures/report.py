"""One HTML file that shows a run: curves, results, settings, and where it ran. It loads nothing from elsewhere."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from excessmtl_ext.training.pictures.style import (
    GRID_COLOUR,
    TEXT_COLOUR,
    new_figure,
    plain,
    style_axes,
)
from excessmtl_ext.training.run.files import WAY_OUT, check_replaceable, write_atomically
from excessmtl_ext.training.run.finished import (
    read_epochs,
    read_task_names,
    read_tasks,
    read_weights,
    selection_metric,
)
from excessmtl_ext.training.run.methods import METHODS
from excessmtl_ext.training.run.metrics import PRIMARY_METRIC
from excessmtl_ext.training.run.record import (
    CONFIG,
    FINAL_METRICS,
    METRICS,
    TASK_WEIGHTS,
    best_epoch,
    read_config,
    read_sessions,
)
from excessmtl_ext.training.run.workloads import WORKLOADS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT = "report.html"

# Tells a report from other pages, which are not overwritten.
MARK = '<meta name="generator" content="excessmtl report">'

# After Okabe & Ito: told apart with any colour vision. More tasks than colours repeat them with other dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("-", "--", ":")

# Between two powers of ten a logarithmic axis has no labelled ticks.
LOG_SCALE_FROM = 30

_STYLE = f"""
body {{ color: {TEXT_COLOUR}; font: 15px/1.5 system-ui, sans-serif; }}
body {{ margin: 2rem auto; max-width: 68rem; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin-bottom: 0; }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
figure {{ margin: 1rem 0; overflow-x: auto; }}
svg {{ height: auto; min-width: 40rem; width: 100%; }}
table {{ border-collapse: collapse; }}
th, td {{ border-bottom: 1px solid {GRID_COLOUR}; padding: .2rem 1.2rem .2rem 0; }}
th, td {{ text-align: left; vertical-align: top; }}
td.number {{ font-variant-numeric: tabular-nums; text-align: right; }}
td {{ overflow-wrap: break-word; }}
td:first-child {{ white-space: nowrap; }}
"""


@dataclass(frozen=True)
class RunContent:
    """What the report shows of a run.

    Attributes:
        config: All values of the run.
        sessions: Where it ran, one entry per start.
        epochs: Rows of metrics.csv, at least one.
        weights: Rows of task_weights.csv.
        tasks: Names, in order.
        noisy: Those with wrong labels; None while the run has not finished, which does not say.
        kinds: What each task predicts, by name; empty while the run has not finished.
        selected: The epoch that did best on validation, so far; None while none has a finite score.
        selection: The metric that decided.
        is_finished: Whether all epochs are done.
    """

    config: dict[str, Any]
    sessions: list[dict[str, Any]]
    epochs: list[dict[str, float]]
    weights: list[dict[str, float]]
    tasks: list[str]
    noisy: set[str] | None
    kinds: dict[str, Any]
    selected: dict[str, float] | None
    selection: str
    is_finished: bool


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Writes the report on a run, finished or under way.

    Args:
        folder: Of the run, see `RunRecord`.
        output: The HTML file; None for report.html in the folder.

    Returns:
        The file.

    Raises:
        FileExistsError: ``output`` is something that no report is.
        FileNotFoundError: the folder holds no run, or one without a finished epoch.
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: a file of the run is damaged.
    """
    path = Path(output) if output is not None else Path(folder) / REPORT
    check_replaceable(path, MARK.encode())
    page = render(read_content(Path(folder))).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(page))
    return path


def read_content(folder: Path) -> RunContent:
    """Reads what the report shows.

    Raises:
        FileNotFoundError: the folder holds no run, or one without a finished epoch.
        ValueError: a file of the run is damaged.
    """
    for name in (CONFIG, METRICS, TASK_WEIGHTS):
        if not (folder / name).is_file():
            what = "a run" if name == CONFIG else "a run with a finished epoch"
            raise FileNotFoundError(f"Expected {what} in {folder}, but it has no {name}.")
    config = read_config(folder)
    tasks = read_task_names(folder)
    task = config.get("task") or None
    selection = selection_metric(task)
    epochs = read_epochs(folder, needs=(selection,))
    final = None
    if (folder / FINAL_METRICS).is_file():
        final = read_tasks(folder)
        if [each["name"] for each in final] != tasks:
            raise ValueError(
                f"Expected {folder / TASK_WEIGHTS} to name the tasks of {FINAL_METRICS}, but got {', '.join(tasks)}. "
                f"{WAY_OUT}"
            )
    return RunContent(
        config=config,
        sessions=read_sessions(folder),
        epochs=epochs,
        weights=read_weights(folder, tasks),
        tasks=tasks,
        noisy=None if final is None else {each["name"] for each in final if each["is_noisy"]},
        kinds={} if final is None else {each["name"]: each["kind"] for each in final},
        selected=best_epoch(epochs, selection),
        selection=selection,
        is_finished=final is not None,
    )


def render(run: RunContent) -> str:
    """Returns the page as text."""
    title = f"{_method_label(run)} on {_dataset_title(run)}"
    state = (
        f"{len(run.epochs)} epochs"
        if run.is_finished
        else f"Not finished: {len(run.epochs)} of {run.config['epochs']} epochs"
    )
    skipped = sum(row.get("train/skipped_steps", 0.0) for row in run.epochs)
    if run.selected is None:
        best = f"No epoch has a finite {run.selection} yet"
        heading = "Latest epoch"
    else:
        number = f"{run.selected['epoch']:.0f}"
        best = f"Best on validation: epoch {number} ({run.selection} {run.selected[run.selection]:.4f})"
        heading = f"Epoch {number}, selected on validation"
    summary = (
        f"{state}, noise {run.config['noise']:.0%}, seed {run.config['seed']}. {best}. "
        f"Skipped steps: {skipped:.0f}."
    )
    caption = (
        "By task. The dotted line is the selected epoch. Risks are the balancer's own estimates, means over each "
        "epoch; losses are on the training labels, noise included; test labels are clean."
    )
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            # Whatever slipped in: the browser fetches nothing and runs nothing.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            MARK,
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            f"<h1>{escape(title)}</h1>",
            f"<p>{escape(summary)}</p>",
            f'<figure role="img" aria-label="Curves of {escape(title)}">',
            draw_curves(run),
            f"<figcaption>{escape(caption)}</figcaption>",
            "</figure>",
            f"<h2>{heading}</h2>",
            _result_table(run),
            "<h2>Settings</h2>",
            _table(
                ["Name", "Value"], [[name, _shown(value)] for name, value in run.config.items()]
            ),
            "<h2>Sessions</h2>",
            _session_table(run),
            "</body>",
            "</html>",
            "",
        ]
    )


def draw_curves(run: RunContent) -> str:
    """Returns the weights, risks, losses and scores of every task over the epochs, as an SVG element.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    panels: list[tuple[str, Callable[[str], tuple[Sequence[float], Sequence[float]]]]] = [
        ("Task weight", lambda task: _weight_curve(run, task))
    ]
    accuracies = set(run.kinds.values()) == {"classification"}
    for title, name in (
        ("Relative excess risk", "balancer/{}_relative_excess_risk"),
        ("Training loss", "train/{}_loss"),
        ("Test accuracy", "test/{}_accuracy") if accuracies else ("Test score", "test/{}_score"),
    ):
        if all(name.format(task) in run.epochs[0] for task in run.tasks):
            panels.append((title, lambda task, name=name: _epoch_curve(run, name.format(task))))
    figure = new_figure(10.5, 3.3 * -(-len(panels) // 2) + 0.5)
    layout: Any = figure.get_layout_engine()
    layout.set(h_pad=0.1)  # or titles touch the axis label above
    grid = figure.subplots(-(-len(panels) // 2), 2, squeeze=False)
    for axes, (title, curve) in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, run, title, curve)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False
    )

    from matplotlib import rc_context

    text = io.StringIO()
    # Text stays text, for search and screen readers; equal runs give equal bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": REPORT}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]  # without the prolog of a file of its own
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL).strip()


def _draw_panel(
    axes: Axes,
    run: RunContent,
    title: str,
    curve: Callable[[str], tuple[Sequence[float], Sequence[float]]],
) -> None:
    values: list[float] = []
    for index, task in enumerate(run.tasks):
        x, y = curve(task)
        values += y
        axes.plot(
            x,
            y,
            color=COLOURS[index % len(COLOURS)],
            linestyle=DASHES[index // len(COLOURS) % len(DASHES)],
            linewidth=1.6,
            marker="o" if len(x) == 1 else None,
            label=plain(_task_label(run, task)),
        )
    if run.selected is not None:
        axes.axvline(run.selected["epoch"], color=TEXT_COLOUR, linestyle=":", linewidth=0.9)
    finite = [value for value in values if np.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) > LOG_SCALE_FROM * min(finite):
        axes.set_yscale("log")
        title += " (log scale)"
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.set_xlim(left=0, right=run.epochs[-1]["epoch"])
    style_axes(axes)


def _weight_curve(run: RunContent, task: str) -> tuple[list[float], list[float]]:
    steps_per_epoch = run.epochs[0]["step"] / run.epochs[0]["epoch"]
    x = [row["step"] / steps_per_epoch for row in run.weights]
    return x, [row[task] for row in run.weights]


def _epoch_curve(run: RunContent, column: str) -> tuple[list[float], list[float]]:
    return [row["epoch"] for row in run.epochs], [row[column] for row in run.epochs]


def _result_table(run: RunContent) -> str:
    row = run.epochs[-1] if run.selected is None else run.selected
    header = ["Task", "Test score", "Test metric", "Validation score", "Weight"]
    rows = []
    for task in run.tasks:
        metric = PRIMARY_METRIC[run.kinds[task]] if task in run.kinds else None
        value = row.get(f"test/{task}_{metric}")
        rows.append(
            [
                _task_label(run, task),
                row.get(f"test/{task}_score"),
                ""
                if value is None or metric is None
                else f"{metric.replace('_', ' ')} {value:.4f}",
                row.get(f"validation/{task}_score"),
                row.get(f"balancer/{task}_weight"),
            ]
        )
    return _table(header, rows)


def _session_table(run: RunContent) -> str:
    rows = []
    for session in run.sessions:
        commit = (session.get("commit") or "unknown")[:12]
        ops = session.get("compiled_ops")
        rows.append(
            [
                session.get("started", ""),
                f"{commit}{' with changes' if session.get('is_dirty') else ''}",
                f"{session.get('device', '')} ({session.get('device_name', '')})",
                session.get("versions", {}).get("torch", ""),
                "compiled" if isinstance(ops, dict) else f"reference ({ops})",
                session.get("platform", ""),
            ]
        )
    return _table(["Started", "Commit", "Device", "torch", "Ops", "Platform"], rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["<table>", "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in header) + "</tr>"]
    for row in rows:
        cells = [
            f'<td class="number">{cell:.4f}</td>'
            if isinstance(cell, float)
            else f"<td>{escape('' if cell is None else str(cell))}</td>"
            for cell in row
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</table>"])


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _task_label(run: RunContent, task: str) -> str:
    return f"{task} (noisy)" if run.noisy is not None and task in run.noisy else task


def _method_label(run: RunContent) -> str:
    name = run.config["method"]
    label = METHODS[name].label if name in METHODS else name
    return f"{label} ({run.config['task']})" if run.config.get("task") else label


def _dataset_title(run: RunContent) -> str:
    name = run.config["dataset"]
    return WORKLOADS[name].title if name in WORKLOADS else name
