"""Runs the trials of a benchmark in worker processes, with the time that is left, and goes on after a kill."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from excessmtl_ext.training.benchmark.plan import TRIALS, BenchmarkConfig, Plan
from excessmtl_ext.training.benchmark.trial import Trial
from excessmtl_ext.training.run.files import open_own
from excessmtl_ext.training.run.lock import hold_folder

LOG = "log.txt"
SECONDS_BETWEEN_REPORTS = 0.5

# A worker imports what the benchmark imports, and not what the working directory holds.
_START_WORKER = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from excessmtl_ext.training.benchmark.worker import main; main(int(sys.argv[1]))"
)


@dataclass(frozen=True)
class Progress:
    """How far a benchmark is.

    Attributes:
        num_done: Trials that are finished, now or before.
        num_trials: Trials in all.
        seconds_left: Estimated from the trials of each data set that have ended; None before the first has.
        running: The trials at hand.
    """

    num_done: int
    num_trials: int
    seconds_left: float | None
    running: tuple[Trial, ...]


@dataclass(frozen=True)
class FailedTrial:
    """A trial that ended without a result, and why."""

    trial: Trial
    reason: str


class Worker:
    """A process that runs trials, one at a time.

    Args:
        log: Gets whatever is printed.
        lock: Descriptor of the benchmark's lock, the worker's as well.
        events: Gets the worker and its answer; None when it has ended.
    """

    def __init__(
        self,
        log: Path,
        lock: int,
        events: queue.SimpleQueue[tuple[Worker, dict[str, Any] | None]],
    ) -> None:
        self.trial: Trial | None = None
        self.started = 0.0
        reader, writer = os.pipe()
        try:
            with os.fdopen(open_own(log, os.O_WRONLY | os.O_APPEND), "ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _START_WORKER, str(writer), *sys.path],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                    start_new_session=True,  # Ctrl-C reaches the benchmark alone
                    pass_fds=(writer,) if lock < 0 else (lock, writer),
                )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        threading.Thread(target=self._read, args=(reader, events), daemon=True).start()

    def _read(
        self,
        reader: int,
        events: queue.SimpleQueue[tuple[Worker, dict[str, Any] | None]],
    ) -> None:
        try:
            with os.fdopen(reader, encoding="utf-8", errors="replace") as answers:
                for line in answers:
                    if line.endswith("\n"):  # a killed worker may leave half a line
                        events.put((self, json.loads(line)))
        finally:
            events.put((self, None))

    def run(self, trial: Trial, order: dict[str, Any]) -> None:
        """Orders a trial."""
        self.trial, self.started = trial, time.monotonic()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which the reader reports
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def stop(self) -> None:
        """Lets the worker end between two steps."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def kill(self) -> None:
        """Ends the worker at once."""
        self._process.kill()

    def wait(self) -> int:
        """Returns the exit status of a worker that has ended."""
        return self._process.wait()


