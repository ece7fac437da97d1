"""The two small exchanges that frame a step: is every rank ready and with how many samples; what has become of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from excessmtl_ext.distributed.partition import Partition
from excessmtl_ext.distributed.rank_step import Agreement, RankStep, check_memory
from excessmtl_ext.distributed.signature import UNKNOWN, checksum, signature
from excessmtl_ext.step import FisherRule, NumSamples
from excessmtl_ext.step_arguments import moves_weights

_MUST_AGREE = (
    (
        1,
        "options, tasks, parameter sizes and types of the balancer",
        "Build it alike on all ranks, with the same order of tasks and parameters, and with `model` on all or none.",
    ),
    (
        2,
        "number of steps, held weights or not,",
        "Load the same checkpoint on all ranks, and call backward equally often.",
    ),
    (
        3,
        "shared parameters and weights",
        "Make the model from the same seed or wrap it in DistributedDataParallel before the balancer is made, give "
        "the parameters in the same order, and load the same checkpoint on all ranks.",
    ),
)
"""Columns of the first exchange, what they say, and the way out."""

NUM_FIRST_COUNTS = 32
"""Tasks whose samples fit into the first exchange; those of more follow in another one."""

NUM_FIRST_NUMBERS = 5 + NUM_FIRST_COUNTS
"""Length of the first exchange, whatever a rank has got: one of another would hang or crash the ranks that wait."""

ABSENT = -1.0
"""Instead of a number of samples: the rank has no loss of that task. 0: it has one that weighs nothing."""


def agree(
    parallel: Partition,
    rule: FisherRule,
    present: Sequence[bool],
    num_samples: NumSamples | None,
    error: Exception | None = None,
) -> Agreement:
    """Exchanges readiness and samples per task at the start of a step. Raises on every rank if it raises on one."""
    counts = [0.0] * parallel.num_tasks
    if error is None:
        try:
            counts = _counts(parallel.num_tasks, present, num_samples)
        except (TypeError, ValueError) as caught:
            error = caught
    numbers = [
        float(error is not None),
        signature(parallel, rule),
        rule.num_calls + (0.5 if rule.holds_weights else 0.0),
        UNKNOWN if parallel.is_compared or error is not None else checksum(parallel, rule),
        float(parallel.needs_ddp),
    ]
    first = counts[:NUM_FIRST_COUNTS]
    rest = NUM_FIRST_NUMBERS - len(numbers) - len(first)
    rows = gathered(parallel, [*numbers, *first, *[ABSENT] * rest])
    if error is not None:
        raise error
    raise_if_some([row[0] for row in rows])
    for column, what, way_out in _MUST_AGREE:
        if len({row[column] for row in rows if row[column] != UNKNOWN}) > 1:
            raise RuntimeError(
                f"Expected the same {what} on every rank, but they differ. {way_out}"
            )
    parallel.is_compared = True
    all_counts = [row[5 : 5 + len(first)] for row in rows]
    if len(counts) > len(first):  # on all ranks, as they have agreed
        others = gathered(parallel, counts[len(first) :])
        all_counts = [row + more for row, more in zip(all_counts, others, strict=True)]
    totals = [sum((max(c, 0.0) for c in column), 0.0) for column in zip(*all_counts, strict=True)]
    _check_absent(parallel, all_counts, totals)
    shares = [
        parallel.ranks.size * max(count, 0.0) / total if total > 0 else 0.0
        for count, total in zip(counts, totals, strict=True)
    ]
    tasks = [task for task, total in enumerate(totals) if total > 0]
    averages_shared = moves_weights(rule) and not any(row[4] for row in rows)
    return Agreement(tasks, shares, averages_shared)


def gathered(parallel: Partition, numbers: Sequence[float]) -> list[list[float]]:
    """Returns the numbers of every rank, by rank."""
    device = parallel.ranks.exchange_device(parallel.device)
    own = torch.tensor(numbers, dtype=torch.float64, device=device)
    return parallel.ranks.all_gather(own).view(parallel.ranks.size, -1).tolist()


def _counts(num_tasks: int, present: Sequence[bool], num_samples: NumSamples | None) -> list[float]:
    """Samples of this rank per task; ``ABSENT`` where it has no loss."""
    given = 1.0 if num_samples is None else num_samples
    per_task = [given] * num_tasks if isinstance(given, (int, float)) else given
    counts = [float(number) for number in per_task]
    if len(counts) != num_tasks:
        raise ValueError(
            f"Expected `num_samples` to be one number or {num_tasks}, one per task, but got {len(counts)}."
        )
    for task, count in enumerate(counts):
        if present[task] and not 0 <= count < math.inf:
            raise ValueError(
                f"Expected `num_samples` >= 0 for task {task}, but got {count}. Pass how many samples stand behind "
                "the loss on this rank."
            )
    return [count if there else ABSENT for count, there in zip(counts, present, strict=True)]


def _check_absent(parallel: Partition, all_counts: list[list[float]], totals: list[float]) -> None:
    """Raises where a task is missing on some ranks in a way that the others cannot make up for.

    Args:
        parallel: Says which ways there are.
        all_counts: Per rank the samples of each task.
        totals: Of each task over the ranks.
    """
    if parallel.is_sharded:
        _check_all_or_none(all_counts)
        return
    missing = [
        (task, rank)
        for task, total in enumerate(totals)
        for rank, counts in enumerate(all_counts)
        if total > 0 and counts[task] <= 0
    ]
    if not missing:
        return
    task, rank = missing[0]
    if parallel.heads is None:
        raise RuntimeError(
            f"Expected every task on every rank, but task {task} has no loss on rank {rank}, which cannot know the "
            "task's head. Pass model= to the balancer: the whole model, or its DistributedDataParallel."
        )
    idle = [rank for rank, counts in enumerate(all_counts) if max(counts) == ABSENT]
    if idle and parallel.ddp is not None and parallel.ddp.find_unused_parameters:
        raise RuntimeError(
            f"Expected some loss on every rank, but rank {idle[0]} has none, and without a graph "
            "DistributedDataParallel's unused parameters are unknown. Pass losses with num_samples=0, or set "
            "find_unused_parameters=False."
        )


def _check_all_or_none(all_counts: list[list[float]]) -> None:
    for task, counts in enumerate(zip(*all_counts, strict=True)):
        if ABSENT in counts and max(counts) > ABSENT:
            raise RuntimeError(
                "Expected every task on every rank with fully_shard parameters, but task "
                f"{task} has no loss on rank {counts.index(ABSENT)}: its backward pass is collective. Pass a loss of "
                "that task's output with num_samples=0 instead of None."
            )


def raise_if_some(flags: Sequence[float]) -> None:
    """Raises RuntimeError where a rank has failed."""
    failed = [rank for rank, flag in enumerate(flags) if flag]
    if failed:
        raise RuntimeError(
            f"The step was given up because rank(s) {failed} failed; state and gradients are as before it. "
            "See the error there."
        )


def agree_on_end(parallel: Partition, step: RankStep) -> set[int]:
    """Raises on every rank if a pass failed on one; returns the ids of what was reached on any."""
    check_memory(step, step.head_grads, "the head's parameter")
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
    raise_if_some(flags[: parallel.ranks.size])
    reached = zip(known, flags[parallel.ranks.size :], strict=True)
    return step.reached | {id(parameter) for parameter, flag in reached if flag}
