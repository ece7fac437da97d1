"""The comparison that ``excessmtl demo`` runs: four balancers on pairs of small digits, one task mostly mislabelled."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from excessmtl_ext import Balancer
from excessmtl_ext.training.run.config import TrainConfig
from excessmtl_ext.training.run.files import read_json, write_json
from excessmtl_ext.training.run.finished import read_final_metrics, read_tasks
from excessmtl_ext.training.run.loop import train
from excessmtl_ext.training.run.progress import Progress
from excessmtl_ext.training.run.record import BALANCER_REPORT
from excessmtl_ext.training.run.workloads import find_workload

DATASET = "digits"
NOISE = 0.8
NUM_SEEDS = 5

# The method that the demo is about, and the one that the others are measured against.
RECOMMENDED = "excessmtl-recommended"
BASELINE = "uniform"
DEMO_METHODS = (RECOMMENDED, "excessmtl-official", BASELINE, "groupdro")

# A mean of seeds that lies this many standard errors from 0 is no chance.
NUM_STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class Statistic:
    """Mean and standard deviation over seeds; no deviation of a single seed."""

    mean: float
    std: float | None
    number: int = 1

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic:
        """Summarises at least one value."""
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.std is None else f" ± {self.std:.3f}")

    @property
    def sign(self) -> int:
        """1 or -1 where the mean is further from 0 than chance explains, else 0; 0 for a single seed."""
        if self.std is None:
            return 0
        error = NUM_STANDARD_ERRORS * self.std / math.sqrt(self.number)
        return 0 if abs(self.mean) <= error else int(math.copysign(1, self.mean))


@dataclass(frozen=True)
class MethodSummary:
    """One row of the demo's table.

    Attributes:
        method: Key of `METHODS`.
        clean_accuracy: Test accuracy of the clean task, at the epoch selected on validation.
        noisy_accuracy: The same of the noisy task, on clean labels.
        clean_weight: Weight of the clean task at the end.
        clean_gain: Accuracy of the clean task less that of `BASELINE` on the same seed.
        noisy_gain: The same of the noisy task.
    """

    method: str
    clean_accuracy: Statistic
    noisy_accuracy: Statistic
    clean_weight: Statistic
    clean_gain: Statistic
    noisy_gain: Statistic


@dataclass(frozen=True)
class Finding:
    """What ``balancer.report()`` said at the end of one run.

    Attributes:
        seed: Of the run.
        noisy: Names of the tasks that it called noisy.
        text: The report as it prints.
    """

    seed: int
    noisy: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class DemoResult:
    """What the demo has shown.

    Attributes:
        methods: In the order of `DEMO_METHODS`.
        findings: Of the recommended method's runs, one per seed; fewer where a run was finished without a record.
        clean_task: The task whose labels are right.
        noisy_task: The task whose training labels are mostly wrong.
    """

    methods: tuple[MethodSummary, ...]
    findings: tuple[Finding, ...]
    clean_task: str
    noisy_task: str

    def of(self, method: str) -> MethodSummary:
        """Returns the summary of one method."""
        return next(summary for summary in self.methods if summary.method == method)


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
) -> DemoResult:
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
            balancers: list[Balancer] = []

            def observe(
                balancer: Balancer, names: Sequence[str], kept: list[Balancer] = balancers
            ) -> None:
                balancer.record_history(gradients=True, task_names=names)
                kept.append(balancer)

            train(
                config,
                folder,
                resume=resume,
                report=partial(report, number),
                should_stop=should_stop,
                observe=observe if config.method == RECOMMENDED else None,
            )
            for balancer in balancers:
                _write_finding(folder, balancer)
    return summarise(runs)


def summarise(runs: Sequence[tuple[TrainConfig, Path]]) -> DemoResult:
    """Summarises finished runs of two tasks, one of them noisy, of each method on the same seeds."""
    tasks = read_tasks(runs[0][1])
    (noisy,) = (task["name"] for task in tasks if task["is_noisy"])
    (clean,) = (task["name"] for task in tasks if not task["is_noisy"])
    folders = {
        method: [folder for config, folder in runs if config.method == method]
        for method in DEMO_METHODS
    }
    baseline = [_accuracies(folder, clean, noisy) for folder in folders[BASELINE]]
    summaries: list[MethodSummary] = []
    for method in DEMO_METHODS:
        values = [_accuracies(folder, clean, noisy) for folder in folders[method]]
        gains = [
            (own[0] - base[0], own[1] - base[1]) for own, base in zip(values, baseline, strict=True)
        ]
        summaries.append(
            MethodSummary(
                method,
                *(Statistic.of(column) for column in zip(*values, strict=True)),
                *(Statistic.of(column) for column in zip(*gains, strict=True)),
            )
        )
    findings = [
        _read_finding(folder, config.seed)
        for config, folder in runs
        if config.method == RECOMMENDED and (folder / BALANCER_REPORT).is_file()
    ]
    return DemoResult(tuple(summaries), tuple(findings), clean, noisy)


def _accuracies(folder: Path, clean: str, noisy: str) -> tuple[float, float, float]:
    """Returns the test accuracies of both tasks, and the clean one's final weight."""
    metrics = read_final_metrics(folder)
    selected = metrics["selected"]
    accuracies = (selected[f"test/{task}_accuracy"] for task in (clean, noisy))
    return (*accuracies, metrics["final_task_weights"][clean])


def _write_finding(folder: Path, balancer: Balancer) -> None:
    """Keeps the report of a run that has been trained now: a finished one has nothing to report on."""
    history = balancer.history
    assert history is not None
    if history.num_steps == 0:
        return
    report = balancer.report()
    noisy = [
        task.name
        for task in report.tasks
        if task.is_noisy([other for other in report.tasks if other != task])
    ]
    write_json(folder / BALANCER_REPORT, {"noisy": noisy, "text": str(report)})


def _read_finding(folder: Path, seed: int) -> Finding:
    content = read_json(folder / BALANCER_REPORT, schema={"noisy": [str], "text": str})
    return Finding(seed, tuple(content["noisy"]), content["text"])


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
