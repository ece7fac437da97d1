"""A grid of runs: methods x noise levels x seeds, several at a time, each in a process of its own.

A sweep can be stopped, killed and extended: finished runs are skipped, begun ones go on from their checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
import queue
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excessmtl_ext.data import Task
from excessmtl_ext.training.run.config import FREE_ON_RESUME
from excessmtl_ext.training.run.finished import read_final_metrics
from excessmtl_ext.training.run.lock import hold_folder
from excessmtl_ext.training.run.methods import METHODS
from excessmtl_ext.training.run.progress import TrainingInterrupted
from excessmtl_ext.training.run.record import CONFIG, FINAL_METRICS, check_folder, read_config
from excessmtl_ext.training.run.workloads import find_workload
from excessmtl_ext.training.sweep.cells import (
    RUNS,
    Cell,
    SweepConfig,
    grid_cells,
    train_config,
    tuning_cells,
)
from excessmtl_ext.training.sweep.jobs import LOG, Job, JobStatus, SweepStatus, describe_failure
from excessmtl_ext.training.sweep.results import (
    STEP_SIZES,
    FinishedRun,
    Row,
    is_finished,
    read_finished_run,
    read_rows,
    write_results,
    write_table,
)
from excessmtl_ext.training.sweep.settings import check_sweep_folder, write_settings


@dataclass(frozen=True)
class FailedRun:
    """A run that did not finish.

    Attributes:
        name: Of the cell.
        reason: One line.
        log: Where to read more; None for a run that was not started.
    """

    name: str
    reason: str
    log: Path | None


@dataclass(frozen=True)
class SweepOutcome:
    """How a sweep ended.

    Attributes:
        num_finished: Runs that are finished now.
        num_skipped: Those of them that were finished before.
        failed: The others.
        step_sizes: Method -> chosen step size, of the tuned methods.
    """

    num_finished: int
    num_skipped: int
    failed: tuple[FailedRun, ...]
    step_sizes: dict[str, float]


def run_sweep(
    config: SweepConfig,
    output: str | Path,
    *,
    command: str = "",
    report: Callable[[SweepStatus], None] | None = None,
    announce: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> SweepOutcome:
    """Runs the cells of a sweep that are not finished yet, and writes the tables of all that are.

    Args:
        config: What to run.
        output: Folder of the sweep.
        command: The command line, for the record.
        report: Called when something has changed.
        announce: Called with a line for each run that ends.
        should_stop: Asked several times a second; True stops the workers, which save checkpoints.

    Raises:
        TrainingInterrupted: ``should_stop`` returned True.
        FileExistsError: the folder, or that of a run, holds files that no sweep has written.
        ValueError: the folder holds a sweep with other values, or its files are damaged.
        BlockingIOError: another sweep is at work in the folder.
        FileNotFoundError: the data are missing.
    """
    folder = Path(output)
    announce = announce or (lambda line: None)
    # Before anything is started or written: missing data concern all runs.
    first = train_config(config, Cell("", config.methods[0], max(config.noise), 0))
    tasks = find_workload(config.dataset).load(first).tasks
    check_sweep_folder(folder)  # before the lock, which is the first file to be written
    with hold_folder(folder, "sweep", announce) as lock:
        check_sweep_folder(folder)
        sweep = _Sweep(config, folder, tasks, lock, report or (lambda status: None), announce)
        write_settings(folder, config, tasks, command)
        return sweep.run(should_stop or (lambda: False))


class _Sweep:
    """The state of a running sweep: what waits, what runs, what has ended."""

    def __init__(
        self,
        config: SweepConfig,
        folder: Path,
        tasks: Sequence[Task],
        lock: int,
        report: Callable[[SweepStatus], None],
        announce: Callable[[str], None],
    ) -> None:
        self.config = config
        self.folder = folder
        self.lock = lock
        self.report = report
        self.announce = announce
        self.step_sizes: dict[str, float] = {}
        self.failed: list[FailedRun] = []
        self.is_stopping = False
        self.diverged: set[Cell] = set()
        self.finished_runs: dict[str, FinishedRun] = {}
        self.jobs: list[Job | None] = [None] * config.jobs
        self.events: queue.SimpleQueue[tuple[Job, dict[str, Any] | None]] = queue.SimpleQueue()

        self.tuning = tuning_cells(config)
        grid = grid_cells(config, tasks)
        self.num_runs = len(self.tuning) + len(grid)
        for cell in (*self.tuning, *grid):
            self._check(cell)
        self.waiting: list[Cell] = []
        self.num_finished = 0
        for cell in (*self.tuning, *grid):
            if is_finished(folder / cell.folder, config.epochs):
                self.num_finished += 1
            else:
                self.waiting.append(cell)
        self.num_skipped = self.num_finished

    def run(self, should_stop: Callable[[], bool]) -> SweepOutcome:
        """Works until nothing is left that can be done."""
        self._choose_step_sizes()
        self._write_results()
        try:
            while True:
                if not self.is_stopping:
                    self._start_jobs()
                self.report(self._status())
                if not any(self.jobs):
                    break
                self._handle_events()
                if should_stop() and not self.is_stopping:
                    self.is_stopping = True
                    self.announce("Stopping: the runs save their checkpoints.")
                    for job in filter(None, self.jobs):
                        job.stop()
        finally:
            for job in filter(None, self.jobs):
                job.kill()
                job.wait()
        if self.is_stopping:
            raise TrainingInterrupted(f"Stopped after {self.num_finished} of {self.num_runs} runs.")
        return SweepOutcome(
            self.num_finished, self.num_skipped, tuple(self.failed), self.step_sizes
        )

    def _check(self, cell: Cell) -> None:
        """Raises where the folder holds the run of another sweep: before hours are spent on the others."""
        folder = self.folder / cell.folder
        check_folder(folder, resume=True)
        if not (folder / CONFIG).is_file():
            return
        saved = read_config(folder)
        for name, value in dataclasses.asdict(train_config(self.config, cell)).items():
            # None stands for a value that only the run knows, such as the number of samples.
            if name not in FREE_ON_RESUME and value is not None and saved.get(name) != value:
                raise ValueError(
                    f"Expected the run in {folder} to be of this sweep, but its `{name}` is "
                    f"{saved.get(name)!r} instead of {value!r}. Name another folder."
                )

    def _start_jobs(self) -> None:
        for slot, job in enumerate(self.jobs):
            if job is not None:
                continue
            cell = next((cell for cell in self.waiting if self._is_ready(cell)), None)
            if cell is None:
                return
            self.waiting.remove(cell)
            if self.config.is_tuned(cell.method) and not cell.is_tuning:
                cell = dataclasses.replace(cell, step_size=self.step_sizes[cell.method])
                self._check(cell)
            self.jobs[slot] = Job(
                cell,
                train_config(self.config, cell),
                self.folder / cell.folder,
                num_threads=self.config.threads_per_job,
                lock=self.lock,
                events=self.events,
            )

    def _is_ready(self, cell: Cell) -> bool:
        return (
            cell.is_tuning
            or not self.config.is_tuned(cell.method)
            or cell.method in self.step_sizes
        )

    def _handle_events(self) -> None:
        """Waits for the next message of a worker and takes all that have come."""
        try:
            event = self.events.get(timeout=0.2)
        except queue.Empty:
            return
        while True:
            self._handle(*event)
            if self.events.empty():
                return
            event = self.events.get()

    def _handle(self, job: Job, message: dict[str, Any] | None) -> None:
        if message is None:
            self.jobs[self.jobs.index(job)] = None
            self._end(job, job.wait())
        elif message["state"] == "running":
            del message["state"]
            job.status = JobStatus(str(job.cell), **message)
        else:
            job.last_message = message

    def _end(self, job: Job, exit_status: int) -> None:
        state = job.last_message.get("state")
        if state == "stopped" and self.is_stopping:
            return
        if state == "finished":
            self.num_finished += 1
            seconds = time.monotonic() - job.started
            score = read_final_metrics(job.folder)
            value = score["selected"][score["selection"]]
            self._announce_end(job, f"validation score {value:.4f}, {seconds:.0f} s")
            self._write_results()
        elif job.cell.is_tuning and job.last_message.get("error") == FloatingPointError.__name__:
            self.diverged.add(job.cell)  # what a too large step size does: a result
            self._announce_end(job, "diverged")
        else:
            reason = describe_failure(job.last_message, exit_status)
            self.failed.append(FailedRun(str(job.cell), reason, job.folder / LOG))
            self._announce_end(job, f"FAILED: {reason}")
        if job.cell.is_tuning:
            self._choose_step_sizes()

    def _announce_end(self, job: Job, result: str) -> None:
        self.announce(f"[{self._num_done()}/{self.num_runs}] {job.cell}: {result}")

    def _num_done(self) -> int:
        return self.num_finished + len(self.diverged) + len(self.failed)

    def _choose_step_sizes(self) -> None:
        """Chooses for each method whose tuning has ended; without a choice its grid is given up."""
        for method in dict.fromkeys(cell.method for cell in self.tuning):
            cells = [cell for cell in self.tuning if cell.method == method]
            if method in self.step_sizes or not all(map(self._has_ended, cells)):
                continue
            scores = {cell: self._tuning_score(cell) for cell in cells}
            if any(score is None and cell not in self.diverged for cell, score in scores.items()):
                self._give_up(method, "a run of its tuning failed")
                continue
            best = best_step_size(scores)
            self._write_step_sizes(method, scores, best)
            if best is None:
                self._give_up(method, "it diverged with every step size")
            else:
                self.step_sizes[method] = best
                self.announce(f"{METHODS[method].label}: step size {best:g} chosen")

    def _has_ended(self, cell: Cell) -> bool:
        is_running = any(job is not None and job.cell == cell for job in self.jobs)
        return cell not in self.waiting and not is_running

    def _tuning_score(self, cell: Cell) -> float | None:
        if not is_finished(self.folder / cell.folder, self.config.epochs):
            return None
        metrics = read_final_metrics(self.folder / cell.folder)
        return metrics["selected"][metrics["selection"]]

    def _give_up(self, method: str, reason: str) -> None:
        lost = [cell for cell in self.waiting if cell.method == method and not cell.is_tuning]
        self.waiting = [cell for cell in self.waiting if cell not in lost]
        self.failed += [FailedRun(str(cell), f"not started: {reason}", None) for cell in lost]

    def _write_step_sizes(
        self, method: str, scores: dict[Cell, float | None], best: float | None
    ) -> None:
        path = self.folder / STEP_SIZES
        rows: list[Row] = read_rows(path, ("method",)) if path.is_file() else []
        rows = [row for row in rows if row["method"] != method]
        means = mean_scores(scores)
        rows += [
            {
                "method": method,
                "robust_step_size": cell.step_size,
                "noise": cell.noise,
                "seed": cell.seed,
                "validation/mean_score": score,
                "mean_over_noise": means.get(cell.step_size),
                "is_chosen": int(cell.step_size == best),
            }
            for cell, score in scores.items()
        ]
        write_table(path, rows)

    def _write_results(self) -> None:
        """Writes the tables of all finished runs of the folder, those of earlier commands included."""
        for path in sorted((self.folder / RUNS).glob(f"*/{FINAL_METRICS}")):
            name = path.parent.name
            if name not in self.finished_runs and is_finished(path.parent, self.config.epochs):
                self.finished_runs[name] = read_finished_run(path.parent)
        write_results(self.folder, self.finished_runs.values())

    def _status(self) -> SweepStatus:
        return SweepStatus(
            self.num_runs,
            self._num_done(),
            tuple(None if job is None else job.status for job in self.jobs),
        )


def mean_scores(scores: dict[Cell, float | None]) -> dict[float | None, float]:
    """Returns the mean score of each step size whose runs all have one."""
    by_step_size: dict[float | None, list[float]] = {}
    for cell, score in scores.items():
        value = math.nan if score is None else score
        by_step_size.setdefault(cell.step_size, []).append(value)
    means = {step_size: statistics.fmean(values) for step_size, values in by_step_size.items()}
    return {step_size: mean for step_size, mean in means.items() if not math.isnan(mean)}


def best_step_size(scores: dict[Cell, float | None]) -> float | None:
    """Returns the step size with the highest mean score, the smallest of equals; None if every one has diverged."""
    means = mean_scores(scores)
    return max(means, key=lambda step_size: (means[step_size], -(step_size or 0)), default=None)
