"""A grid of runs: methods x noise levels x seeds, several at a time, each in a process of its own.

A sweep can be stopped, killed and extended: finished runs are skipped, begun ones go on from their checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from excessmtl_ext.data import Task
from excessmtl_ext.training.config import FREE_ON_RESUME, TrainConfig
from excessmtl_ext.training.folder_lock import hold_folder
from excessmtl_ext.training.loop import TrainingInterrupted
from excessmtl_ext.training.methods import METHODS
from excessmtl_ext.training.run_files import read_json, write_json
from excessmtl_ext.training.run_record import (
    CONFIG,
    ENVIRONMENT,
    FINAL_METRICS,
    describe_environment,
)
from excessmtl_ext.training.sweep_results import (
    SWEEP,
    FinishedRun,
    Row,
    is_finished,
    read_finished_run,
    read_rows,
    write_results,
    write_table,
)
from excessmtl_ext.training.workloads import find_workload

RUNS = "runs"
TUNING = "tuning"
STEP_SIZES = "step_sizes.csv"
LOG = "log.txt"

# Not `python -m`, which looks into the working directory first: in a checkout, that is the package without its
# compiled ops. A worker imports what the sweep imports.
_START_WORKER = "import sys; sys.path[:] = sys.argv[1:]; from excessmtl_ext.training.sweep_worker import main; main()"

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
        for name in ("num_seeds", "jobs", "threads_per_job"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected `{name}` of at least 1, but got {getattr(self, name)}.")
        if any(not step_size > 0 for step_size in self.tune):
            raise ValueError(f"Expected `tune` with step sizes > 0, but got {list(self.tune)}.")
        if self.tune and self.tune_seed < self.num_seeds:
            raise ValueError(
                f"Expected `tune_seed` of at least {self.num_seeds}, lest a seed of the grid chooses the step size, "
                f"but got {self.tune_seed}."
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


@dataclass(frozen=True)
class JobStatus:
    """How far a running cell is.

    Attributes:
        name: Of the cell.
        step: Steps done.
        num_steps: Steps in all; 0 before the data are read.
        epoch: Epochs done.
        score: Of the last epoch on validation.
    """

    name: str
    step: int = 0
    num_steps: int = 0
    epoch: int = 0
    score: float | None = None

    @property
    def share(self) -> float:
        """Part of the run that is done."""
        return self.step / self.num_steps if self.num_steps else 0.0


@dataclass(frozen=True)
class SweepStatus:
    """How far a sweep is.

    Attributes:
        num_runs: Runs in all, those of the tuning included.
        num_done: Runs that have ended, in this sweep or before.
        jobs: The running ones, one entry per job; None for an idle job.
    """

    num_runs: int
    num_done: int
    jobs: tuple[JobStatus | None, ...]


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
        folder = f"{RUNS}/{method}_{task.name}_noise{level:g}_seed{seed}"
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
        ValueError: the folder holds a sweep with other values.
        BlockingIOError: another sweep is at work in the folder.
        FileNotFoundError: the data are missing.
    """
    folder = Path(output)
    announce = announce or (lambda line: None)
    # Before anything is started or written: missing data concern all runs.
    first = _train_config(config, Cell("", config.methods[0], max(config.noise), 0))
    tasks = find_workload(config.dataset).load(first).tasks
    with hold_folder(folder, "sweep", announce) as lock:
        sweep = _Sweep(config, folder, tasks, lock, report or (lambda status: None), announce)
        _write_settings(folder, config, tasks, command)
        return sweep.run(should_stop or (lambda: False))


def _train_config(config: SweepConfig, cell: Cell) -> TrainConfig:
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


