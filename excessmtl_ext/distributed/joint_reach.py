"""What the tasks of all ranks reach: every rank finds the shared parameters of the joined batch."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from excessmtl_ext.distributed.agreement import NUM_FIRST_NUMBERS, gathered, raise_if_some
from excessmtl_ext.distributed.partition import Partition


def joined(
    parallel: Partition,
    options: str,
    described: Sequence[tuple[str, int, bool]],
    found: tuple[int, Sequence[int]],
) -> tuple[int, list[int]]:
    """Returns the union over the ranks of the present tasks, and of the tasks that reach each parameter, as bits.

    Args:
        parallel: The ranks.
        options: The balancer's, for comparison.
        described: Names and sizes of the model's parameters, for comparison.
        found: The present tasks of this rank, and those of each parameter.

    Raises:
        RuntimeError: another rank failed, or has another model or other options.
    """
    built = float(zlib.crc32(repr(("joint reach", options, list(described))).encode()))
    # As long as the first exchange of a step, in which a rank that failed waits.
    numbers = [0.0, built, *[0.0] * (NUM_FIRST_NUMBERS - 2)]
    rows = gathered(parallel, numbers)
    raise_if_some([row[0] for row in rows])
    if len({row[1] for row in rows}) > 1:
        raise RuntimeError(
            "Expected the same model and options on every rank, to find the parameters that tasks share, but they "
            "differ, or a rank has found them before. Build model and balancer alike, and call prepare() on all ranks "
            "or on none."
        )
    present, tasks = found
    masks = [present, *tasks]
    bits = torch.tensor(
        [[mask >> task & 1 for task in range(parallel.num_tasks)] for mask in masks],
        dtype=torch.uint8,
        device=parallel.ranks.exchange_device(parallel.device),
    )
    parallel.ranks.all_reduce(bits, dist.ReduceOp.MAX)
    joint = [sum(1 << task for task, bit in enumerate(row) if bit) for row in bits.tolist()]
    return joint[0], joint[1:]
