"""The values of a sweep, and the runs that it consists of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from excessmtl_ext.data import Task
from excessmtl_ext.training.run.config import TrainConfig
from excessmtl_ext.training.run.methods import METHODS

RUNS = "runs"
TUNING = "tuning"


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The values of a sweep, written to sweep.json.

    Attributes:
        dataset: A key of `WORKLOADS`.
        methods: Keys of `METHODS`. A method that trains one task alone is run once per task.
        noise: Shares of corrupted training labels of the noisy tasks.
        num_seeds: Runs per method and noise level, with seeds from 0.
        epochs: Per run, as the next ones see `TrainConfig`.
        batch_size: Per run.
        lr: Per run.
        weight_decay: Per run.
        num_train: Per run.
        data_root: Per run.
        device: Per run.
        num_workers: Per run.
        options: Per run: values of `TrainConfig` that only this data set has.
        jobs: Runs at a time.
        threads_per_job: Threads that each computes with.
        tune: Step sizes to choose from for every method whose step size is tuned; empty: the methods' own.
        tune_noise: Noise levels that the choice is made on.
        tune_seed: Seed that it is made on, none of the grid's.
    """

    dataset: str
    methods: tuple[str, ...]
    noise: tuple[float, ...]
    num_seeds: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    num_train: int | None = None
    data_root: str | None = None
    device: str = "cpu"
    num_workers: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    jobs: int = 1
    threads_per_job: int = 1
    tune: tuple[float, ...] = ()
    tune_noise: tuple[float, ...] = (0.0, 0.8)
    tune_seed: int = 100

    def __post_init__(self) -> None:
        for name, allowed in (("methods", list(METHODS)), ("noise", None), ("tune_noise", None)):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"Expected `{name}` without repetition, but got {list(values)}.")
            unknown = [value for value in values if allowed is not None and value not in allowed]
            if unknown:
                raise ValueError(
                    f"Expected `{name}` of {', '.join(METHODS)}, but got {', '.join(unknown)}."
                )
        for name, maximum in (("num_seeds", 1_000), ("jobs", 256), ("threads_per_job", 1_024)):
            if not 1 <= getattr(self, name) <= maximum:
                raise ValueError(
                    f"Expected `{name}` from 1 to {maximum:,}, but got {getattr(self, name)}."
                )
        if not all(0 < step_size < math.inf for step_size in self.tune):
            raise ValueError(
                f"Expected `tune` with finite step sizes > 0, but got {list(self.tune)}."
            )
        if self.tune and self.tune_seed < self.num_seeds:
            raise ValueError(
                f"Expected `tune_seed` of at least {self.num_seeds}, so that no seed of the grid chooses the step "
                f"size, but got {self.tune_seed}."
            )

    def is_tuned(self, method: str) -> bool:
        """Says whether this sweep chooses the step size of a method."""
        return bool(self.tune) and METHODS[method].has_step_size and METHODS[method].tuned


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        folder: Name of its folder, from the sweep's.
        method: Key of `METHODS`.
        noise: Share of corrupted labels.
        seed: Of the run.
        task: The task that is trained alone, if one is.
        step_size: One of the candidates, or the chosen one; None for the method's own or not chosen yet.
        is_tuning: It serves the choice of the step size.
    """

    folder: str
    method: str
    noise: float
    seed: int
    task: str | None = None
    step_size: float | None = None
    is_tuning: bool = False

    def __str__(self) -> str:
        parts = [METHODS[self.method].label if self.task is None else f"{self.task} alone"]
        if self.is_tuning:
            parts.append(f"step size {self.step_size:g}")
        return ", ".join([*parts, f"noise {self.noise:g}", f"seed {self.seed}"])


def grid_cells(config: SweepConfig, tasks: Sequence[Task]) -> list[Cell]:
    """Returns the cells of the grid: seed by seed, so that a part of the sweep is a smaller sweep."""
    cells = []
    for seed in range(config.num_seeds):
        for noise in config.noise:
            for method in config.methods:
                if METHODS[method].requires_task:
                    cells += _single_task_cells(method, noise, seed, tasks)
                else:
                    folder = f"{RUNS}/{method}_noise{noise:g}_seed{seed}"
                    cells.append(Cell(folder, method, noise, seed))
    return list(dict.fromkeys(cells))


def _single_task_cells(
    method: str, noise: float, seed: int, tasks: Sequence[Task]
) -> Iterator[Cell]:
    for task in tasks:
        # The noise of other tasks does not reach a clean task that is trained alone: one run serves all levels.
        level = noise if task.is_noisy else 0.0
        # Quoted: a name may hold what a folder's cannot.
        folder = f"{RUNS}/{method}_{quote(task.name, safe='')}_noise{level:g}_seed{seed}"
        yield Cell(folder, method, level, seed, task=task.name)


def tuning_cells(config: SweepConfig) -> list[Cell]:
    """Returns the runs that the step sizes are chosen by."""
    return [
        Cell(
            f"{TUNING}/{method}_step{step_size:g}_noise{noise:g}_seed{config.tune_seed}",
            method,
            noise,
            config.tune_seed,
            step_size=step_size,
            is_tuning=True,
        )
        for method in config.methods
        if config.is_tuned(method)
        for step_size in config.tune
        for noise in config.tune_noise
    ]


def train_config(config: SweepConfig, cell: Cell) -> TrainConfig:
    return TrainConfig(
        dataset=config.dataset,
        method=cell.method,
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        weight_decay=config.weight_decay,
        noise=cell.noise,
        seed=cell.seed,
        robust_step_size=cell.step_size,
        num_train=config.num_train,
        data_root=config.data_root,
        device=config.device,
        task=cell.task,
        num_workers=config.num_workers,
        **config.options,
    )
