"""The comparison that `excessmtl demo` runs: four balancers on pairs of small digits, one task mostly mislabelled."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from excessmtl_ext.training.run.config import TrainConfig
from excessmtl_ext.training.run.finished import read_final_metrics
from excessmtl_ext.training.run.loop import train
from excessmtl_ext.training.run.progress import Progress
from excessmtl_ext.training.run.workloads import find_workload

DATASET = "digits"
NOISE = 0.8
NUM_SEEDS = 5
DEMO_METHODS = ("excessmtl-recommended", "excessmtl-official", "uniform", "groupdro")


@dataclass(frozen=True)
class Statistic:
    """Mean and standard deviation over seeds; no deviation of a single seed."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: list[float]) -> Statistic:
        """Summarises at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.std is None else f" ± {self.std:.3f}")


@dataclass(frozen=True)
class MethodSummary:
    """One row of the demo's table.

    Attributes:
        method: Key of `METHODS`.
        clean_accuracy: Test accuracy of the clean task, at the epoch selected on validation.
        noisy_accuracy: The same of the noisy task, on clean labels.
        clean_weight: Weight of the clean task at the end.
    """

    method: str
    clean_accuracy: Statistic
    noisy_accuracy: Statistic
    clean_weight: Statistic


def demo_runs(
    output: Path, *, num_seeds: int, epochs: int | None, device: str
) -> Iterator[tuple[TrainConfig, Path]]:
    """Yields the config and the folder of every run.

    Args:
        output: Folder of the demo; each run gets one of its own in it.
        num_seeds: Runs per method.
        epochs: Per run; None for the workload's own.
        device: Where to compute.
    """
    workload = find_workload(DATASET)
    for seed in range(num_seeds):
        for method in DEMO_METHODS:
            config = TrainConfig(
                dataset=DATASET,
                method=method,
                noise=NOISE,
                seed=seed,
                epochs=workload.epochs if epochs is None else epochs,
                batch_size=workload.batch_size,
                lr=workload.lr,
                device=device,
            )
            yield config, output / method / f"seed_{seed}"


def run_demo(
    runs: list[tuple[TrainConfig, Path]],
    *,
    resume: bool,
    report: Callable[[int, Progress], None],
    should_stop: Callable[[], bool],
) -> list[MethodSummary]:
    """Trains all runs and summarises them.

    Args:
        runs: From `demo_runs`.
        resume: Go on where an earlier demo was stopped; finished runs are read, not repeated.
        report: Called with the number of the run in ``runs`` and its progress.
        should_stop: See `train`.

    Raises:
        TrainingInterrupted: ``should_stop`` returned True.
        FileExistsError: there are runs and ``resume`` is False.
    """
    with _one_thread():
        for number, (config, folder) in enumerate(runs):
            train(
                config,
                folder,
                resume=resume,
                report=partial(report, number),
                should_stop=should_stop,
            )
    return [
        summarise_method(method, [folder for config, folder in runs if config.method == method])
        for method in DEMO_METHODS
    ]


def summarise_method(method: str, folders: list[Path]) -> MethodSummary:
    """Summarises finished runs of two tasks, one of them noisy."""
    clean_accuracies, noisy_accuracies, clean_weights = [], [], []
    for folder in folders:
        metrics = read_final_metrics(folder)
        (noisy,) = metrics["noisy_tasks"]
        (clean,) = metrics["final_task_weights"].keys() - {noisy}
        clean_accuracies.append(metrics["selected"][f"test/{clean}_accuracy"])
        noisy_accuracies.append(metrics["selected"][f"test/{noisy}_accuracy"])
        clean_weights.append(metrics["final_task_weights"][clean])
    return MethodSummary(
        method,
        Statistic.of(clean_accuracies),
        Statistic.of(noisy_accuracies),
        Statistic.of(clean_weights),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Computes on one thread.

    Layers of 32 are too small to share: a second thread gains nothing on an idle machine and, where the other core
    is busy, makes every one of a thousand steps wait for it (15 times slower on two cores with a compiler running).
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
