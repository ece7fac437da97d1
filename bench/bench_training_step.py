"""Time and peak memory of a whole training step: each balancer, each mode, the lower bound, and the peers.

    python bench/bench_training_step.py                                   # all workloads, on this machine's CPU
    python bench/bench_training_step.py --device cuda
    python bench/bench_training_step.py --workloads mlp tasks --rows uniform lower_bound exact --rounds 11

What all rows share. A step empties ``.grad``, runs encoder and heads on the next of four batches,
lets the row fill ``.grad``, and takes a step of Adam. Rows differ in how they fill ``.grad`` and in
nothing else: same initial parameters, same batches, same Adam. Before anything is timed, rows that
compute the same thing (exact ExcessMTL in all its modes, torchjd's and LibMTL's, the loop in plain
PyTorch) are compared, gradient by gradient, over three steps; a difference ends the run.

Rows. ``uniform``: one backward pass of the summed loss. ``lower_bound``: a backward pass per task
and nothing else: the encoder's gradients are dropped before the next pass, and Adam gets those of
the last task. The others are described where they are made, in ``training_step_rows.py``; a new
mode is one more entry of ``ROWS`` there.

Time. Rows run in turn, round after round, in one process; a sample is the mean over some steps. A
ratio is the median over rounds of the ratio within a round, so the machine's moods meet both sides.

Peak memory. The most bytes that torch's allocator held for a row at one time: parameters, Adam's
state, the method's state, activations and gradients, from the row's first allocation to the end of
its third step; the batches are everybody's and not counted. On CUDA it is
``torch.cuda.max_memory_allocated``, on the CPU the running sum of the allocator's events in torch's
profiler, which is the same quantity. The resident set of a fresh process would add the interpreter and its
libraries (hundreds of MiB) and what malloc keeps, and could not tell the rows of a small network
apart. Not seen: memory that does not come from torch's allocator, such as oneDNN's scratch buffers.

``--output`` (default: ``bench/results/training_step_<hardware>_<yyyymm>``) receives config.json,
environment.json, measurements.json, cost_against_tasks.png, cost_against_parameters.png and a
README.md. A workload is written when it is finished; the same command goes on after the last one,
unless commit, versions or options have changed. ``--redraw`` makes README and pictures anew.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_fused_step import TableText, conditions, open_device
from rich.console import Console
from rich.progress import Progress
from timing import Ratio, Timing, best_ratio, cpu_name, environment, load_average, measure_steps
from timing import ratio as ratio_of
from training_step_rows import (
    ADAM,
    EPS,
    NUM_BATCHES,
    PARAM_COUNTS,
    ROBUST_STEP_SIZE,
    ROWS,
    TASK_COUNTS,
    Problem,
    Row,
    Section,
    Step,
    Template,
    Workload,
    difference,
    filled_grads,
    make_step,
    named_workloads,
    param_sweep,
    task_sweep,
)

from excessmtl_ext.memory import measured_peak

PEAK_STEPS = 3

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


# ---- memory -------------------------------------------------------------------------------------


def peak_bytes(row: Row, template: Template) -> int:
    """Most bytes torch's allocator held at a time for this row's model, method and first steps; see the file's head."""

    def run() -> None:
        step = make_step(row, Problem(template))
        for _ in range(PEAK_STEPS):
            step()

    gc.collect()
    return measured_peak(run, template.device)


