"""One run of a sweep, in a process of its own.

The first line of stdin is the order, JSON. The sweep keeps stdin open: its end, by the sweep's will or because the
sweep was killed, stops the run with a checkpoint, so that no worker outlives its sweep. Messages go to a pipe, one JSON
object per line: how far the run is, and how it ended. Whatever is printed goes to the run's log.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any, TextIO

import torch

from excessmtl_ext.training.run.config import TrainConfig
from excessmtl_ext.training.run.loop import train
from excessmtl_ext.training.run.progress import SELECTION_METRIC, Progress, TrainingInterrupted

# A display that is read by people needs no more; a step of a small network takes a millisecond.
SECONDS_BETWEEN_MESSAGES = 0.25


class _Channel:
    """Writes messages until nobody reads them any more."""

    def __init__(self, stream: TextIO, stop: threading.Event, task: str | None) -> None:
        self._stream = stream
        self._stop = stop
        self._score = SELECTION_METRIC if task is None else f"validation/{task}_score"
        self._last_sent = -SECONDS_BETWEEN_MESSAGES

    def send(self, **message: Any) -> None:
        try:
            self._stream.write(json.dumps(message) + "\n")
            self._stream.flush()
        except OSError:
            self._stop.set()

    def report(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last_sent >= SECONDS_BETWEEN_MESSAGES:
            self._last_sent = now
            self.send(
                state="running",
                step=progress.step,
                num_steps=progress.num_steps,
                epoch=progress.epoch,
                score=progress.latest.get(self._score),
            )


def main(pipe: int) -> None:
    """Does what the first line of stdin orders: ``config``, ``folder``, ``num_threads``.

    Args:
        pipe: Descriptor that messages are written to.
    """
    os.set_inheritable(pipe, False)  # a process that the run starts does not keep the pipe open
    messages = os.fdopen(pipe, "w", encoding="utf-8")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())

    order = json.loads(sys.stdin.readline())

    def wait_for_end() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    torch.set_num_threads(order["num_threads"])
    channel = _Channel(messages, stop, order["config"]["task"])
    try:
        train(
            TrainConfig(**order["config"]),
            order["folder"],
            resume=True,
            report=channel.report,
            should_stop=stop.is_set,
        )
    except TrainingInterrupted:
        channel.send(state="stopped")
    except Exception as error:
        # Whatever ended this run, the others go on: the sweep reports it, the log holds the traceback.
        traceback.print_exc()
        channel.send(state="failed", error=type(error).__name__, message=str(error))
    else:
        channel.send(state="finished")
    sys.stdout.flush()
    sys.stderr.flush()
    # A daemon thread that reads stdin may hold its lock when the interpreter ends, which aborts the process.
    os._exit(0)
