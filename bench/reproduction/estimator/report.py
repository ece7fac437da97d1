"""Judges the study's settings by the goal for the recommended preset, and draws its pictures.

    python bench/reproduction/estimator/report.py RESULTS
    python bench/reproduction/estimator/report.py RESULTS --table    # the tables of RESULTS/README.md

Reads what screen.py and bias.py left in RESULTS; writes ranking.csv, ranking_full.csv and the pictures beside it.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

# The clean tasks' uniform share, and whether the metric is an error (normalised) or an accuracy.
UNIFORM_SHARE = {"multimnist-14px": 0.5, "multimnist": 0.5, "digits": 0.5, "sarcos": 5 / 7}
IS_ERROR = {"multimnist-14px": False, "multimnist": False, "digits": False, "sarcos": True}
TITLES = {
    "multimnist-14px": "MultiMNIST at 14 px",
    "multimnist": "MultiMNIST",
    "digits": "Digit pairs",
    "sarcos": "SARCOS",
}

# The goal, in accuracy points (accuracies) or as a share of the error (errors).
DROP = {False: 0.005, True: 0.03}  # clean tasks at noise 0.8 against noise 0
GAIN = {False: 0.0, True: 0.10}  # clean tasks at noise 0.8 against Uniform
COST = {False: 0.003, True: 0.02}  # clean tasks at noise 0 against Uniform
LEAST_SHARE = 0.5  # of a task's uniform share, at noise 0

COLOURS = {0.0: "#D55E00", 0.9: "#E69F00", 0.98: "#0072B2", 0.99: "#56B4E9"}
CANDIDATE_COLOURS = {
    "momentum": "#000000",
    "debiased": "#009E73",
    "consecutive": "#CC79A7",
    "square": "#D55E00",
}
# By whether S forgets and whether the step size decays.
CANDIDATE_MARKERS = {
    (False, False): "x",
    (False, True): "+",
    (True, False): "1",
    (True, True): "*",
}
GOALS = ("drop", "gain", "clean_weight", "cost", "no_collapse")


@dataclass(frozen=True)
class Setting:
    """What varies between the cells of one data set and batch size."""

    method: str
    options: str
    warmup_epochs: int
    step_size: float | None


# Of the runs at full size: what they are called, and their colours.
FULL_STYLES = {
    "uniform": ("Uniform", "#7F7F7F"),
    "relative, 3": ('"recommended": relative, step size 3', "#0072B2"),
    "raw, 3": ("not relative, 3", "#009E73"),
    "raw, 10": ("not relative, 10", "#CC79A7"),
    "excessmtl-official": ('"official"', "#D55E00"),
    "paper": ('"paper"', "#E69F00"),
}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--table", action="store_true", help="print the tables, write nothing")
    arguments = parser.parse_args()
    results: Path = arguments.results
    rows = [
        row
        for stage in ("screen", "candidates")
        for table in sorted(results.glob(f"{stage}_*.csv"))
        for row in _read(table)
    ]
    full = [row for table in sorted(results.glob("full_*.csv")) for row in _read(table)]
    screened = judge(rows)
    if arguments.table:
        print("\n\n".join([screen_table(screened), *full_tables(full)]))
        return
    for name, verdicts in (("ranking.csv", screened), ("ranking_full.csv", judge(full))):
        if not verdicts:
            continue
        with (results / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(verdicts[0]), lineterminator="\n")
            writer.writeheader()
            for verdict in verdicts:
                writer.writerow(
                    {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in verdict.items()}
                )
    for dataset in sorted({row["dataset"] for row in rows}):
        own = [row for row in rows if row["dataset"] == dataset and row["stage"] == "screen"]
        for batch_size in sorted({int(row["batch_size"]) for row in own}):
            draw_screen(
                [row for row in own if int(row["batch_size"]) == batch_size],
                dataset,
                results / f"screen_{dataset}_batch{batch_size}.png",
            )
        draw_tradeoff(
            [v for v in screened if v["dataset"] == dataset],
            dataset,
            results / f"tradeoff_{dataset}.png",
        )
    for dataset in sorted({row["dataset"] for row in full}):
        draw_full(
            [row for row in full if row["dataset"] == dataset],
            dataset,
            results / f"full_{dataset}.png",
        )
    tables = sorted(results.glob("bias_*.csv"))
    if tables:
        draw_bias([_read(table) for table in tables], results / "bias.png")
    for path in sorted(results.glob("*.png")):
        print(path)


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a verdict per data set, batch size and setting: its numbers and which parts of the goal they meet.

    Means over seeds. Uniform's of the same data set and batch size is what a setting is measured against.
    """
    batches: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        batches[row["dataset"], int(row["batch_size"])].append(row)
    verdicts = []
    for (dataset, batch_size), of_batch in batches.items():
        settings = _by_setting(of_batch)
        uniform = next((by for s, by in settings.items() if s.method == "uniform"), {})
        for setting, by_noise in settings.items():
            if not all(by_noise.get(noise) and uniform.get(noise) for noise in (0.0, 0.8)):
                continue
            # The same seeds on both sides.
            seeds = {row["seed"] for row in by_noise[0.8]} & {row["seed"] for row in by_noise[0.0]}

            def mean(
                group: dict[float, list[dict[str, Any]]],
                noise: float,
                name: str,
                seeds: set[str] = seeds,
            ) -> float:
                return float(np.mean([float(r[name]) for r in group[noise] if r["seed"] in seeds]))

            verdicts.append(
                _verdict(dataset, batch_size, setting, by_noise, uniform, mean, len(seeds))
            )
    return sorted(
        verdicts, key=lambda v: (v["dataset"], v["batch_size"], -v["num_met"], -v["gain"])
    )


