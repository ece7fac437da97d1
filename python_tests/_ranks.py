"""Runs a function in several processes that form a gloo group, with a time limit, for tests.

The processes are started once and serve every test, each call in a process group of its own: what a test pays for is
its own work, not the imports. A call that fails, or in which a process dies, ends them all; the next call starts new
ones.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

# One server process imports torch; the ranks are its forks. It does not import the package: it looks in the working
# folder first, which may be the checkout, where nothing is compiled.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "sklearn.datasets",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
    ]
)

COLLECTIVE_TIMEOUT_S = 900
"""A rank that waits longer for another one fails: a hang is an error in the test, and a busy machine is none."""

GROUP_TIMEOUT_S = 1200
"""After this the ranks are killed and the test fails, whatever they do."""


class _Call(NamedTuple):
    """What a process is to do as one rank of a group."""

    rank: int
    num_ranks: int
    folder: str
    function: Callable[..., Any]
    args: tuple[Any, ...]


class _Worker:
    """A process that runs one call after the other."""

    def __init__(self) -> None:
        self.pipe, other = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(other,), daemon=True)
        self.process.start()
        other.close()  # so that the pipe breaks when the process dies

    def has_ended_its_call(self, seconds: float) -> bool:
        """Waits for the end of the call or of the process."""
        try:
            return self.pipe.poll(seconds) and self.pipe.recv() is None
        except (EOFError, ConnectionResetError):
            return True


_workers: list[_Worker] = []


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(rank, num_ranks, *args)`` returns on every rank.

    ``function`` is a module's; arguments and results can be pickled. An exception on a rank is an
    AssertionError here, with its traceback.
    """
    while len(_workers) < num_ranks:
        _workers.append(_Worker())
    workers = _workers[:num_ranks]
    is_done = False
    try:
        with tempfile.TemporaryDirectory() as folder:
            for rank, worker in enumerate(workers):
                worker.pipe.send(_Call(rank, num_ranks, folder, function, args))
            deadline = time.monotonic() + GROUP_TIMEOUT_S
            late = [
                rank
                for rank, worker in enumerate(workers)
                if not worker.has_ended_its_call(max(0.0, deadline - time.monotonic()))
            ]
            errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
            assert not errors, "\n".join(errors)
            assert not late, f"ranks {late} did not end within {GROUP_TIMEOUT_S} s"
            results = [Path(folder, f"{rank}.result") for rank in range(num_ranks)]
            died = [rank for rank, result in enumerate(results) if not result.exists()]
            assert not died, f"ranks {died} died without an exception"
            loaded = [torch.load(result, weights_only=False) for result in results]
            is_done = True
            return loaded
    finally:
        if not is_done:
            _end_workers()


def _end_workers() -> None:
    for worker in _workers:
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
    _workers.clear()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # torch 2.10's own distributed checkpoint.
    warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
    while True:
        call = pipe.recv()
        _run_call(call)
        pipe.send(None)


def _run_call(call: _Call) -> None:
    folder = Path(call.folder)
    try:
        torch.manual_seed(0)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=call.rank,
            world_size=call.num_ranks,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        )
        dist.barrier()  # or a rank that ends at once would close connections that others still make
        result = call.function(call.rank, call.num_ranks, *call.args)
        torch.save(result, folder / f"{call.rank}.result")
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{call.rank}.error").write_text(f"Rank {call.rank}:\n{traceback.format_exc()}")
        os._exit(1)  # the others learn of it from their broken connections, and end


def raised_by(function: Callable[[], Any]) -> tuple[str, str]:
    """Type and message of what ``function`` raises."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""
