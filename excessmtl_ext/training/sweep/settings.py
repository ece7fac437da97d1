"""sweep.json and environment.json of a sweep's folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from excessmtl_ext.data import Task
from excessmtl_ext.training.run.files import finite_or_none, read_json, write_json
from excessmtl_ext.training.run.record import ENVIRONMENT, describe_environment, read_sessions
from excessmtl_ext.training.run.schema import AtLeast, Nullable
from excessmtl_ext.training.sweep.cells import SweepConfig
from excessmtl_ext.training.sweep.results import EPOCHS, RESULTS, STEP_SIZES, SWEEP

# What makes two sweeps of one folder comparable. The others may grow or change from one command to the next.
_FIXED = (
    "dataset",
    "batch_size",
    "lr",
    "weight_decay",
    "num_train",
    "device",
    "options",
)


# Without a sweep.json, a folder that has one of these holds something else than a sweep.
_REPLACED = (RESULTS, EPOCHS, STEP_SIZES, ENVIRONMENT)

_SCHEMA = {
    "dataset": Nullable(str),
    "epochs": AtLeast(1),
    "methods": [str],
    "noise": [float],
    "num_seeds": AtLeast(1),
    "commands": Nullable([dict]),
}


def check_sweep_folder(folder: Path) -> None:
    """Raises where a sweep in ``folder`` would replace the files of somebody else.

    Raises:
        FileExistsError: it holds no sweep, but a file that one would replace.
        ValueError: it holds a sweep.json that no sweep has written.
    """
    if os.path.lexists(folder / SWEEP):
        read_settings(folder)
        return
    foreign = [name for name in _REPLACED if os.path.lexists(folder / name)]
    if foreign:
        raise FileExistsError(
            f"Expected `output` without files of other programs, but {folder} holds {', '.join(foreign)} and no "
            f"{SWEEP}. Move them elsewhere, or name another folder."
        )


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads the sweep.json of a folder; empty where there is none.

    Raises:
        ValueError: it is not that of a sweep.
    """
    path = folder / SWEEP
    return read_json(path, schema=_SCHEMA) if os.path.lexists(path) else {}


def write_settings(folder: Path, config: SweepConfig, tasks: Sequence[Task], command: str) -> None:
    """Writes sweep.json and environment.json, with a line more for each command that has worked on the folder."""
    path = folder / SWEEP
    saved = read_settings(folder)
    # Where the data lie differs from machine to machine and decides nothing.
    values = {name: v for name, v in dataclasses.asdict(config).items() if name != "data_root"}
    if saved:
        for name in _FIXED:
            if name in saved and saved[name] != values[name]:
                raise ValueError(
                    f"Expected the values of the sweep in {folder}, but got another: `{name}`: "
                    f"{saved[name]!r} there, {values[name]!r} here. Name another folder."
                )
        if saved["epochs"] > config.epochs:
            raise ValueError(
                f"Expected `epochs` of at least {saved['epochs']}, as the sweep in {folder}, but got {config.epochs}."
            )
        values["methods"] = list(dict.fromkeys([*saved["methods"], *config.methods]))
        values["noise"] = sorted({*saved["noise"], *config.noise})
        values["num_seeds"] = max(saved["num_seeds"], config.num_seeds)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    commands = [*saved.get("commands", []), {"started": started, "command": command}]
    described = [
        {"name": task.name, "kind": task.kind, "is_noisy": task.is_noisy} for task in tasks
    ]
    write_json(path, finite_or_none({"commands": commands, **values, "tasks": described}))

    path = folder / ENVIRONMENT
    sessions = read_sessions(folder)
    environment = {**describe_environment(config.device), "num_threads": config.threads_per_job}
    write_json(path, finite_or_none({"sessions": [*sessions, environment]}))