# ---- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowResult:
    """What one row gave: a timing and a peak, or the reason why there are none.

    Attributes:
        timing: Seconds per step.
        peak_bytes: See :func:`peak_bytes`.
        difference: From the row it must agree with.
        reason: Why it did not run.
    """

    timing: Timing | None = None
    peak_bytes: int | None = None
    difference: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Measurement:
    """What one workload gave.

    Attributes:
        key: Of the workload.
        title: Of the workload.
        section: Of the workload.
        num_tasks: T.
        num_shared: P.
        num_params: P and the heads.
        rows: By key, in the order of ``ROWS``.
        labels: Of the rows, by key.
        load_averages: Before and after.
    """

    key: str
    title: str
    section: Section
    num_tasks: int
    num_shared: int
    num_params: int
    rows: dict[str, RowResult]
    labels: dict[str, str]
    load_averages: dict[str, list[float]] = field(default_factory=dict)

    def timing(self, key: str) -> Timing | None:
        return self.rows[key].timing if key in self.rows else None

    def ratio(self, key: str, other: str) -> Ratio | None:
        mine, theirs = self.timing(key), self.timing(other)
        return None if mine is None or theirs is None else ratio_of(mine, theirs)

    def best_ratio(self, key: str, other: str) -> float | None:
        mine, theirs = self.timing(key), self.timing(other)
        return None if mine is None or theirs is None else best_ratio(mine, theirs)

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "title": self.title,
            "section": self.section,
            "num_tasks": self.num_tasks,
            "num_shared": self.num_shared,
            "num_params": self.num_params,
            "load_averages": self.load_averages,
            "rows": {key: self._row_to_json(key, result) for key, result in self.rows.items()},
        }

    def _row_to_json(self, key: str, result: RowResult) -> dict[str, Any]:
        facts: dict[str, Any] = {"label": self.labels[key]}
        if result.reason is not None:
            facts["reason"] = result.reason
        if result.difference is not None:
            facts["difference"] = result.difference
        if result.peak_bytes is not None:
            facts["peak_bytes"] = result.peak_bytes
        if result.timing is not None:
            facts["median_ms"] = result.timing.median_s * 1e3
            facts["min_ms"] = result.timing.min_s * 1e3
            facts["quartiles_ms"] = [value * 1e3 for value in result.timing.quartiles_s()]
            for other in ("uniform", "lower_bound"):
                found = self.ratio(key, other)
                if found is not None:
                    facts[f"ratio_to_{other}"] = found.median
                    facts[f"ratio_to_{other}_quartiles"] = [found.low, found.high]
            facts["rounds"] = len(result.timing.samples)
            facts["samples_ms"] = [value * 1e3 for value in result.timing.samples]
        return facts

    @staticmethod
    def from_json(facts: dict[str, Any]) -> Measurement:
        """Rebuilds what :meth:`to_json` gave."""
        rows = {
            key: RowResult(
                Timing(tuple(value * 1e-3 for value in row["samples_ms"]))
                if "samples_ms" in row
                else None,
                row.get("peak_bytes"),
                row.get("difference"),
                row.get("reason"),
            )
            for key, row in facts["rows"].items()
        }
        labels = {key: row["label"] for key, row in facts["rows"].items()}
        plain = {
            name: facts[name]
            for name in (
                *("key", "title", "section", "num_tasks", "num_shared", "num_params"),
                "load_averages",
            )
        }
        return Measurement(rows=rows, labels=labels, **plain)


@dataclass(frozen=True)
class Effort:
    """How long a workload is measured."""

    rounds: int
    budget_s: float


def run_workload(
    workload: Workload, rows: Sequence[Row], device: torch.device, effort: Effort, console: Console
) -> Measurement:
    """Checks, weighs and times the rows of one workload.

    A peer that fails has its reason recorded and is left out; a row of this package that fails ends
    the run, and so does any row that computes something else than it should.
    """
    load_before = load_average()
    template = Template(workload, device)
    results: dict[str, RowResult] = {}
    steps: dict[str, Step] = {}
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(workload.key, total=len(rows) + effort.rounds)
        for row in rows:
            progress.update(bar, description=f"{workload.key}: checking {row.label}")
            results[row.key] = _prepare(row, template)
            progress.advance(bar)
        # Models and optimizer states of all rows live from here on; peaks are known, so nobody is charged for them.
        for row in rows:
            if results[row.key].reason is None:
                steps[row.key] = make_step(row, Problem(template))
        progress.update(bar, description=f"{workload.key}: timing")
        timings = measure_steps(
            steps,
            device,
            periods={row.key: row.period for row in rows},
            rounds=effort.rounds,
            budget_s=effort.budget_s,
            on_round=lambda rounds: progress.update(bar, completed=len(rows) + rounds),
        )
    del steps
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Measurement(
        workload.key,
        workload.title,
        workload.section,
        workload.num_tasks,
        template.num_shared,
        sum(parameter.numel() for parameter in template.model.parameters()),
        {
            key: RowResult(timings.get(key), result.peak_bytes, result.difference, result.reason)
            for key, result in results.items()
        },
        {row.key: row.label for row in rows},
        {"before": load_before, "after": load_average()},
    )