def _setting(row: dict[str, Any]) -> Setting:
    step = None if row["step_size"] == "" else float(row["step_size"])
    return Setting(row["method"], row["options"], int(row["warmup_epochs"]), step)


def _by_setting(
    rows: list[dict[str, Any]],
) -> dict[Setting, dict[float, list[dict[str, Any]]]]:
    """The rows of each setting by noise."""
    groups: dict[Setting, dict[float, list[dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        groups[_setting(row)][float(row["noise"])].append(row)
    return groups


def _verdict(
    dataset: str,
    batch_size: int,
    setting: Setting,
    by_noise: Any,
    uniform: Any,
    mean: Any,
    num_seeds: int,
) -> dict[str, Any]:
    is_error = IS_ERROR[dataset]

    def better(new: float, old: float) -> float:
        """How much better: in accuracy, or as a share of the old error."""
        return (old - new) / old if is_error else new - old

    clean_80, clean_0 = mean(by_noise, 0.8, "clean"), mean(by_noise, 0.0, "clean")
    numbers = {
        "clean_at_80": clean_80,
        "clean_at_0": clean_0,
        "noisy_at_80": mean(by_noise, 0.8, "noisy"),
        "drop": -better(clean_80, clean_0),
        "gain": better(clean_80, mean(uniform, 0.8, "clean")),
        "noisy_gain": better(mean(by_noise, 0.8, "noisy"), mean(uniform, 0.8, "noisy")),
        "cost": -better(clean_0, mean(uniform, 0.0, "clean")),
        "least_clean_weight": mean(by_noise, 0.8, "least_clean_weight"),
        "last_clean_weight": mean(by_noise, 0.8, "last_clean_weight"),
        "least_relative_weight_at_0": mean(by_noise, 0.0, "least_relative_weight"),
        "last_effective_num_tasks_at_0": mean(by_noise, 0.0, "last_effective_num_tasks"),
    }
    met = {
        "drop": numbers["drop"] <= DROP[is_error],
        "gain": numbers["gain"] >= GAIN[is_error],
        "clean_weight": numbers["least_clean_weight"] > UNIFORM_SHARE[dataset] + 1e-9,
        "cost": numbers["cost"] <= COST[is_error],
        "no_collapse": numbers["least_relative_weight_at_0"] >= LEAST_SHARE,
    }
    return {
        "dataset": dataset,
        "batch_size": batch_size,
        "method": setting.method,
        "options": setting.options,
        "warmup_epochs": setting.warmup_epochs,
        "step_size": setting.step_size,
        "seeds": num_seeds,
        "num_met": sum(met.values()),
        "missed": " ".join(goal for goal in GOALS if not met[goal]),
        **numbers,
    }


def screen_table(verdicts: list[dict[str, Any]]) -> str:
    """How many settings of the wide screen meet the whole goal, by data set, batch size and kind of estimate."""
    kinds = {
        "momentum 0": lambda options: options["gradient_momentum"] == 0,
        "momentum, root": lambda options: (
            options["gradient_momentum"] > 0 and options["fisher"] == "sqrt"
        ),
        "momentum, linear": lambda options: (
            options["gradient_momentum"] > 0 and options["fisher"] == "linear"
        ),
    }
    lines = [
        f"| data set | batch | {' | '.join(kinds)} | recommended | its missed parts |",
        "|---" * (len(kinds) + 4) + "|",
    ]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for verdict in verdicts:
        if verdict["method"] == "excessmtl":
            groups[verdict["dataset"], verdict["batch_size"]].append(verdict)
    for (dataset, batch_size), group in sorted(groups.items()):
        cells = []
        for belongs in kinds.values():
            of_kind = [v for v in group if belongs(json.loads(v["options"]))]
            met = sum(v["num_met"] == len(GOALS) for v in of_kind)
            cells.append(f"{met} of {len(of_kind)}")
        ours = next((v for v in group if _is_recommended(v)), None)
        found = (
            ("-", "-") if ours is None else (f"{ours['num_met']} of 5", ours["missed"] or "none")
        )
        lines.append(f"| {TITLES[dataset]} | {batch_size} | {' | '.join([*cells, *found])} |")
    return "\n".join(lines)


def _is_recommended(verdict: dict[str, Any]) -> bool:
    options = json.loads(verdict["options"])
    wanted = {"fisher": "linear", "gradient_momentum": 0.98, "relative": True}
    return options == wanted and verdict["step_size"] == 3.0 and not verdict["warmup_epochs"]


def full_tables(rows: list[dict[str, Any]]) -> list[str]:
    """Per data set: clean and noisy result at every noise level, and what the weights did; means over seeds."""
    tables = []
    for dataset in sorted({row["dataset"] for row in rows}):
        groups = _by_setting([row for row in rows if row["dataset"] == dataset])
        noises = sorted({noise for by_noise in groups.values() for noise in by_noise})
        digits = 4 if IS_ERROR[dataset] else 3
        results = [
            f"| {TITLES[dataset]} | {' | '.join(f'{noise:.0%}' for noise in noises)} |",
            "|---" * (len(noises) + 1) + "|",
        ]
        weights = [
            f"| {TITLES[dataset]} | clean weight after epoch 1, at its least, at the end (80 %) | effective tasks "
            "at the end (0 %, 80 %) | least a_i T (0 %) |",
            "|---|---|---|---|",
        ]

        def mean(group: list[dict[str, Any]], column: str) -> float:
            return float(np.mean([float(row[column]) for row in group]))

        for setting, by_noise in groups.items():
            name = FULL_STYLES[_short_name(setting)][0]
            cells = []
            for noise in noises:
                clean = [float(row["clean"]) for row in by_noise[noise]]
                noisy = mean(by_noise[noise], "noisy")
                spread = float(np.std(clean, ddof=1))
                cells.append(
                    f"{np.mean(clean):.{digits}f} ± {spread:.{digits}f}; {noisy:.{digits}f}"
                )
            results.append(f"| {name} | {' | '.join(cells)} |")
            at_80, at_0 = by_noise[0.8], by_noise[0.0]
            course = ", ".join(
                f"{mean(at_80, column):.2f}"
                for column in (
                    "clean_weight_first_epoch",
                    "least_clean_weight",
                    "last_clean_weight",
                )
            )
            tasks = ", ".join(
                f"{mean(group, 'last_effective_num_tasks'):.2f}" for group in (at_0, at_80)
            )
            least = mean(at_0, "least_relative_weight")
            weights.append(f"| {name} | {course} | {tasks} | {least:.2g} |")
        tables += ["\n".join(results), "\n".join(weights)]
    return tables


def draw_screen(rows: list[dict[str, Any]], dataset: str, path: Path) -> None:
    """Draws the clean tasks' result over the step size for every named choice, one line per momentum.

    The rows are those of one data set and one batch size.
    """
    families = [(f, b) for f in ("linear", "sqrt") for b in ("first", "warmup", "raw")]
    names = {
        "first": "first step's baseline",
        "warmup": "warm-up's baseline",
        "raw": "not relative",
    }
    figure, axes = plt.subplots(
        2, len(families), figsize=(18, 6.4), sharey="row", layout="constrained", squeeze=False
    )
    metric = "normalised MSE" if IS_ERROR[dataset] else "accuracy"
    for row_axes, noise in zip(axes, (0.8, 0.0), strict=True):
        uniform = [
            float(r["clean"])
            for r in rows
            if r["method"] == "uniform" and float(r["noise"]) == noise
        ]
        for axis, (fisher, baseline) in zip(row_axes, families, strict=True):
            if uniform:
                axis.axhspan(min(uniform), max(uniform), color="#7F7F7F", alpha=0.25, lw=0)
                axis.axhline(float(np.mean(uniform)), color="#7F7F7F", label="Uniform, 3 seeds")
            for momentum, colour in COLOURS.items():
                points = sorted(
                    (float(r["step_size"]), float(r["clean"]))
                    for r in rows
                    if r["method"] == "excessmtl"
                    and float(r["noise"]) == noise
                    and _is_family(r, fisher, baseline, momentum)
                )
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        "o-",
                        color=colour,
                        ms=4,
                        label=f"momentum {momentum:g}",
                    )
            axis.set_xscale("log")
            if noise == 0.8:
                axis.set_title(f"{fisher} Fisher, {names[baseline]}", fontsize=10)
            else:
                axis.set_xlabel("step size of the weights")
        better = "lower is better" if IS_ERROR[dataset] else "higher is better"
        row_axes[0].set_ylabel(f"clean tasks' test {metric}\nat noise {noise:g} ({better})")
        if IS_ERROR[dataset] and uniform:
            row_axes[0].set_ylim(0.8 * min(uniform), 1.6 * max(uniform))
        elif uniform:
            row_axes[0].set_ylim(min(uniform) - 0.06, max(uniform) + 0.02)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    batch_size = rows[0]["batch_size"]
    figure.suptitle(f"{TITLES[dataset]}, batch {batch_size}, one seed per point")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_full(rows: list[dict[str, Any]], dataset: str, path: Path) -> None:
    """Draws each setting's clean and noisy result and last clean weight over the noise: mean, least and most seed."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    metric = "normalised MSE" if IS_ERROR[dataset] else "accuracy"
    columns = {
        "clean": f"clean tasks' test {metric}",
        "noisy": f"noisy tasks' test {metric}",
        "last_clean_weight": "weight of the clean tasks, last epoch",
    }
    for setting, by_noise in _by_setting(rows).items():
        label, colour = FULL_STYLES[_short_name(setting)]
        noises = sorted(by_noise)
        for axis, (column, _) in zip(axes, columns.items(), strict=True):
            values = [[float(row[column]) for row in by_noise[noise]] for noise in noises]
            means = [float(np.mean(of)) for of in values]
            axis.fill_between(
                noises,
                [min(of) for of in values],
                [max(of) for of in values],
                color=colour,
                alpha=0.12,
            )
            axis.plot(noises, means, "o-", color=colour, ms=4, label=label)
    for axis, label in zip(axes, columns.values(), strict=True):
        axis.set_xlabel("share of corrupted labels")
        axis.set_ylabel(label)
    axes[2].axhline(UNIFORM_SHARE[dataset], color="#7F7F7F", lw=0.8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"{TITLES[dataset]} at full size, three seeds (bands: least and most)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _short_name(setting: Setting) -> str:
    """The key of FULL_STYLES."""
    if setting.method != "excessmtl":
        return setting.method
    if setting.warmup_epochs:
        return "paper"
    return (
        f"{'relative' if json.loads(setting.options)['relative'] else 'raw'}, {setting.step_size:g}"
    )


def draw_tradeoff(
    verdicts: list[dict[str, Any]], dataset: str, path: Path, batch_size: int = 256
) -> None:
    """Draws what the clean tasks gain over Uniform against what the noisy ones do, one point per setting."""
    figure, axis = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for verdict in verdicts:
        if verdict["batch_size"] != batch_size or verdict["method"] == "uniform":
            continue
        options = json.loads(verdict["options"])
        if verdict["method"] == "candidate":
            label = f"candidates: {options['numerator']}" + (
                ", S forgets" if options.get("forgetting") else ""
            )
            label += ", step size decays" if options.get("decay") else ""
            marker = CANDIDATE_MARKERS["forgetting" in options, "decay" in options]
            style = (marker, CANDIDATE_COLOURS[options["numerator"]])
        else:
            momentum = options["gradient_momentum"]
            label = f"{options['fisher']} Fisher, momentum {momentum:g}"
            style = ("o" if options["fisher"] == "linear" else "^", COLOURS[momentum])
        groups[(label, *style)].append((verdict["noisy_gain"], verdict["gain"]))
    if not groups:
        plt.close(figure)
        return
    for (label, marker, colour), points in sorted(groups.items()):
        axis.scatter(*zip(*points, strict=True), marker=marker, color=colour, s=26, label=label)
    axis.axhline(0, color="#7F7F7F", lw=0.8)
    axis.axvline(0, color="#7F7F7F", lw=0.8)
    unit = "share of Uniform's error" if IS_ERROR[dataset] else "accuracy"
    # Runs that lose more than this are off the picture; what they lose by is in ranking.csv.
    axis.set_xlim(-0.6, 0.15)
    axis.set_ylim(*((-0.3, 0.2) if IS_ERROR[dataset] else (-0.03, 0.015)))
    axis.set_xlabel(f"noisy tasks, gain over Uniform ({unit}), at noise 0.8")
    axis.set_ylabel(f"clean tasks, gain over Uniform ({unit})")
    axis.set_title(
        f"{TITLES[dataset]}, batch {batch_size}: what the clean tasks gain the noisy ones pay"
    )
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _is_family(row: dict[str, Any], fisher: str, baseline: str, momentum: float) -> bool:
    options = json.loads(row["options"])
    found = "raw" if not options["relative"] else "warmup" if int(row["warmup_epochs"]) else "first"
    return (options["fisher"], found, options["gradient_momentum"]) == (fisher, baseline, momentum)


def draw_bias(tables: list[list[dict[str, Any]]], path: Path) -> None:
    """Draws the noisy tasks' share of the summed estimates beside their share of the true excess risk."""
    lines = {
        "true_excess_risk": ("true excess risk", "#000000", "-"),
        "full_linear": ("full-batch gradient", "#009E73", "-"),
        "batch_linear": ("mini-batch gradient (as published)", "#D55E00", "-"),
        "momentum_linear": ("running mean, momentum 0.98", "#0072B2", "-"),
        "batch_sqrt": ("mini-batch gradient, root", "#D55E00", ":"),
        "momentum_sqrt": ("running mean, root", "#0072B2", ":"),
    }
    datasets = sorted({table[0]["dataset"] for table in tables})
    noises = sorted({float(table[0]["noise"]) for table in tables})
    figure, axes = plt.subplots(
        len(noises),
        len(datasets),
        figsize=(5 * len(datasets), 3.4 * len(noises)),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for (row, noise), (column, dataset) in itertools.product(
        enumerate(noises), enumerate(datasets)
    ):
        axis = axes[row][column]
        table = next(
            (t for t in tables if t[0]["dataset"] == dataset and float(t[0]["noise"]) == noise),
            None,
        )
        axis.set_title(f"{TITLES[dataset]}, {noise:.0%} noise", fontsize=10)
        if table is None:
            axis.set_axis_off()
            continue
        axis.axhline(1 - UNIFORM_SHARE[dataset], color="#7F7F7F", lw=0.8)
        steps = sorted({int(r["step"]) for r in table})
        for name, (label, colour, style) in lines.items():
            shares = []
            for step in steps:
                at = [r for r in table if int(r["step"]) == step]
                total = sum(max(float(r[name]), 0.0) for r in at)
                noisy = sum(max(float(r[name]), 0.0) for r in at if r["is_noisy"] == "1")
                shares.append(noisy / total if total > 0 else np.nan)
            axis.plot(
                [float(r["epoch"]) for r in table if r["task"] == table[0]["task"]],
                shares,
                style,
                color=colour,
                label=label,
            )
        axis.set_xscale("log")
        axis.set_ylim(0, 1)
        if row == len(noises) - 1:
            axis.set_xlabel("epoch")
        if column == 0:
            axis.set_ylabel("noisy tasks' share")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        "Which share of the estimated risk do the noisy tasks get? (grey: their uniform share)"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _read(table: Path) -> list[dict[str, Any]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