class _Job:
    """A worker process and the run that it does."""

    def __init__(
        self,
        cell: Cell,
        config: TrainConfig,
        folder: Path,
        *,
        num_threads: int,
        lock: int,
        events: queue.SimpleQueue[tuple[_Job, dict[str, Any] | None]],
    ) -> None:
        self.cell = cell
        self.folder = folder
        self.status = JobStatus(str(cell))
        self.last_message: dict[str, Any] = {}
        self.started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        threads = str(num_threads)
        with (folder / LOG).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START_WORKER, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
                # Ctrl-C reaches the sweep alone, which tells the workers. The lock is theirs as well: a killed
                # sweep's folder is free when the last of them has ended.
                start_new_session=True,
                pass_fds=(lock,),
            )
        order = {
            "config": dataclasses.asdict(config),
            "folder": str(folder),
            "num_threads": num_threads,
        }
        with suppress(BrokenPipeError):  # it ended already, which the reader reports
            self._stdin.write(json.dumps(order) + "\n")
            self._stdin.flush()
        self._reader = threading.Thread(target=self._read, args=(events,), daemon=True)
        self._reader.start()

    @property
    def _stdin(self) -> Any:
        assert self._process.stdin is not None
        return self._process.stdin

    def _read(self, events: queue.SimpleQueue[tuple[_Job, dict[str, Any] | None]]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):  # a killed worker may leave half a line
                events.put((self, json.loads(line)))
        events.put((self, None))

    def stop(self) -> None:
        """Asks the worker to save a checkpoint and to end."""
        with suppress(BrokenPipeError):  # it has ended already
            self._stdin.close()

    def kill(self) -> None:
        """Ends the worker without a checkpoint."""
        self._process.kill()

    def wait(self) -> int:
        """Returns the exit status of a worker that has closed its messages."""
        status = self._process.wait()
        self.stop()
        self._reader.join()
        self._process.stdout.close()  # type: ignore[union-attr]
        return status


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
        self.jobs: list[_Job | None] = [None] * config.jobs
        self.events: queue.SimpleQueue[tuple[_Job, dict[str, Any] | None]] = queue.SimpleQueue()

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
        path = self.folder / cell.folder / CONFIG
        if not path.is_file():
            return
        saved = read_json(path)
        for name, value in dataclasses.asdict(_train_config(self.config, cell)).items():
            # None stands for a value that only the run knows, such as the number of samples.
            if name not in FREE_ON_RESUME and value is not None and saved.get(name) != value:
                raise ValueError(
                    f"Expected the run in {path.parent} to be of this sweep, but its `{name}` is "
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
            self.jobs[slot] = _Job(
                cell,
                _train_config(self.config, cell),
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

    def _handle(self, job: _Job, message: dict[str, Any] | None) -> None:
        if message is None:
            self.jobs[self.jobs.index(job)] = None
            self._end(job, job.wait())
        elif message["state"] == "running":
            del message["state"]
            job.status = JobStatus(str(job.cell), **message)
        else:
            job.last_message = message

    def _end(self, job: _Job, exit_status: int) -> None:
        state = job.last_message.get("state")
        if state == "stopped" and self.is_stopping:
            return
        if state == "finished":
            self.num_finished += 1
            seconds = time.monotonic() - job.started
            score = read_json(job.folder / FINAL_METRICS)
            value = score["selected"][score["selection"]]
            self._announce_end(job, f"validation score {value:.4f}, {seconds:.0f} s")
            self._write_results()
        elif job.cell.is_tuning and job.last_message.get("error") == FloatingPointError.__name__:
            self.diverged.add(job.cell)  # what a too large step size does: a result
            self._announce_end(job, "diverged")
        else:
            reason = _describe_failure(job.last_message, exit_status)
            self.failed.append(FailedRun(str(job.cell), reason, job.folder / LOG))
            self._announce_end(job, f"FAILED: {reason}")
        if job.cell.is_tuning:
            self._choose_step_sizes()

    def _announce_end(self, job: _Job, result: str) -> None:
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
        metrics = read_json(self.folder / cell.folder / FINAL_METRICS)
        return metrics["selected"][metrics["selection"]]

    def _give_up(self, method: str, reason: str) -> None:
        lost = [cell for cell in self.waiting if cell.method == method and not cell.is_tuning]
        self.waiting = [cell for cell in self.waiting if cell not in lost]
        self.failed += [FailedRun(str(cell), f"not started: {reason}", None) for cell in lost]

    def _write_step_sizes(
        self, method: str, scores: dict[Cell, float | None], best: float | None
    ) -> None:
        path = self.folder / STEP_SIZES
        rows: list[Row] = read_rows(path) if path.is_file() else []
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


def _describe_failure(message: dict[str, Any], exit_status: int) -> str:
    if "error" in message:
        return f"{message['error']}: {message['message']}"
    if message.get("state") == "stopped":
        return "the process was asked to stop and has saved its checkpoint; the same command goes on from there"
    if exit_status < 0:
        name = signal.Signals(-exit_status).name
        hint = ", as a machine short of memory does" if name == "SIGKILL" else ""
        return f"the process was killed ({name}{hint})"
    return f"the process ended with status {exit_status}"


def _write_settings(folder: Path, config: SweepConfig, tasks: Sequence[Task], command: str) -> None:
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