def _prepare(row: Row, template: Template) -> RowResult:
    """Compares a row with what it must agree with, and measures its peak; a result without a timing."""
    reason = row.missing()
    if reason is not None:
        return RowResult(reason=reason)
    if row.kind == "peer":
        try:
            step = make_step(row, Problem(template))
            step()
        except Exception as error:  # whatever another package raises on this network
            first_line = (str(error).splitlines() or [""])[0]
            return RowResult(reason=f"{type(error).__name__}: {first_line}"[:200])
    found = None
    if row.agrees_with is not None:
        found = difference(row, ROWS[row.agrees_with], template)
    else:
        for _ in filled_grads(row, template):
            pass
    return RowResult(peak_bytes=peak_bytes(row, template), difference=found)


# ---- what is shown ------------------------------------------------------------------------------


def _time(timing: Timing) -> str:
    low, high = timing.quartiles_s()
    return f"{timing.median_s * 1e3:.3g} ({low * 1e3:.3g}-{high * 1e3:.3g})"


def _ratio(value: Ratio | None) -> str:
    return "-" if value is None else f"{value.median:.3g} ({value.low:.3g}-{value.high:.3g})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def make_table(m: Measurement) -> TableText:
    """Times, ratios and peaks of one workload."""
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
                _time(result.timing),
                _ratio(m.ratio(key, "uniform")),
                _ratio(m.ratio(key, "lower_bound")),
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
    """A line for each row that did not run somewhere, with the reason."""
    lines: dict[str, list[str]] = {}
    for m in results:
        for key, result in m.rows.items():
            if result.reason is not None:
                lines.setdefault(f"{m.labels[key]}: {result.reason}", []).append(m.key)
    return [f"{line} ({', '.join(keys)})" for line, keys in lines.items()]


def largest_difference(results: Sequence[Measurement]) -> float | None:
    """Of all rows from those they must agree with."""
    found = [r.difference for m in results for r in m.rows.values() if r.difference is not None]
    return max(found, default=None)


def _verdict(what: str, value: Ratio, best: float, limit: float, *, is_upper: bool) -> str:
    are_met = {(v <= limit if is_upper else v >= limit) for v in (value.median, best)}
    verdict = "undecided" if len(are_met) == 2 else "met" if True in are_met else "missed"
    side = "at most" if is_upper else "at least"
    return f"{what}: {_ratio(value)}, fastest samples {best:.3g}, goal {side} {limit:g}: {verdict}"


def verdicts(results: Sequence[Measurement]) -> list[str]:
    """Each goal with what was measured; undecided where medians and fastest samples disagree."""
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
                lines.append(_verdict(what, value, best, limit, is_upper=True))
        lines += _against_peers(m)
    return lines


def _against_peers(m: Measurement) -> list[str]:
    """Against the fastest released package, with its goal, and against the loops in plain PyTorch, which have none."""
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
            lines.append(_verdict(what, value, best, goal, is_upper=False))
    for key in ("eager", "eager_weighted_loss"):
        value, best = m.ratio(key, "exact"), m.best_ratio(key, "exact")
        if value is not None and best is not None:
            what = f"{m.key}: {m.labels[key]} / {m.labels['exact']}"
            lines.append(f"{what}: {_ratio(value)}, fastest samples {best:.3g}, no goal")
    return lines


def draw(results: Sequence[Measurement], section: Section, path: Path, title: str) -> bool:
    """Writes the picture of a sweep: time, distance from the lower bound, and peak memory over T or over P.

    Returns:
        Whether there was something to draw.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    points = sorted(
        (m for m in results if m.section == section), key=lambda m: (m.num_tasks, m.num_shared)
    )
    if not points:
        return False
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
    return True


def _plain_ticks(axis: Any) -> None:
    """Ticks of a short logarithmic axis as plain numbers, few enough not to touch."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _line_style(key: str, index: int) -> dict[str, Any]:
    """Bounds grey, ours solid, peers dashed; a colour for each row, the same in both pictures."""
    from matplotlib import colormaps

    kind = ROWS[key].kind if key in ROWS else "ours"
    if kind == "bound":
        dashes = ":" if key == "uniform" else "-"
        return {"color": "tab:gray", "linestyle": dashes, "marker": ".", "linewidth": 1.5}
    colour = colormaps["tab10"](index % 7)  # 7 is tab10's grey
    line = "--" if kind == "peer" else "-"
    marker = "os^dvP*X"[index % 8]
    return {"color": colour, "linestyle": line, "marker": marker, "markersize": 4, "linewidth": 1.3}


