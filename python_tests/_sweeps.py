"""The tables of made-up sweeps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from excessmtl_ext.training.sweep.results import FinishedRun, write_results

KINDS = {
    "multimnist": ["classification"] * 2,
    "sarcos": ["regression"] * 7,
    "nyuv2": ["segmentation", "depth", "normals"],
}
METRICS = {
    "classification": "accuracy",
    "regression": "nmse",
    "segmentation": "miou",
    "depth": "relative_error",
    "normals": "mean_angle",
}


def write_sweep(
    folder: Path,
    dataset: str,
    methods: Sequence[str],
    noise: Sequence[float] = (0.0, 0.8),
    num_seeds: int = 2,
    num_epochs: int = 2,
) -> Path:
    """A sweep's tables, with numbers that tell cells apart."""
    folder.mkdir(parents=True)
    tasks = [
        {"name": f"t{i}", "kind": kind, "is_noisy": i == 0} for i, kind in enumerate(KINDS[dataset])
    ]
    settings = {"dataset": dataset, "epochs": num_epochs, "tasks": tasks}
    (folder / "sweep.json").write_text(json.dumps(settings))
    runs = [
        make_run(dataset, method, task, level, seed, number / 10, tasks, num_epochs)
        for number, method in enumerate(methods)
        for level in noise
        for task in ([each["name"] for each in tasks] if method == "single-task" else [None])
        if task in (None, "t0") or level == 0
        for seed in range(num_seeds)
    ]
    write_results(folder, runs)
    return folder


def make_run(
    dataset: str,
    method: str,
    task: str | None,
    noise: float,
    seed: int,
    offset: float,
    tasks: list[dict[str, Any]],
    num_epochs: int,
) -> FinishedRun:
    keys = {"dataset": dataset, "method": method, "task": task, "noise": noise, "seed": seed}
    epochs = []
    for epoch in range(1, num_epochs + 1):
        row: dict[str, Any] = {**keys, "epoch": epoch, "step": 10 * epoch}
        for i, each in enumerate(tasks):
            name = each["name"]
            row[f"train/{name}_loss"] = (2 + noise + offset) / epoch + 0.01 * seed
            row[f"test/{name}_loss"] = (1 + offset + noise) / epoch + 0.01 * seed
            row[f"test/{name}_{METRICS[each['kind']]}"] = 0.5 + 0.05 * epoch - offset / 10
            row[f"test/{name}_score"] = 0.5 + 0.05 * epoch - offset / 10
            row[f"balancer/{name}_mean_weight"] = 0.1 + noise * offset if i else 0.4
            row[f"balancer/{name}_excess_risk"] = (2 + i) / epoch
        epochs.append(row)
    test = {name: value for name, value in epochs[-1].items() if name.startswith("test/")}
    result = {**keys, "epochs": num_epochs, "num_train": 1000, "selected_epoch": num_epochs, **test}
    return FinishedRun(result, epochs)
