"""Trains with the cheaper modes of ExcessMTL beside the exact one, and says what each keeps of its results.

    python bench/reproduction/cheaper_modes.py sarcos --data-root DATA --runs RUNS --output RESULTS
    python bench/reproduction/cheaper_modes.py multimnist --data-root DATA --runs RUNS --output RESULTS
    python bench/reproduction/cheaper_modes.py --table --output RESULTS --exact SARCOS_SWEEP MULTIMNIST_SWEEP

All at 80 % label noise with the preset "recommended"; a mode changes what its name says and nothing else. RUNS keeps
one folder per run, like a sweep; stop at any time, the same command goes on where it was. RESULTS/results.csv has a row
per finished run, in the columns of a sweep's table. The exact mode is the sweeps' "excessmtl-recommended", the same
runs; mode "exact" trains them here. What the modes cost is measured by bench_training_step.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Before torch, which reads it once: other work runs on the machine's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from excessmtl_ext import ExcessMTL
from excessmtl_ext.training.run.config import TrainConfig
from excessmtl_ext.training.run.loop import train
from excessmtl_ext.training.run.methods import METHODS, Method
from excessmtl_ext.training.run.record import CONFIG, describe_environment, write_json
from excessmtl_ext.training.run.workloads import WORKLOADS
from excessmtl_ext.training.sweep.results import (
    RESULTS,
    Row,
    is_finished,
    read_finished_run,
    read_rows,
    write_table,
)

NOISE = 0.8
SEEDS = 3
EPOCHS = {"sarcos": 60, "multimnist": 10}
NUM_TRAIN = {"sarcos": None, "multimnist": 20_000}
METRIC = {"sarcos": "nmse", "multimnist": "accuracy"}
CLEAN = {
    "sarcos": [f"torque_{number}" for number in range(3, 8)],
    "multimnist": ["top_left"],
}


def _recommended(**options: Any) -> Callable[..., ExcessMTL]:
    return lambda parameters, **given: ExcessMTL.from_preset(
        "recommended", parameters, **{**given, **options}
    )


def _last_layer(parameters: Iterable[Tensor], **given: Any) -> ExcessMTL:
    shared = list(parameters)  # both encoders end in a linear layer: its weight and its bias
    return ExcessMTL.from_preset("recommended", shared, **given, estimate_from=shared[-2:])


MODES: dict[str, tuple[str, Callable[..., ExcessMTL]]] = {
    "exact": ("exact", _recommended()),
    "update_every_4": ("update_every=4", _recommended(update_every=4)),
    "update_every_10": ("update_every=10", _recommended(update_every=10)),
    "last_layer": ("estimate_from=the last layer", _last_layer),
    "features": ('estimate_from="features"', _recommended(estimate_from="features")),
    "features_every_5": (
        'estimate_from="features", update_every=5',
        _recommended(estimate_from="features", update_every=5),
    ),
    "rotation": ("tasks_per_step=1", _recommended(tasks_per_step=1)),
    "rotation_every_5": (
        "tasks_per_step=1, update_every=5",
        _recommended(tasks_per_step=1, update_every=5),
    ),
}

METHODS.update({mode: Method(label, "#000000", build) for mode, (label, build) in MODES.items()})


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("dataset", nargs="?", choices=tuple(EPOCHS))
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=tuple(MODES)[1:])
    parser.add_argument("--data-root")
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--exact", nargs="+", type=Path, default=[], help="Sweeps that hold the exact mode's runs."
    )
    parser.add_argument(
        "--table", action="store_true", help="Print what the results say, as Markdown."
    )
    arguments = parser.parse_args()
    if arguments.dataset is not None:
        if arguments.data_root is None or arguments.runs is None:
            parser.error("a data set needs --data-root and --runs")
        run_modes(arguments)
    if arguments.table:
        rows = read_rows(arguments.output / RESULTS)
        rows += [row for folder in arguments.exact for row in _exact_rows(folder / RESULTS)]
        print_table(rows)


def run_modes(arguments: argparse.Namespace) -> None:
    """Trains what is not finished, whole seeds first, and writes the results after each run."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / "environment.json", describe_environment("cpu"))
    cells = [(mode, seed) for seed in range(SEEDS) for mode in arguments.modes]
    with Progress(console=Console(stderr=True)) as bar:
        progress = bar.add_task(arguments.dataset, total=len(cells))
        for mode, seed in cells:
            folder = arguments.runs / arguments.dataset / mode / f"seed_{seed}"
            config = _config(arguments.dataset, mode, seed, arguments.data_root)
            if not is_finished(folder, config.epochs):
                train(config, folder, resume=(folder / CONFIG).is_file())
            _add_result(arguments.output / RESULTS, read_finished_run(folder).result)
            bar.advance(progress)


def _config(dataset: str, mode: str, seed: int, data_root: str) -> TrainConfig:
    workload = WORKLOADS[dataset]
    return TrainConfig(
        dataset=dataset,
        method=mode,
        epochs=EPOCHS[dataset],
        batch_size=workload.batch_size,
        lr=workload.lr,
        weight_decay=workload.weight_decay,
        noise=NOISE,
        seed=seed,
        num_train=NUM_TRAIN[dataset],
        data_root=data_root,
    )


def _add_result(table: Path, result: Row) -> None:
    keys = ("dataset", "method", "seed")
    rows = read_rows(table) if table.is_file() else []
    kept = [row for row in rows if any(row[name] != result[name] for name in keys)]
    write_table(table, sorted([*kept, result], key=lambda row: [str(row[name]) for name in keys]))


def _exact_rows(table: Path) -> list[Row]:
    """The runs of a sweep that are those of mode ``"exact"``."""
    return [
        {**row, "method": "exact"}
        for row in read_rows(table)
        if (row["method"], row["noise"]) == ("excessmtl-recommended", NOISE)
        and row["epochs"] == EPOCHS[row["dataset"]]
        and row["seed"] < SEEDS
    ]


def print_table(rows: list[Row]) -> None:
    """Prints, for each data set and mode, the clean tasks' result and weight, and how far it is from the exact mode."""
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        metric, clean = METRIC[dataset], CLEAN[dataset]
        results = {
            mode: [
                statistics.fmean(row[f"test/{task}_{metric}"] for task in clean)
                for row in rows
                if (row["dataset"], row["method"]) == (dataset, mode)
            ]
            for mode in MODES
        }
        exact = results["exact"]
        spread = max(exact) - min(exact)
        print(
            f"| {dataset}, clean tasks, {metric} | mean ± std | from exact | within its seeds' spread |"
        )
        print("|---|---|---|---|")
        for mode, values in results.items():
            if not values:
                continue
            away = statistics.fmean(values) - statistics.fmean(exact)
            worse = -away if metric == "accuracy" else away
            std = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            print(
                f"| {MODES[mode][0]} | {statistics.fmean(values):.4f}{std} | {away:+.4f} | "
                f"{'yes' if worse <= spread else 'no'} |"
            )
        print()


if __name__ == "__main__":
    main()
