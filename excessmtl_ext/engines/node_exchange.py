"""What ranks exchange in the backward pass of ``split``: one all-reduce of the adapters' gradients.

It happens inside the node, whose place among the collectives of DistributedDataParallel or
``fully_shard`` is given by the graph and so the same on every rank: the gradients of what lies above
are there before it, those of what lies below come after it.

Gradients are averaged over the ranks, as both of these do. A rank without a task counts as one
whose gradient is zero, as it does there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from excessmtl_ext.state import ParamLayout


def group_of(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Returns the ranks that step together: those given, else all of them; None where there is one only."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = process_group if process_group is not None else dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def joined_over_ranks(
    rows: list[list[Tensor | None]],
    tasks: Sequence[int],
    layout: ParamLayout,
    group: dist.ProcessGroup | None,
) -> tuple[list[list[Tensor | None]], list[int]]:
    """Returns the gradients of the joined batch, and the tasks that some rank has.

    Args:
        rows: T rows of K gradients of this rank; None where there is none.
        tasks: The tasks of this rank.
        layout: Sizes of the K gradients.
        group: The ranks, or None for this one alone.
    """
    if group is None:
        return rows, list(tasks)
    num_tasks, numels = len(rows), list(layout.numels)
    like = next(grad for row in rows for grad in row if grad is not None)
    wire = like.new_zeros(num_tasks, sum(numels) + 1)
    for task, row in enumerate(rows):
        pieces = wire[task, :-1].split(numels)
        for piece, grad in zip(pieces, row, strict=True):
            if grad is not None:
                piece.copy_(grad.reshape(-1))
        wire[task, -1].fill_(float(task in tasks))
    dist.all_reduce(wire, group=group)
    wire /= dist.get_world_size(group)
    joined = list(tasks)
    if len(joined) < num_tasks:  # else nobody has a task that is missing here
        joined = [task for task, share in enumerate(wire[:, -1].tolist()) if share > 0]
    present = set(joined)
    return [
        list(wire[task, :-1].split(numels)) if task in present else [None] * len(numels)
        for task in range(num_tasks)
    ], joined
