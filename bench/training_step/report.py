"""Tables, verdicts, pictures and README of the training step's benchmark."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reporting import TableText, conditions, format_ms, format_ratio, verdict, write_folder

from training_step.measurement import Measurement
from training_step.rows import ROWS
from training_step.workloads import Section

TARGETS = {
    "lower_bound": 1.05,
    "uniform": 1.15,
    "peers": {"multimnist": 1.3, "mlp": 1.2, "resnet18": 2.2},
}
"""Exact at most that many times the lower bound, cheaper modes that many times uniform; at least that many times
faster than the fastest released package that computes the same."""

PICTURES = {
    "tasks": ("cost_against_tasks.png", "tasks"),
    "parameters": ("cost_against_parameters.png", "shared parameters"),
}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def make_table(m: Measurement) -> TableText:
    """Makes the table of one workload: times, ratios and peaks."""
    plain = m.rows["uniform"].peak_bytes if "uniform" in m.rows else None
    lines = []
    for key, result in m.rows.items():
        if result.timing is None:
            lines.append((m.labels[key], *("-",) * 7))
            continue
        peak = result.peak_bytes
        beyond = None if peak is None or plain is None else (peak - plain) / (4 * m.num_shared)
        lines.append(
            (
                m.labels[key],
                format_ms(result.timing),
                format_ratio(m.ratio(key, "uniform")),
                format_ratio(m.ratio(key, "lower_bound")),
                _number(m.best_ratio(key, "lower_bound")),
                _number(None if peak is None else peak / (1 << 20)),
                _number(None if peak is None or plain is None else peak / plain),
                _number(beyond),
            )
        )
    header = (
        "row",
        "ms per step",
        "/ plain",
        "/ lower bound",
        "fastest / fastest bound",
        "peak MiB",
        "peak / plain",
        "beyond plain, in P float32",
    )
    return TableText(f"{m.title}; P = {m.num_shared:,}", header, lines)


def missing_rows(results: Sequence[Measurement]) -> list[str]:
    """Formats a line for each row that did not run somewhere, with the reason."""
    lines: dict[str, list[str]] = {}
    for m in results:
        for key, result in m.rows.items():
            if result.reason is not None:
                lines.setdefault(f"{m.labels[key]}: {result.reason}", []).append(m.key)
    return [f"{line} ({', '.join(keys)})" for line, keys in lines.items()]


def largest_difference(results: Sequence[Measurement]) -> float | None:
    """Returns the largest difference of any row from the one it must agree with."""
    found = [r.difference for m in results for r in m.rows.values() if r.difference is not None]
    return max(found, default=None)


def verdicts(results: Sequence[Measurement]) -> list[str]:
    """Formats each goal of the five networks with what was measured."""
    lines = []
    for m in results:
        if m.section != "workloads":
            continue
        upper = [("exact", "lower_bound", TARGETS["lower_bound"])]
        upper += [
            (row.key, "uniform", TARGETS["uniform"]) for row in ROWS.values() if row.is_cheaper
        ]
        for key, other, limit in upper:
            value, best = m.ratio(key, other), m.best_ratio(key, other)
            if value is not None and best is not None:
                what = f"{m.key}: {m.labels[key]} / {m.labels[other]}"
                lines.append(verdict(what, value, best, limit))
        lines += _against_peers(m)
    return lines


def _against_peers(m: Measurement) -> list[str]:
    """Compares with the fastest released package, which has a goal, and with loops in plain PyTorch, without one."""
    lines = []
    released = {
        row.key: timing.median_s
        for row in ROWS.values()
        if row.is_released_excess and (timing := m.timing(row.key)) is not None
    }
    goal = TARGETS["peers"].get(m.key)
    if released and goal is not None:
        fastest = min(released, key=lambda key: released[key])
        value, best = m.ratio(fastest, "exact"), m.best_ratio(fastest, "exact")
        if value is not None and best is not None:
            what = f"{m.key}: fastest package ({m.labels[fastest]}) / {m.labels['exact']}"
            lines.append(verdict(what, value, best, goal, is_upper=False))
    for key in ("eager", "eager_weighted_loss"):
        value, best = m.ratio(key, "exact"), m.best_ratio(key, "exact")
        if value is not None and best is not None:
            what = f"{m.key}: {m.labels[key]} / {m.labels['exact']}"
            lines.append(verdict(what, value, best, None))
    return lines


def draw(results: Sequence[Measurement], section: Section, path: Path, title: str) -> None:
    """Writes the picture of a sweep, if it was measured: time, distance from the bound, peak memory over T or P."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    points = sorted(
        (m for m in results if m.section == section), key=lambda m: (m.num_tasks, m.num_shared)
    )
    if not points:
        return
    labels = {key: label for m in points for key, label in m.labels.items()}
    known = [key for key in ROWS if key in labels]
    order = [*known, *(key for key in labels if key not in ROWS)]
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.6), layout="constrained")
    for index, key in enumerate(order):
        style = _line_style(key, index)
        at = [m for m in points if m.timing(key) is not None]
        if not at:
            continue
        xs = [m.num_tasks if section == "tasks" else m.num_shared for m in at]
        timings = [timing for m in at if (timing := m.timing(key)) is not None]
        axes[0].plot(xs, [t.median_s * 1e3 for t in timings], label=labels[key], **style)
        ratios = [m.ratio(key, "lower_bound") for m in at]
        bound = [(x, r) for x, r in zip(xs, ratios, strict=True) if r is not None]
        axes[1].plot([x for x, _ in bound], [r.median for _, r in bound], **style)
        axes[1].fill_between(
            [x for x, _ in bound],
            [r.low for _, r in bound],
            [r.high for _, r in bound],
            color=style["color"],
            alpha=0.12,
            linewidth=0,
        )
        peaks = [
            (x, peak)
            for x, m in zip(xs, at, strict=True)
            if (peak := m.rows[key].peak_bytes) is not None
        ]
        axes[2].plot([x for x, _ in peaks], [peak / (1 << 20) for _, peak in peaks], **style)
    axes[1].axhline(TARGETS["lower_bound"], color="tab:green", linewidth=1, zorder=0)
    axes[1].annotate(
        f"goal {TARGETS['lower_bound']:g}",
        (1.0, TARGETS["lower_bound"]),
        xycoords=("axes fraction", "data"),
        xytext=(-3, 3),
        textcoords="offset points",
        ha="right",
        color="tab:green",
        fontsize=8,
    )
    for axis, (name, ylabel) in zip(
        axes,
        (
            ("Time per step", "ms"),
            ("Distance from the lower bound", "time / lower bound"),
            ("Peak memory", "MiB"),
        ),
        strict=True,
    ):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set(xlabel=PICTURES[section][1], ylabel=ylabel, title=name)
        axis.grid(alpha=0.25)
        if section == "tasks":
            counts = sorted({m.num_tasks for m in points})
            axis.set_xticks(counts, [str(count) for count in counts])
            axis.minorticks_off()
    for axis in axes:
        low, high = axis.get_ylim()
        if high < 100 * low:  # powers of ten alone would leave it bare
            _plain_ticks(axis)
    fixed = f"P = {points[0].num_shared:,}" if section == "tasks" else f"T = {points[0].num_tasks}"
    figure.suptitle(textwrap.fill(f"{fixed}. {title}", 170), fontsize=9)
    figure.legend(loc="outside lower center", ncols=min(5, len(order)), fontsize=9, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plain_ticks(axis: Any) -> None:
    """Labels a short logarithmic axis with plain numbers, few enough not to touch."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _line_style(key: str, index: int) -> dict[str, Any]:
    """Returns a row's style: bounds grey, ours solid, peers dashed; the same colour in both pictures."""
    from matplotlib import colormaps

    kind = ROWS[key].kind if key in ROWS else "ours"
    if kind == "bound":
        dashes = ":" if key == "uniform" else "-"
        return {"color": "tab:gray", "linestyle": dashes, "marker": ".", "linewidth": 1.5}
    colour = colormaps["tab10"](index % 7)  # 7 is tab10's grey
    line = "--" if kind == "peer" else "-"
    marker = "os^dvP*X"[index % 8]
    return {"color": colour, "linestyle": line, "marker": marker, "markersize": 4, "linewidth": 1.3}


def write_report(output: Path, facts: dict[str, Any], results: Sequence[Measurement]) -> None:
    """Writes pictures and README from the measurements."""
    for section, (name, _) in PICTURES.items():
        draw(results, section, output / name, conditions(facts))  # type: ignore[arg-type]
    write_folder(output, make_readme(facts, results))


def make_readme(facts: dict[str, Any], results: Sequence[Measurement]) -> list[str]:
    """Makes the lines of a results folder's README."""
    sections = {m.section for m in results}
    pictures = [
        f"![cost against {what}]({name})"
        for section, (name, what) in PICTURES.items()
        if section in sections
    ]
    equal = largest_difference(results)
    compared = (
        []
        if equal is None
        else [
            "Rows that compute the same were compared before they were timed: largest relative difference",
            f"of their gradients {equal:.1g}.",
        ]
    )
    missing = missing_rows(results)
    return [
        "# One training step",
        "",
        conditions(facts),
        "",
        f"`{facts['command']}`, {facts['wall_s']:.0f} s. Milliseconds are medians (quartiles) of interleaved samples;",
        "ratios are medians of the ratios within a round. Rows, the lower bound and how memory is measured: see",
        "the head of `bench_training_step.py`. Where the load exceeds the cores, read the fastest samples.",
        *(["Times are CPU times of the process."] if "--cpu-time" in facts["command"] else []),
        *compared,
        "" if "gpu" in facts else "No CUDA numbers: this run was on a CPU.",
        "",
        *(line for picture in pictures for line in (picture, "")),
        *(f"- {line}" for line in verdicts(results)),
        *(["", "Not measured:", "", *(f"- {line}" for line in missing)] if missing else []),
        "",
        *(make_table(m).to_markdown() for m in results),
    ]
