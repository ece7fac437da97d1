"""Runs a function in several processes that form a gloo group, with a time limit, for tests."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# One server process imports torch; the ranks are its forks, so a group starts in a fraction of a second.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.tensor", "excessmtl_ext"])

COLLECTIVE_TIMEOUT_S = 30
"""A rank that waits longer for another one fails: what would be a hang is an error in the test."""

GROUP_TIMEOUT_S = 120
"""After this the ranks are killed and the test fails, whatever they do. Includes the imports of the first group."""


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(rank, num_ranks, *args)`` returns on every rank.

    ``function`` is a module's; arguments and results can be pickled. An exception on a rank is an
    AssertionError here, with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(
                target=_rank_main, args=(rank, num_ranks, folder, function, args), daemon=True
            )
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + GROUP_TIMEOUT_S
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not errors, "\n".join(errors)
        assert not alive, f"ranks {alive} did not end within {GROUP_TIMEOUT_S} s"
        results = [Path(folder, f"{rank}.result") for rank in range(num_ranks)]
        return [torch.load(result, weights_only=False) for result in results]


def _rank_main(
    rank: int, num_ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    try:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        warnings.simplefilter("error")
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        )
        result = function(rank, num_ranks, *args)
        torch.save(result, Path(folder, f"{rank}.result"))
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(f"Rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # the others learn of it from their broken connections, and end


def raised_by(function: Callable[[], Any]) -> tuple[str, str]:
    """Type and message of what ``function`` raises."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""
