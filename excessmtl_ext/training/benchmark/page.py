"""What a benchmark leaves beside its trials: README.md, results.json, pictures, and one HTML page with all of it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from excessmtl_ext.training.benchmark.gains import OURS_COLOUR, draw_gains, method_gains
from excessmtl_ext.training.benchmark.plan import Plan
from excessmtl_ext.training.benchmark.statistics import groups_within
from excessmtl_ext.training.benchmark.tables import (
    EPOCHS,
    GROUPS,
    DatasetTable,
    Epoch,
    Group,
    Ranking,
    make_rankings,
    make_tables,
    ranking_to_markdown,
    to_markdown,
)
from excessmtl_ext.training.pictures.style import TEXT_COLOUR, new_figure, plain
from excessmtl_ext.training.run.files import (
    check_replaceable,
    finite_or_none,
    write_atomically,
    write_json,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "benchmark.html"
README = "README.md"
RESULTS = "results.json"

MARK = '<meta name="generator" content="excessmtl benchmark">'
_README_MARK = "# Benchmark\n"

_STYLE = f"""
body {{ color: {TEXT_COLOUR}; font: 15px/1.5 system-ui, sans-serif; }}
body {{ margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; margin: 0.5rem 0 2rem; white-space: nowrap; }}
th, td {{ border-bottom: 1px solid #ddd; padding: 0.25rem 0.6rem; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
tr.ours td:first-child {{ font-weight: 600; color: {OURS_COLOUR}; }}
td.best {{ font-weight: 600; }}
img {{ max-width: 100%; }}
"""

_HOW_TO_READ = (
    "Scores are means over the tasks of a group on clean test labels: accuracy, or 1 minus the squared error over the "
    "variance; 1 is perfect. Intervals are 95 % over seeds. 'selected' is the epoch that did best on validation "
    "labels as noisy as the training's, 'last two' the mean of the last two epochs. 'cost' is the processor time of a "
    "step over the first method's. Every method has at most five settings, chosen per data set with one seed that is "
    "not reported, on the same validation labels. All share network, Adam, learning rate, batches and initial "
    "parameters."
)


def write_page(
    plan: Plan, facts: Mapping[str, Any], left_out: Sequence[str] = ()
) -> list[DatasetTable]:
    """Writes README.md, results.json, the pictures and the page into the benchmark's folder.

    Args:
        plan: With its finished trials.
        facts: Where it ran, see `describe_environment`.
        left_out: A line for each data set and method that could not run.

    Returns:
        The tables.

    Raises:
        FileExistsError: one of the files holds something else.
        ModuleNotFoundError: matplotlib is not installed.
    """
    output = plan.output
    check_output(output)
    tables = make_tables(plan)
    rankings = make_rankings(tables)
    of_first_epoch = [ranking for ranking in rankings if ranking.epoch == EPOCHS[0]]
    pictures: dict[str, bytes] = {}
    for ranking in of_first_epoch:
        if ranking.group == "all" and (gains := method_gains(tables, ranking)):
            base = tables[0].lines[0].label
            pictures["gains.png"] = draw_gains(gains, len(ranking.datasets), base)
    pictures |= {f"ranks_{ranking.group}.png": draw_ranking(ranking) for ranking in of_first_epoch}
    for name, content in pictures.items():
        _write(output / name, content)
    conditions = describe(plan, facts)
    write_json(
        output / RESULTS,
        finite_or_none(
            {"environment": dict(facts), "conditions": conditions, **results_of(tables, rankings)}
        ),
    )
    readme = make_readme(tables, rankings, conditions, list(pictures), left_out)
    _write(output / README, readme.encode())
    page = make_html(tables, rankings, conditions, pictures, left_out)
    _write(output / PAGE, page.encode())
    return tables


def check_output(output: Path) -> None:
    """Raises FileExistsError where a file that `write_page` writes holds something else."""
    check_replaceable(output / PAGE, MARK.encode())
    check_replaceable(output / README, _README_MARK.encode())


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def describe(plan: Plan, facts: Mapping[str, Any]) -> str:
    """Returns where and how it ran as one sentence."""
    config = plan.config
    quick = ", quick: few samples and epochs, numbers say little" if config.is_quick else ""
    versions = facts["versions"]
    return (
        f"{plan.num_finished()} of {plan.num_trials()} trials, {config.num_seeds} seed(s){quick}; "
        f"{facts['device_name']}, torch {versions['torch']}, Python {versions['python']}, "
        f"commit {str(facts['commit'])[:10]}, {facts['started'][:10]}."
    )


def results_of(tables: Sequence[DatasetTable], rankings: Sequence[Ranking]) -> dict[str, Any]:
    """Returns tables and rankings as plain values."""
    return {
        "tables": [
            {
                "dataset": table.dataset,
                "title": table.title,
                "dose": table.dose,
                "is_ranked": table.is_ranked,
                "tasks": dict(table.tasks),
                "noise_shares": dict(table.noise_shares),
                "methods": [
                    {
                        "method": line.method,
                        "label": line.label,
                        "num_seeds": line.num_seeds,
                        "setting": dict(line.setting),
                        "cost": line.cost,
                        "task_scores": dict(line.task_scores),
                        "scores": {
                            f"{group}, {epoch}": None if score is None else asdict(score)
                            for (epoch, group), score in line.scores.items()
                        },
                    }
                    for line in table.lines
                ],
            }
            for table in tables
        ],
        "rankings": [
            {
                "group": ranking.group,
                "epoch": ranking.epoch,
                "datasets": list(ranking.datasets),
                "mean_ranks": dict(
                    zip(ranking.methods, ranking.comparison.mean_ranks.tolist(), strict=True)
                ),
                "friedman_p": ranking.comparison.friedman_p,
                "iman_davenport_p": ranking.comparison.iman_davenport_p,
                "critical_difference": ranking.comparison.critical_difference,
            }
            for ranking in rankings
        ],
    }


def make_readme(
    tables: Sequence[DatasetTable],
    rankings: Sequence[Ranking],
    conditions: str,
    pictures: Sequence[str],
    left_out: Sequence[str],
) -> str:
    """Returns README.md."""
    missing = ["Left out:", "", *(f"- {line}" for line in left_out), ""] if left_out else []
    parts = [
        _README_MARK,
        conditions,
        "",
        _HOW_TO_READ,
        "",
        *missing,
        *(f"![{name}]({name})\n" for name in pictures),
        *(ranking_to_markdown(ranking) for ranking in rankings),
        *(to_markdown(table) for table in tables),
    ]
    return "\n".join(parts).rstrip() + "\n"


def make_html(
    tables: Sequence[DatasetTable],
    rankings: Sequence[Ranking],
    conditions: str,
    pictures: Mapping[str, bytes],
    left_out: Sequence[str],
) -> str:
    """Returns the page; it loads nothing from elsewhere."""
    images = [
        f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        for name, content in pictures.items()
    ]
    missing = "".join(f"<li>{escape(line)}</li>" for line in left_out)
    body = [
        "<h1>Benchmark</h1>",
        f"<p>{escape(conditions)}</p>",
        f"<p>{escape(_HOW_TO_READ)}</p>",
        f"<p>Left out:</p><ul>{missing}</ul>" if missing else "",
        *images,
        *(_ranking_html(ranking) for ranking in rankings if ranking.epoch == EPOCHS[0]),
        *(_table_html(table) for table in tables),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{MARK}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Benchmark</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _row(cells: Sequence[str], *, is_ours: bool, best: Sequence[bool] = ()) -> str:
    marks = [*best, *[False] * (len(cells) - len(best))]
    content = "".join(
        f'<td class="best">{escape(cell)}</td>' if is_best else f"<td>{escape(cell)}</td>"
        for cell, is_best in zip(cells, marks, strict=True)
    )
    return f'<tr class="ours">{content}</tr>' if is_ours else f"<tr>{content}</tr>"


def _as_table(header: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    return f'<div class="table"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _ranking_html(ranking: Ranking) -> str:
    rows = [
        _row([label, f"{rank:.2f}"], is_ours=is_ours)
        for label, rank, is_ours in zip(
            ranking.labels, ranking.comparison.mean_ranks, ranking.is_ours, strict=True
        )
    ]
    note = ranking_to_markdown(ranking).splitlines()[2]
    return f"<h2>Ranks by {ranking.group} tasks</h2><p>{escape(note)}</p>" + _as_table(
        ["method", "mean rank"], rows
    )


def _table_html(table: DatasetTable) -> str:
    columns: list[tuple[Epoch, Group]] = [(epoch, group) for epoch in EPOCHS for group in GROUPS]
    highest = {
        column: max(
            (score.mean for line in table.lines if (score := line.scores[column]) is not None),
            default=None,
        )
        for column in columns
    }
    rows: list[str] = []
    for line in table.lines:
        best = [
            (score := line.scores[column]) is not None and score.mean == highest[column]
            for column in columns
        ]
        cells = [
            line.label,
            *(str(line.scores[column] or "-") for column in columns),
            "-" if line.cost is None else f"{line.cost:.2f}",
            ", ".join(f"{name}={value}" for name, value in line.setting.items()),
        ]
        rows.append(_row(cells, is_ours=line.is_ours, best=[False, *best]))
    header = ["method", *(f"{group}, {epoch}" for epoch, group in columns), "cost", "setting"]
    noise = to_markdown(table).splitlines()[2]
    return (
        f"<h2>{escape(table.title)}, {escape(table.dose)}</h2><p>{escape(noise)}</p>"
        + _as_table(header, rows)
    )


def draw_ranking(ranking: Ranking) -> bytes:
    """Draws a critical-difference picture: mean ranks on a line, bars over methods that cannot be told apart."""
    mean_ranks = ranking.comparison.mean_ranks.tolist()
    count = len(mean_ranks)
    bars = groups_within(mean_ranks, ranking.comparison.critical_difference)
    height = 1.2 + 0.22 * ((count + 1) // 2) + 0.14 * len(bars)
    figure = new_figure(9.5, height)
    axes = figure.add_subplot()
    axes.set_xlim(-0.35 * count, 1 + 1.35 * count)
    bottom = -1.0 - 0.6 * len(bars) - ((count + 1) // 2)
    axes.set_ylim(bottom, 1.6)
    axes.set_axis_off()
    axes.plot([1, count], [0, 0], color=TEXT_COLOUR, linewidth=1)
    for tick in range(1, count + 1):
        axes.plot([tick, tick], [0, 0.15], color=TEXT_COLOUR, linewidth=1)
        axes.text(tick, 0.3, str(tick), ha="center", fontsize=8, color=TEXT_COLOUR)
    length = ranking.comparison.critical_difference
    axes.plot([1, min(1 + length, count)], [1.0, 1.0], color=TEXT_COLOUR, linewidth=1.5)
    axes.text(1, 1.15, f"critical difference {length:.2f}", fontsize=8, color=TEXT_COLOUR)
    for level, (first, last) in enumerate(bars):
        height_of_bar = -0.5 - 0.6 * level
        axes.plot(
            [mean_ranks[first] - 0.05, mean_ranks[last] + 0.05],
            [height_of_bar, height_of_bar],
            color=TEXT_COLOUR,
            linewidth=3,
            solid_capstyle="butt",
        )
    half = (count + 1) // 2
    for position, (rank, label, is_ours) in enumerate(
        zip(mean_ranks, ranking.labels, ranking.is_ours, strict=True)
    ):
        is_left = position < half
        row = position if is_left else count - 1 - position
        depth = -0.9 - 0.6 * len(bars) - row
        edge = 0.6 if is_left else count + 0.4
        colour = OURS_COLOUR if is_ours else TEXT_COLOUR
        axes.plot([rank, rank, edge], [0, depth, depth], color=colour, linewidth=0.8)
        axes.text(
            edge - 0.1 if is_left else edge + 0.1,
            depth,
            plain(f"{label} ({rank:.2f})"),
            ha="right" if is_left else "left",
            va="center",
            fontsize=8,
            color=colour,
            fontweight="bold" if is_ours else "normal",
        )
    axes.set_title(
        f"Mean ranks by {ranking.group} tasks over {ranking.comparison.num_datasets} data sets, "
        f"Friedman p = {ranking.comparison.friedman_p:.2g}",
        fontsize=9.5,
        color=TEXT_COLOUR,
    )
    return _as_png(figure)


def _as_png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=160, metadata={"Software": "excessmtl benchmark"})
    return content.getvalue()


def read_results(output: Path) -> dict[str, Any]:
    """Returns the content of results.json of a finished benchmark."""
    return json.loads((output / RESULTS).read_text(encoding="utf-8"))
