"""sweep.json and environment.json of a sweep's folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from excessmtl_ext.data import Task
from excessmtl_ext.training.run.files import read_json, write_json
from excessmtl_ext.training.run.record import ENVIRONMENT, describe_environment
from excessmtl_ext.training.sweep.cells import SweepConfig
from excessmtl_ext.training.sweep.results import SWEEP

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


def write_settings(folder: Path, config: SweepConfig, tasks: Sequence[Task], command: str) -> None:
    """Writes sweep.json and environment.json, with a line more for each command that has worked on the folder."""
    path = folder / SWEEP
    saved = read_json(path, "epochs", "methods", "noise", "num_seeds") if path.is_file() else {}
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
    write_json(path, {"commands": commands, **values, "tasks": described})

    path = folder / ENVIRONMENT
    sessions = read_json(path, "sessions")["sessions"] if path.is_file() else []
    environment = {**describe_environment(config.device), "num_threads": config.threads_per_job}
    write_json(path, {"sessions": [*sessions, environment]})