def write_json(path: Path, content: Any) -> None:
    """Writes a file at once or not at all, lists of numbers on one line."""
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[\s+((?:-?[\d.e+-]+,?\s+)+)\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    part = path.with_suffix(".part")
    part.write_text(text + "\n")
    part.replace(path)


def write_report(output: Path, facts: dict[str, Any], results: Sequence[Measurement]) -> None:
    """Writes pictures and README from the measurements."""
    pictures = []
    for section, (name, what) in PICTURES.items():
        if draw(results, section, output / name, conditions(facts)):  # type: ignore[arg-type]
            pictures.append(f"![cost against {what}]({name})")
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
    readme = [
        "# One training step",
        "",
        conditions(facts),
        "",
        f"`{facts['command']}`, {facts['wall_s']:.0f} s. Milliseconds are medians (quartiles) of interleaved samples;",
        "ratios are medians of the ratios within a round. Rows, the lower bound and how memory is measured: see",
        "the head of `bench_training_step.py`. Where the load exceeds the cores, read the fastest samples.",
        *compared,
        "" if "gpu" in facts else "No CUDA numbers: this run was on a CPU.",
        "",
        *(line for picture in pictures for line in (picture, "")),
        *(f"- {line}" for line in verdicts(results)),
        *(["", "Not measured:", "", *(f"- {line}" for line in missing)] if missing else []),
        "",
        *(make_table(m).to_markdown() for m in results),
    ]
    (output / "README.md").write_text("\n".join(readme).rstrip() + "\n")


# ---- the command --------------------------------------------------------------------------------


def default_output(device: torch.device) -> Path:
    """A folder named after hardware and month."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    hardware = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    cores = "" if device.type == "cuda" else f"_{os.cpu_count()}_cores"
    threads = torch.get_num_threads()
    limited = "" if cores == "" or threads == os.cpu_count() else f"_{threads}_thread"
    folder = f"training_step_{hardware}{cores}{limited}_{time.strftime('%Y%m')}"
    return Path(__file__).parent / "results" / folder


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [*named_workloads(quick=True), "tasks", "parameters"]
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's choice)")
    parser.add_argument("--workloads", nargs="+", choices=names, default=names)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="default: all")
    parser.add_argument("--rounds", type=int, default=21, help="samples per row (default: 21)")
    parser.add_argument(
        "--budget-s",
        type=float,
        default=120.0,
        help="no round begins after this many seconds of a workload, but five there are (default: 120)",
    )
    parser.add_argument("--task-counts", nargs="+", type=int, default=list(TASK_COUNTS))
    parser.add_argument("--param-counts", nargs="+", type=int, default=list(PARAM_COUNTS))
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does the bench work?")
    parser.add_argument("--fresh", action="store_true", help="measure finished workloads again")
    parser.add_argument(
        "--redraw", action="store_true", help="README and pictures from what is measured already"
    )
    return parser.parse_args(argv)


def plan(arguments: argparse.Namespace) -> list[tuple[Workload, list[Row]]]:
    """Workloads and their rows, in the order of the run."""
    rows = [
        row
        for row in ROWS.values()
        if (arguments.rows is None or row.key in arguments.rows)
        and not (row.is_captured and torch.device(arguments.device).type != "cuda")
    ]
    in_sweeps = [row for row in rows if row.in_sweeps]
    named = named_workloads(quick=arguments.quick)
    planned = [(named[key], rows) for key in arguments.workloads if key in named]
    if "tasks" in arguments.workloads:
        sweep = task_sweep(arguments.task_counts, quick=arguments.quick)
        planned += [(workload, in_sweeps) for workload in sweep]
    if "parameters" in arguments.workloads:
        sweep = param_sweep(arguments.param_counts, quick=arguments.quick)
        planned += [(workload, in_sweeps) for workload in sweep]
    return planned


def circumstances(arguments: argparse.Namespace, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for a measurement to stand beside those of this run."""
    kept = ("device", "cpu", "gpu", "num_threads", "torch", "python", "commit", "is_dirty", "ops")
    return {
        **{name: facts[name] for name in kept if name in facts},
        "rows": list(ROWS) if arguments.rows is None else sorted(arguments.rows),
        "rounds": arguments.rounds,
        "budget_s": arguments.budget_s,
        "quick": arguments.quick,
    }


def read_measurements(output: Path) -> tuple[dict[str, Any], dict[str, Measurement]]:
    """Circumstances and finished workloads of a results folder; nothing where there is none."""
    path = output / "measurements.json"
    if not path.exists():
        return {}, {}
    content = json.loads(path.read_text())
    found = [Measurement.from_json(facts) for facts in content["measurements"]]
    return content["circumstances"], {m.key: m for m in found}


def write_measurements(
    output: Path, circumstances: dict[str, Any], done: Mapping[str, Measurement]
) -> None:
    content = {
        "circumstances": circumstances,
        "measurements": [m.to_json() for m in done.values()],
    }
    write_json(output / "measurements.json", content)


def redraw(output: Path) -> None:
    """Writes README and pictures of a results folder anew."""
    _, done = read_measurements(output)
    if not done:
        sys.exit(f"Expected measurements.json in `--output` {output}, but there is none.")
    facts = json.loads((output / "environment.json").read_text())
    write_report(output, facts, list(done.values()))


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # Where nobody looks, tables need not be squeezed into a terminal's width.
    console = Console(width=None if sys.stdout.isatty() else 150)
    if arguments.redraw and arguments.output is not None:
        redraw(arguments.output)
        return
    device = open_device(arguments.device)
    output = arguments.output or default_output(device)
    if arguments.redraw:
        redraw(output)
        return

    begin = time.perf_counter()
    loads = {"before": load_average()}
    facts = environment(device)
    ours = circumstances(arguments, facts)
    theirs, done = read_measurements(output)
    if arguments.fresh or theirs != json.loads(json.dumps(ours)):
        if done and not arguments.fresh:
            changed = sorted(
                name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)
            )
            console.print(f"Starting anew: {', '.join(changed)} changed since {output.name}.")
        done = {}
    output.mkdir(parents=True, exist_ok=True)
    planned = plan(arguments)
    effort = Effort(arguments.rounds, arguments.budget_s)
    for workload, rows in planned:
        if workload.key in done:
            console.print(f"{workload.key}: measured already", highlight=False)
            continue
        begin_workload = time.perf_counter()
        m = run_workload(workload, rows, device, effort, console)
        done[workload.key] = m
        write_measurements(output, ours, done)
        taken = time.perf_counter() - begin_workload
        distance = _ratio(m.ratio("exact", "lower_bound"))
        console.print(
            f"{workload.title}: ExcessMTL / lower bound {distance} [{taken:.0f} s]",
            highlight=False,
            markup=False,
        )

    facts["load_averages"] = {**loads, "after": load_average()}
    facts["wall_s"] = round(time.perf_counter() - begin, 1)
    config = {name: value for name, value in vars(arguments).items() if name != "redraw"}
    config |= {"output": output.name, "rows": arguments.rows or list(ROWS)}
    config |= {"adam": ADAM, "robust_step_size": ROBUST_STEP_SIZE, "eps": EPS, "targets": TARGETS}
    config |= {"num_batches": NUM_BATCHES, "peak_steps": PEAK_STEPS}
    write_json(output / "config.json", config)
    write_json(output / "environment.json", facts)
    results = list(done.values())
    write_report(output, facts, results)

    for m in results:
        console.print(make_table(m).to_rich())
    for line in [conditions(facts), *verdicts(results), *missing_rows(results)]:
        console.print(line, highlight=False, markup=False)
    console.print(f"Written to {output}")


if __name__ == "__main__":
    main()