def run_benchmark(
    config: BenchmarkConfig,
    output: Path,
    *,
    jobs: int = 1,
    resume: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    announce: Callable[[str], None] = lambda line: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[FailedTrial]:
    """Runs every trial that is not finished yet.

    A trial's result is a file of its own, written when it ends: after a kill, the same call with ``resume`` goes on
    with the others. With more methods, data sets or seeds it extends the benchmark.

    Args:
        config: What is compared on what.
        output: Folder of the benchmark.
        jobs: Trials at a time, each in one thread.
        resume: Go on with the benchmark in ``output``.
        report: Called about twice a second.
        announce: Called with a line whenever a trial ends.
        should_stop: Asked about twice a second; True ends the benchmark, the trials at hand are lost.

    Returns:
        The trials that failed.

    Raises:
        FileExistsError: ``output`` holds a benchmark and ``resume`` is False.
        ValueError: no data set or no method can run here, or a result is damaged.
        InterruptedError: ``should_stop`` returned True.
    """
    if not config.found_datasets or not config.found_methods:
        raise ValueError(
            f"Expected a data set and a method that can run here, but got none: {'; '.join(config.left_out())}."
        )
    if (output / TRIALS).is_dir() and any((output / TRIALS).iterdir()) and not resume:
        raise FileExistsError(
            f"Expected `output` to hold no benchmark, but {output} does. Pass --resume to go on with it, or name "
            "another folder."
        )
    with hold_folder(output, "benchmark", announce, is_required=False) as lock:
        return _Runner(config, output, jobs, lock, report, announce, should_stop).run()


class _Runner:
    def __init__(
        self,
        config: BenchmarkConfig,
        output: Path,
        jobs: int,
        lock: int,
        report: Callable[[Progress], None],
        announce: Callable[[str], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.plan, self.config, self.output = Plan(config, output), config, output
        self.jobs, self.lock = jobs, lock
        self.report, self.announce, self.should_stop = report, announce, should_stop
        self.events: queue.SimpleQueue[tuple[Worker, dict[str, Any] | None]] = queue.SimpleQueue()
        self.workers: list[Worker] = []
        self.failed: list[FailedTrial] = []
        self.seconds: dict[str, list[float]] = {}
        self.num_finished = 0
        self.num_trials = self.plan.num_trials()

    def run(self) -> list[FailedTrial]:
        """Runs until nothing waits and nothing runs."""
        try:
            has_news = True  # looks through the files of all trials, so only where one has ended
            while True:
                if has_news:
                    self._start()
                    self.num_finished = self.plan.num_finished()
                has_news = False
                busy = [worker for worker in self.workers if worker.trial is not None]
                self._report(busy)
                if not busy:
                    return self.failed
                if self.should_stop():
                    raise InterruptedError("The benchmark was stopped; finished trials are kept.")
                with suppress(queue.Empty):
                    self._handle(*self.events.get(timeout=SECONDS_BETWEEN_REPORTS))
                    has_news = True
        finally:
            for worker in self.workers:
                worker.stop()
            for worker in self.workers:
                worker.wait()

    def _start(self) -> None:
        """Gives every idle worker a trial, and starts workers up to the number of jobs."""
        given_up = {failed.trial for failed in self.failed}
        taken = {worker.trial for worker in self.workers}
        waiting = [t for t in self.plan.waiting() if t not in given_up and t not in taken]
        idle = [worker for worker in self.workers if worker.trial is None]
        while waiting and (idle or len(self.workers) < self.jobs):
            if not idle:
                idle.append(Worker(self.output / LOG, self.lock, self.events))
                self.workers.append(idle[-1])
            trial = waiting.pop(0)
            idle.pop().run(
                trial,
                {
                    "trial": asdict(trial),
                    "datasets": list(self.config.datasets),
                    "methods": list(self.config.methods),
                    "data_root": self.config.data_root,
                    "path": str(self.plan.path(trial)),
                    "fingerprint": self.plan.fingerprint(trial),
                },
            )

    def _handle(self, worker: Worker, answer: dict[str, Any] | None) -> None:
        trial = worker.trial
        if answer is None:
            self.workers.remove(worker)
            status = worker.wait()
            if trial is not None:
                self._give_up(trial, f"its process ended with status {status}, see {LOG}")
            return
        worker.trial = None
        if trial is None:
            return
        if answer["state"] == "failed":
            self._give_up(trial, answer["reason"])
        elif answer["state"] == "finished":
            taken = time.monotonic() - worker.started
            self.seconds.setdefault(trial.dataset, []).append(taken)
            self.announce(f"{trial}: {taken:.0f} s")

    def _give_up(self, trial: Trial, reason: str) -> None:
        self.failed.append(FailedTrial(trial, reason))
        self.announce(f"{trial}: FAILED: {reason}")

    def _report(self, busy: list[Worker]) -> None:
        done, total = self.num_finished, self.num_trials
        self.report(
            Progress(
                done,
                total,
                self._seconds_left(total - done - len(self.failed)),
                tuple(worker.trial for worker in busy if worker.trial is not None),
            )
        )

    def _seconds_left(self, count: int) -> float | None:
        if not self.seconds:
            return None
        means = {name: sum(each) / len(each) for name, each in self.seconds.items()}
        # Data sets without a finished trial take the mean of the others; all have equally many trials.
        mean = sum(means.values()) / len(means)
        names = self.config.found_datasets
        per_trial = sum(means.get(name, mean) for name in names) / len(names)
        return max(0, count) * per_trial / self.jobs
