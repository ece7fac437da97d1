"""A process that runs trials of the benchmark, one after another; each order is a line on stdin, each answer one.

The end of stdin, by the benchmark's will or because it was killed, stops the trial at hand: no worker outlives its
benchmark. What is printed meanwhile goes to the log.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from functools import cache
from pathlib import Path
from typing import Any

import torch

from excessmtl_ext.training.benchmark.datasets import Dataset, find_datasets
from excessmtl_ext.training.benchmark.methods import Method, find_methods
from excessmtl_ext.training.benchmark.trial import Trial, run_trial
from excessmtl_ext.training.run.files import finite_or_none, write_json


def main(pipe: int) -> None:
    """Does what the lines of stdin order.

    Args:
        pipe: Descriptor that answers are written to, one JSON object per line.
    """
    os.set_inheritable(pipe, False)
    answers = os.fdopen(pipe, "w", encoding="utf-8")
    orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    stop = threading.Event()

    def read() -> None:
        for line in sys.stdin:
            orders.put(json.loads(line))
        stop.set()
        orders.put(None)

    threading.Thread(target=read, daemon=True).start()
    torch.set_num_threads(1)
    while (order := orders.get()) is not None:
        answer = _run(order, stop)
        try:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        except OSError:  # nobody reads any more
            break
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a thread that reads stdin would hold its lock


@cache  # a user's file is run once
def _datasets(names: tuple[str, ...]) -> dict[str, Dataset]:
    return find_datasets(names)


@cache
def _methods(names: tuple[str, ...]) -> dict[str, Method]:
    return find_methods(names)


def _run(order: dict[str, Any], stop: threading.Event) -> dict[str, Any]:
    trial = Trial(**order["trial"])
    print(f"--- {trial}", flush=True)
    try:
        result = run_trial(
            trial,
            _datasets(tuple(order["datasets"]))[trial.dataset],
            _methods(tuple(order["methods"]))[trial.method],
            data_root=order["data_root"],
            should_stop=stop.is_set,
        )
    except InterruptedError:
        return {"state": "stopped"}
    except FloatingPointError as error:  # what a too large step size does: a result
        result = {"trial": order["trial"], "diverged": str(error)}
    except Exception as error:
        # Whatever ended this trial, the others go on; the log holds the traceback.
        traceback.print_exc()
        return {"state": "failed", "reason": f"{type(error).__name__}: {error}"}
    path = Path(order["path"])
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"fingerprint": order["fingerprint"], **result}
    write_json(path, finite_or_none(content))
    return {"state": "finished"}
