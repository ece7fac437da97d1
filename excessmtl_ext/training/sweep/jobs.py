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
from excessmtl_ext.training.run.files import open_own
from excessmtl_ext.training.sweep.cells import Cell

LOG = "log.txt"

# Not `python -m`, which looks into the working directory first: in a checkout, that is the package without its
# compiled ops. A worker imports what the sweep imports.
_START_WORKER = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from excessmtl_ext.training.sweep.worker import main; main(int(sys.argv[1]))"
)


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
    """A worker process and the run that it does.

    Its messages come through a pipe of their own: what its Python prints, before or within the run, goes to the log.

    Args:
        cell: The run.
        config: Of the run.
        folder: Of the run.
        num_threads: That it computes with.
        lock: Descriptor of the sweep's lock. It is the worker's as well: a killed sweep's folder is free when the last
            worker has ended.
        events: Gets each message with this job; None when the worker has ended.

    Raises:
        OSError: the log cannot be written to.
    """

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
        reader, writer = os.pipe()
        try:
            with os.fdopen(open_own(folder / LOG, os.O_WRONLY | os.O_APPEND), "ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _START_WORKER, str(writer), *sys.path],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
                    # Ctrl-C reaches the sweep alone, which tells the workers.
                    start_new_session=True,
                    pass_fds=(lock, writer),
                )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)  # so that the pipe ends with the worker
        order = {
            "config": dataclasses.asdict(config),
            "folder": str(folder),
            "num_threads": num_threads,
        }
        with suppress(BrokenPipeError):  # it ended already, which the reader reports
            self._stdin.write(json.dumps(order) + "\n")
            self._stdin.flush()
        self._reader = threading.Thread(target=self._read, args=(reader, events), daemon=True)
        self._reader.start()

    @property
    def _stdin(self) -> Any:
        assert self._process.stdin is not None
        return self._process.stdin

    def _read(
        self, reader: int, events: queue.SimpleQueue[tuple[Job, dict[str, Any] | None]]
    ) -> None:
        try:
            with os.fdopen(reader, encoding="utf-8", errors="replace") as messages:
                for line in messages:
                    if line.endswith("\n"):  # a killed worker may leave half a line
                        events.put((self, json.loads(line)))
        finally:
            # Whatever has come, somebody waits for the end.
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
