"""``reduce="grads"``: every task's gradient is averaged over the ranks before it is squared."""

from __future__ import annotations

import torch
from torch import Tensor

from excessmtl_ext import functional
from excessmtl_ext.distributed.agreement import agree_on_end
from excessmtl_ext.distributed.collectives import PendingShard
from excessmtl_ext.distributed.partition import Partition
from excessmtl_ext.distributed.rank_step import Agreement, RankStep, run_pass
from excessmtl_ext.distributed.weights import resting, update_from_parts
from excessmtl_ext.state import ParamLayout
from excessmtl_ext.step import FisherRule, raise_if_nonfinite


def exact_step(parallel: Partition, step: RankStep) -> list[Tensor]:
    """Runs the passes and moves the weights; returns the L shared gradients to add, averaged if so agreed."""
    rule, agreed = step.rule, step.agreed
    pending: dict[int, PendingShard] = {}
    local: dict[int, Tensor] = {}
    previous: list[PendingShard] = []
    for task in agreed.tasks:
        packed = parallel.packed(run_pass(parallel, step, task), agreed.shares[task])
        if not agreed.averages_shared:
            local[task] = packed
        # Runs while the next task's pass does; two buffers of P are in flight at most.
        pending[task] = parallel.ranks.reduce_scatter(packed)
        previous.append(pending[task])
        if len(previous) > 1:
            previous.pop(0).wait()
    step.reached = agree_on_end(parallel, step)
    unscale = _times_size(parallel, step.given.grad_scale)
    with torch.no_grad(), resting(parallel, rule):
        parts = _parts(parallel, pending)
        update_from_parts(parallel, rule, parts, agreed, unscale)
        if rule.nonfinite == "raise":
            raise_if_nonfinite(rule)
        if not agreed.averages_shared:
            return _combined_here(parallel, rule, local)
        own = torch.zeros(parallel.shard_numel, dtype=parallel.grad_dtype, device=parallel.device)
        state = rule.step_state
        weights = rule.sum_weights()
        if weights.dim() == 2:
            first, sizes = parallel.own_pieces
            functional.weighted_sum_(
                parallel.cut(parts),
                parallel.cut([own]),
                ParamLayout(sizes),
                weights[:, first : first + len(sizes)] / parallel.ranks.size,
                found_nonfinite=state.found_nonfinite,
            )
            return parallel.unpacked(parallel.ranks.all_gather(own))
        state = state._replace(task_weights=state.task_weights / parallel.ranks.size)
        functional.combine_(parts, [own], parallel.state_layout, state, rule.step_options, unscale)
        return parallel.unpacked(parallel.ranks.all_gather(own))


def update_from_grads(
    parallel: Partition,
    rule: FisherRule,
    rows: list[list[Tensor]],
    agreed: Agreement,
    scale: Tensor | None,
) -> None:
    """Moves the weights from this rank's own gradients, T lists of L."""
    pending = {}
    for task in agreed.tasks:
        row = [grad if grad.numel() > 0 else None for grad in rows[task]]
        pending[task] = parallel.ranks.reduce_scatter(parallel.packed(row, agreed.shares[task]))
    parts = _parts(parallel, pending)
    unscale = _times_size(parallel, scale)
    with resting(parallel, rule):
        update_from_parts(parallel, rule, parts, agreed, unscale)


def _parts(parallel: Partition, pending: dict[int, PendingShard]) -> list[Tensor]:
    """Returns the own coordinates of every task's summed gradient; empty for absent tasks."""
    none = torch.empty(0, dtype=parallel.wire_dtype, device=parallel.device)
    return [pending[task].wait() if task in pending else none for task in range(parallel.num_tasks)]


def _times_size(parallel: Partition, scale: Tensor | None) -> Tensor:
    """Returns what the sum over the ranks is divided by, inside the kernel, to be the unscaled mean."""
    if scale is None:
        return torch.full((), float(parallel.ranks.size), device=parallel.device)
    return scale * parallel.ranks.size


def _combined_here(parallel: Partition, rule: FisherRule, local: dict[int, Tensor]) -> list[Tensor]:
    """This rank's own weighted sum, for DistributedDataParallel to average."""
    none = torch.empty(0, dtype=parallel.wire_dtype, device=parallel.device)
    total = torch.zeros_like(next(iter(local.values())), dtype=parallel.grad_dtype)
    rows = [local.get(task, none) for task in range(parallel.num_tasks)]
    outputs, layout, weights = [total], ParamLayout([total.numel()]), rule.sum_weights()
    if weights.dim() == 2:
        layout, numels = parallel.layout, list(parallel.layout.numels)
        cut = [
            row[: layout.num_params].split(numels) if row.numel() > 0 else [row] * len(numels)
            for row in [*rows, total]
        ]
        rows = [piece for row in cut[:-1] for piece in row]
        outputs = list(cut[-1])
    functional.weighted_sum_(rows, outputs, layout, weights, found_nonfinite=rule.found_nonfinite)
    return parallel.unpacked(total)
