"""``reduce="risks"``, and steps that only apply the weights: nothing but a weighted sum travels."""

from __future__ import annotations

import torch
from torch import Tensor

from excessmtl_ext import functional
from excessmtl_ext.distributed.agreement import agree_on_end
from excessmtl_ext.distributed.partition import Partition
from excessmtl_ext.distributed.rank_step import RankStep, check_memory, run_pass
from excessmtl_ext.distributed.weights import update_from_own
from excessmtl_ext.step import raise_if_nonfinite


def approximate_step(parallel: Partition, step: RankStep) -> list[Tensor]:
    """Runs the passes and moves the weights; returns the L shared gradients to add."""
    rule, agreed = step.rule, step.agreed
    none = torch.empty(0, dtype=parallel.wire_dtype, device=parallel.device)
    rows = {
        task: run_pass(parallel, step, task) or [None] * len(parallel.shared)
        for task in range(parallel.num_tasks)
    }
    check_memory(step, rows)
    flat = [none if grad is None else grad for row in rows.values() for grad in row]
    step.reached = agree_on_end(parallel, step)
    with torch.no_grad():
        update_from_own(parallel, rule, flat, agreed, step.given.grad_scale)
        raise_if_nonfinite(rule)
        outputs = [
            torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            for parameter in parallel.shared
        ]
        weights, shares = rule.sum_weights(), parallel.on_device(agreed.shares)
        functional.weighted_sum_(
            flat,
            outputs,
            parallel.layout,
            weights * (shares if weights.dim() == 1 else shares[:, None]),
            found_nonfinite=rule.found_nonfinite,
        )
        return parallel.averaged(outputs)


def weighted_step(parallel: Partition, step: RankStep) -> list[Tensor]:
    """Takes a step that only applies the weights: T passes, and one average of P elements."""
    rule, agreed = step.rule, step.agreed
    weights = rule.pass_weights()
    totals: list[Tensor | None] = [None] * len(parallel.shared)
    for task in agreed.tasks:
        grads = run_pass(parallel, step, task) or [None] * len(parallel.shared)
        factor = weights[task] * agreed.shares[task]
        for index, grad in enumerate(grads):
            if grad is not None:
                scaled = grad * factor.to(grad.dtype)
                total = totals[index]
                totals[index] = scaled if total is None else total.add_(scaled)
    step.reached = agree_on_end(parallel, step)
    rule.found_nonfinite.zero_()
    with torch.no_grad():
        return parallel.averaged(
            [
                torch.zeros_like(parameter) if total is None else total
                for parameter, total in zip(parallel.shared, totals, strict=True)
            ]
        )
