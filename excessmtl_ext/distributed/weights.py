"""From gradients to risks and weights: the only place where ranks share a number that the state depends on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from excessmtl_ext import functional
from excessmtl_ext.distributed.partition import Partition
from excessmtl_ext.distributed.rank_step import Agreement
from excessmtl_ext.gradient_sizes import sums_of_squares
from excessmtl_ext.step import FisherRule


@contextmanager
def resting(parallel: Partition, rule: FisherRule) -> Iterator[None]:
    """Sets the momentum of frozen parameters to 0 within, so that they add nothing to a risk, and puts it back."""
    momentum = rule.step_state.grad_mean
    frozen = parallel.own_frozen if momentum.shape[1] > 0 else []
    kept = [momentum[:, part].clone() for part in frozen]
    for part in frozen:
        momentum[:, part] = 0.0
    try:
        yield
    finally:
        for part, before in zip(frozen, kept, strict=True):
            momentum[:, part] = before


def update_from_own(
    parallel: Partition,
    rule: FisherRule,
    flat: list[Tensor],
    agreed: Agreement,
    scale: Tensor | None,
) -> None:
    """Risks of the rank's own gradients: averaged, or summed where each rank has a part of one gradient."""
    sums = _own_risk_sums(parallel, rule, flat, scale)
    squares = None
    if not rule.has_plain_step:
        squares = sums_of_squares(flat, len(parallel.shared), scale)
    if not parallel.is_sharded:
        factors = parallel.on_device(agreed.shares) / parallel.ranks.size
        sums *= factors
        squares = None if squares is None else squares * factors[:, None]
    _update_weights(parallel, rule, sums, squares, agreed)


def update_from_parts(
    parallel: Partition,
    rule: FisherRule,
    parts: list[Tensor],
    agreed: Agreement,
    unscale: Tensor,
) -> None:
    sums = _own_risk_sums(parallel, rule, parts, unscale)
    squares = None
    if not rule.has_plain_step:
        squares = torch.zeros(
            parallel.num_tasks, len(parallel.shared), dtype=torch.float64, device=parallel.device
        )
        first, sizes = parallel.own_pieces
        if sizes:
            pieces = parallel.cut(parts)
            squares[:, first : first + len(sizes)] = sums_of_squares(pieces, len(sizes), unscale)
    _update_weights(parallel, rule, sums, squares, agreed)


def _own_risk_sums(
    parallel: Partition, rule: FisherRule, flat: list[Tensor], scale: Tensor | None
) -> Tensor:
    state = rule.step_state
    sums = torch.zeros_like(state.excess_risk)
    own = functional.find_nonfinite(flat, parallel.num_tasks, state.sq_grad_sum.dtype, scale)
    # No rank writes its rows before all know that the step counts.
    flags = own.to(sums)
    parallel.ranks.all_reduce(flags)
    functional.accumulate_excess_risk_(
        flat,
        parallel.state_layout,
        state.sq_grad_sum,
        state.grad_mean,
        sums,
        state.ticket,
        rule.step_options,
        scale,
        known_nonfinite=flags > 0,
    )
    return sums


def _update_weights(
    parallel: Partition, rule: FisherRule, sums: Tensor, squares: Tensor | None, agreed: Agreement
) -> None:
    """Moves the weights: from here on every rank computes the same from the same bits."""
    if squares is None:
        parallel.ranks.all_reduce(sums)
    else:
        both = torch.cat([sums[:, None], squares], dim=1)
        parallel.ranks.all_reduce(both)
        sums, squares = both[:, 0].contiguous(), both[:, 1:].contiguous()
    rule.commit(sums, squares, agreed.tasks)
