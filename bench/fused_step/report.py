"""Tables, verdicts, picture and README of the fused step's benchmark."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from reporting import TableText, conditions, format_ratio, format_time, verdict, write_folder
from timing import best_ratio

from fused_step.measurement import Measurement, linear_fits
from fused_step.plans import GPU_CACHE_BYTES

TARGETS = {"floor": 1.12, "floor_in_cache": 1.3, "eager": 20.0, "compiled": 6.0}
"""At most that many times the floor; at least that many times faster than the others, on a CPU."""


def _compared(section: str, title: str, results: Sequence[Measurement]) -> TableText | None:
    """Compares the fused step with everybody: time, ratio to the floor, and how many times slower each other one is."""
    part = [m for m in results if m.section == section]
    if not part:
        return None
    others = [n for n in ("eager", "compiled", "foreach", "reference") if n in part[0].timings]
    rows = []
    for m in part:
        fused = m.timings["fused"]
        rows.append(
            (
                f"{m.workload.numel:.3g}",
                m.workload.describe(),
                *([m.cpu_capability] if section == "capabilities" else []),
                format_time(fused),
                f"{m.workload.bytes_moved / fused.median_s * 1e-9:.3g}",
                f"{fused.median_s / m.workload.numel * 1e9:.3g}",
                format_ratio(m.ratio("fused", "floor")),
                f"{best_ratio(fused, m.timings['floor']):.3g}",
                *(format_ratio(m.ratio(name, "fused")) for name in others),
            )
        )
    header = (
        "T*P",
        "workload",
        *(["path"] if section == "capabilities" else []),
        "fused",
        "GB/s",
        "ns/element",
        "fused / floor",
        "fastest samples",
        *(f"{name} / fused" for name in others),
    )
    return TableText(title, header, rows)


def _overhead(results: Sequence[Measurement]) -> TableText | None:
    part = [m for m in results if m.section == "overhead"]
    if not part:
        return None
    names = list(part[0].timings)
    rows = [
        (m.workload.describe(), *(format_time(m.timings[name]) for name in names)) for m in part
    ]
    return TableText("Small steps: what a call costs", ("workload", *names), rows)


def cache_bytes(facts: dict[str, Any]) -> float:
    """Returns the last-level cache of the device that was measured."""
    return GPU_CACHE_BYTES if "gpu" in facts else facts["last_level_cache_mib"] * (1 << 20)


def make_tables(results: Sequence[Measurement], facts: dict[str, Any]) -> list[TableText]:
    """Makes all tables of a run, given its environment."""
    titles = {
        "headline": "Far beyond the caches",
        "in_cache": "In cache, and flushed before each call",
        "capabilities": "Narrower instruction sets (EXCESSMTL_CPU_CAPABILITY)",
        "dtypes": "Gradient types and momentum",
        "shapes": "Few and many tasks, big and small tensors",
        "linear": "Time against size",
    }
    tables = [_compared(section, title, results) for section, title in titles.items()]
    tables.append(_overhead(results))
    fits = linear_fits(results, cache_bytes(facts))
    if fits:
        rows = [
            (
                name,
                f"{fit.overhead_s * 1e6:.3g} us",
                f"{fit.s_per_element * 1e9:.3g} ns",
                f"{fit.worst_deviation:.0%}",
            )
            for name, fit in fits.items()
        ]
        header = ("regime", "overhead", "per element", "largest deviation")
        tables.append(
            TableText(
                "Line through the fastest samples: time = overhead + slope * T*P", header, rows
            )
        )
    return [table for table in tables if table is not None]


def draw(results: Sequence[Measurement], path: Path, title: str) -> None:
    """Writes the picture: time per element over size, ratio to the floor over size, and the others' times."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    linear = [m for m in results if m.section == "linear"]
    for name, colour in (("fused", "tab:blue"), ("floor", "tab:gray")):
        sizes = [m.workload.numel for m in linear]
        per_element = [m.timings[name].median_s / m.workload.numel * 1e9 for m in linear]
        left.loglog(sizes, per_element, "o-", color=colour, label=name)
    for name, marker in (("eager", "s"), ("compiled", "^"), ("foreach", "v"), ("reference", "d")):
        part = [m for m in results if m.section in ("headline", "in_cache") and name in m.timings]
        part = [m for m in part if m.workload.cache != "cold"]
        if part:
            left.loglog(
                [m.workload.numel for m in part],
                [m.timings[name].median_s / m.workload.numel * 1e9 for m in part],
                marker,
                label=name,
            )
    left.set(xlabel="T * P", ylabel="ns per element", title="Time per element")
    left.legend()

    ratios = [m.ratio("fused", "floor") for m in linear]
    points = [(m.workload.numel, r) for m, r in zip(linear, ratios, strict=True) if r is not None]
    if points:
        middle.semilogx([n for n, _ in points], [r.median for _, r in points], "o-")
        middle.fill_between(
            [n for n, _ in points],
            [r.low for _, r in points],
            [r.high for _, r in points],
            alpha=0.2,
        )
    middle.axhline(1.0, color="tab:gray", linewidth=1)
    middle.axhline(TARGETS["floor"], color="tab:green", linestyle="--", label="goal in memory")
    middle.axhline(
        TARGETS["floor_in_cache"], color="tab:orange", linestyle="--", label="goal in cache"
    )
    middle.set(xlabel="T * P", ylabel="fused / same-bytes pass", title="Distance from the floor")
    middle.set_ylim(0, 4)
    middle.legend()

    headline = next((m for m in results if m.section == "headline"), None)
    if headline is not None:
        names = list(headline.timings)
        bars = right.barh(names, [headline.timings[name].median_s * 1e3 for name in names])
        right.bar_label(bars, fmt="%.3g", padding=3)
        right.set_xscale("log")
        right.margins(x=0.15)  # space for the labels
        right.xaxis.set_minor_formatter(NullFormatter())  # over one decade they overlap
        right.invert_yaxis()
        right.set(xlabel="ms", title=f"One step, {headline.workload.describe()}")
    figure.suptitle(textwrap.fill(title, 150), fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def verdicts(results: Sequence[Measurement], device_type: str) -> list[str]:
    """Formats each goal with what was measured.

    The other contestants have a goal on the CPU only. A GPU runs the eager loop near its memory's
    speed too, so the ratio is that of the bytes: about 72 per element against 12.
    """
    lines = []
    for m in results:
        in_memory = m.section == "headline"
        if not in_memory and not (m.section == "in_cache" and m.workload.numel >= 10**6):
            continue
        if m.workload.cache == "cold":
            continue
        goal = TARGETS["floor" if in_memory else "floor_in_cache"]
        checks = [("fused / floor", m.ratio("fused", "floor"), goal, True)]
        if in_memory:
            checks += [
                (
                    f"{name} / fused",
                    m.ratio(name, "fused"),
                    TARGETS[name] if device_type == "cpu" else None,
                    False,
                )
                for name in ("eager", "compiled")
            ]
        for what, value, limit, is_upper in checks:
            if value is None:
                continue
            numerator, denominator = what.split(" / ")
            best = best_ratio(m.timings[numerator], m.timings[denominator])
            at = f"{what} at T*P = {m.workload.numel:.3g}"
            lines.append(verdict(at, value, best, limit, is_upper=is_upper))
    return lines


def write_results(
    output: Path, config: dict[str, Any], facts: dict[str, Any], results: Sequence[Measurement]
) -> None:
    """Writes picture, README and the three JSON files of a results folder."""
    output.mkdir(parents=True, exist_ok=True)
    draw(results, output / "fused_step.png", conditions(facts))
    lines = linear_fits(results, cache_bytes(facts))
    fits = {name: dataclasses.asdict(fit) for name, fit in lines.items()}
    measurements = {"measurements": [m.to_json() for m in results], "linear_fits": fits}
    readme = make_readme(facts, results)
    write_folder(output, readme, config=config, environment=facts, measurements=measurements)


def make_readme(facts: dict[str, Any], results: Sequence[Measurement]) -> list[str]:
    """Makes the lines of a results folder's README."""
    missing_gpu = (
        "" if "gpu" in facts else "No CUDA numbers: this machine has no GPU that torch can use.\n"
    )
    return [
        "# One fused step",
        "",
        f"{conditions(facts)}",
        "",
        f"`{facts['command']}`, {facts['wall_s']:.0f} s. Medians (quartiles) of interleaved samples;",
        "ratios are medians of the ratios within a round. The floor moves the same bytes: see the head",
        "of `bench_fused_step.py`. Where the load exceeds the cores, read the column of the fastest samples.",
        missing_gpu,
        "![time per element, distance from the floor, others](fused_step.png)",
        "",
        *(f"- {line}" for line in verdicts(results, torch.device(facts["device"]).type)),
        "",
        *(table.to_markdown() for table in make_tables(results, facts)),
    ]
