"""The worker processes of a sweep."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excessmtl_ext.training.run.config import TrainConfig
from excessmtl_ext.training.sweep.cells import Cell

LOG = "log.txt"

# Not `python -m`, which looks into the working directory first: in a checkout, that is the package without its
# compiled ops. A worker imports what the sweep imports.
_START_WORKER = "import sys; sys.path[:] = sys.argv[1:]; from excessmtl_ext.training.sweep.worker import main; main()"


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


class Job:
    """A worker process and the run that it does."""

    def __init__(
        self,
        cell: Cell,
        config: TrainConfig,
        folder: Path,
        *,
        num_threads: int,
        lock: int,
        events: queue.SimpleQueue[tuple[Job, dict[str, Any] | None]],
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

    def _read(self, events: queue.SimpleQueue[tuple[Job, dict[str, Any] | None]]) -> None:
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


def describe_failure(message: dict[str, Any], exit_status: int) -> str:
    if "error" in message:
        return f"{message['error']}: {message['message']}"
    if message.get("state") == "stopped":
        return "the process was asked to stop and has saved its checkpoint; the same command goes on from there"
    if exit_status < 0:
        name = signal.Signals(-exit_status).name
        hint = ", as a machine short of memory does" if name == "SIGKILL" else ""
        return f"the process was killed ({name}{hint})"
    return f"the process ended with status {exit_status}"
