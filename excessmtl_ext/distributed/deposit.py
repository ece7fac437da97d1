"""How a step's gradients get into ``.grad``: in one pass of the engine, heads averaged on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from excessmtl_ext.distributed.ddp import expected_by_ddp
from excessmtl_ext.distributed.partition import Partition
from excessmtl_ext.distributed.rank_step import RankStep
from excessmtl_ext.passes.capture import deposit_grads


def deposit(
    parallel: Partition, step: RankStep, shared_grads: list[Tensor], at_start: Callable[[], None]
) -> None:
    """Adds every gradient in one pass, as the hooks of DistributedDataParallel expect it."""
    sums = _head_sums(step)
    heads = step.heads
    if parallel.heads is not None and parallel.ddp is None:
        heads = parallel.heads
        averaged = averaged_heads(parallel, heads, sums)
        sums = dict(zip(map(id, heads), averaged, strict=True))
    parameters = {id(parameter): parameter for parameter in (*parallel.shared, *heads)}
    for parameter in expected_by_ddp(parallel.ddp, step.given.roots):
        parameters.setdefault(id(parameter), parameter)
    sums.update(zip(map(id, parallel.shared), shared_grads, strict=True))
    grads = [sums.get(key) if key in step.reached else None for key in parameters]
    averaged_grads = parallel.averaged_grads if step.agreed.averages_shared else None
    with averaged_grads.known(parallel.shared) if averaged_grads else nullcontext():
        deposit_grads(list(parameters.values()), grads, at_start=at_start)


def _head_sums(step: RankStep) -> dict[int, Tensor | None]:
    """This rank's gradient of every head by id, times its share of the task's samples."""
    sums: dict[int, Tensor | None] = {}
    with torch.no_grad():
        for task, grads in step.head_grads.items():
            factor: Tensor | float = step.agreed.shares[task]
            if step.rule.head_weighting == "task_weights":
                factor = factor * step.rule.head_weights()[task]
            for head, grad in zip(step.heads, grads, strict=True):
                if grad is None:
                    continue
                if isinstance(factor, Tensor):
                    grad = grad * factor.to(grad.dtype)
                elif factor != 1.0:
                    grad = grad * factor
                before = sums.get(id(head))
                sums[id(head)] = grad if before is None else before + grad
    return sums


def averaged_heads(
    parallel: Partition, heads: Sequence[Tensor], grads: dict[int, Tensor | None]
) -> list[Tensor | None]:
    """Returns the mean over the ranks of the heads' gradients, zero on a rank without; one all-reduce per dtype."""
    averaged: dict[int, Tensor] = {}
    for dtype in sorted({head.dtype for head in heads}, key=str):
        members = [head for head in heads if head.dtype == dtype]
        wire = torch.float64 if dtype == torch.float64 else torch.float32
        flat = torch.cat(
            [
                torch.zeros(head.numel(), dtype=wire, device=head.device)
                if grads.get(id(head)) is None
                else grads[id(head)].reshape(-1).to(wire)  # type: ignore[union-attr]
                for head in members
            ]
        )
        parallel.ranks.all_reduce(flat)
        pieces = flat.div_(parallel.ranks.size).split([head.numel() for head in members])
        for head, piece in zip(members, pieces, strict=True):
            averaged[id(head)] = piece.view(head.shape).to(dtype)
    return [averaged[id(head)] for head in heads]
