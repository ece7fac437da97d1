"""The two small exchanges that frame a step: is every rank ready and with how many samples; what has become of it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from excessmtl_ext.distributed.partition import NumSamples, Partition
from excessmtl_ext.distributed.rank_step import Agreement, RankStep

if TYPE_CHECKING:
    from excessmtl_ext.excess_mtl import ExcessMTL


def agree(
    parallel: Partition,
    balancer: ExcessMTL,
    present: Sequence[bool],
    num_samples: NumSamples | None,
    error: Exception | None = None,
) -> Agreement:
    """First exchange of a step: readiness and samples per task. Raises on every rank if it raises on one."""
    counts = [0.0] * parallel.num_tasks
    if error is None:
        try:
            counts = _counts(parallel.num_tasks, present, num_samples)
        except (TypeError, ValueError) as caught:
            error = caught
    signature = zlib.crc32(repr((balancer, parallel.layout, parallel.reduce)).encode())
    numbers = [float(error is not None), float(balancer._num_calls), float(signature), *counts]
    device = parallel.ranks.exchange_device(parallel.device)
    header = torch.tensor(numbers, dtype=torch.float64, device=device)
    rows = parallel.ranks.all_gather(header).view(parallel.ranks.size, -1).tolist()
    if error is not None:
        raise error
    _raise_if_some([row[0] for row in rows])
    for column, what in ((1, "number of steps"), (2, "options and parameter sizes")):
        if len({row[column] for row in rows}) > 1:
            raise RuntimeError(
                f"Expected the same {what} of the balancer on every rank, but they differ. Build it alike on all "
                "ranks, load the same checkpoint, and call backward equally often."
            )
    totals = [sum(row[3 + task] for row in rows) for task in range(parallel.num_tasks)]
    tasks = [task for task, total in enumerate(totals) if total > 0]
    absent = [(task, rank) for task in tasks for rank, row in enumerate(rows) if row[3 + task] == 0]
    idle = [rank for rank, row in enumerate(rows) if not any(row[3:])]
    _check_absent(parallel, absent, idle if tasks else [])
    shares = [
        parallel.ranks.size * count / total if total > 0 else 0.0
        for count, total in zip(counts, totals, strict=True)
    ]
    return Agreement(tasks, shares)


def _counts(num_tasks: int, present: Sequence[bool], num_samples: NumSamples | None) -> list[float]:
    given = 1.0 if num_samples is None else num_samples
    per_task = [given] * num_tasks if isinstance(given, (int, float)) else given
    counts = [float(number) for number in per_task]
    if len(counts) != num_tasks:
        raise ValueError(
            f"Expected `num_samples` to be one number or {num_tasks}, one per task, but got {len(counts)}."
        )
    counts = [count if there else 0.0 for count, there in zip(counts, present, strict=True)]
    for task, count in enumerate(counts):
        if not 0 <= count < math.inf or (present[task] and count == 0):
            raise ValueError(
                f"Expected `num_samples` > 0 for task {task}, but got {count}. Pass None as the loss of a task "
                "that has no samples on this rank."
            )
    return counts


def _check_absent(parallel: Partition, absent: list[tuple[int, int]], idle: list[int]) -> None:
    if not absent:
        return
    task, rank = absent[0]
    found = f"but task {task} has no loss on rank {rank}"
    if parallel.is_sharded:
        raise RuntimeError(
            f"Expected every task on every rank with fully_shard parameters, {found}: its backward pass is "
            "collective. Pass 0 * the loss of that task's output instead of None."
        )
    if parallel.heads is None:
        raise RuntimeError(
            f"Expected every task on every rank, {found}, which cannot know the task's head. Pass model= to the "
            "balancer: the whole model, or its DistributedDataParallel."
        )
    if idle and parallel.ddp is not None and parallel.ddp.find_unused_parameters:
        raise RuntimeError(
            f"Expected some loss on every rank, but rank {idle[0]} has none, and without a graph "
            "DistributedDataParallel's unused parameters are unknown. Set find_unused_parameters=False."
        )


def _raise_if_some(flags: Sequence[float]) -> None:
    failed = [rank for rank, flag in enumerate(flags) if flag]
    if failed:
        raise RuntimeError(
            f"The step was given up because rank(s) {failed} failed; state and gradients are as before it. "
            "See the error there."
        )


def agree_on_end(parallel: Partition, step: RankStep) -> set[int]:
    """Second exchange: raises on every rank if a pass failed on one; else ids of what was reached on any."""
    known = [*parallel.shared, *(parallel.heads or [])]
    failed = [
        float(step.error is not None and rank == parallel.ranks.rank)
        for rank in range(parallel.ranks.size)
    ]
    flags = [*failed, *(float(id(parameter) in step.reached) for parameter in known)]
    device = parallel.ranks.exchange_device(parallel.device)
    tensor = torch.tensor(flags, device=device).to(torch.uint8)
    parallel.ranks.all_reduce(tensor, dist.ReduceOp.MAX)
    flags = tensor.tolist()
    if step.error is not None:
        raise step.error
    _raise_if_some(flags[: parallel.ranks.size])
    reached = zip(known, flags[parallel.ranks.size :], strict=True)
    return step.reached | {id(parameter) for parameter, flag in reached if flag}
