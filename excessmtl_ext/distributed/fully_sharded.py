"""``fully_shard`` parameters: gradients arrive averaged and cut, and T risks are all that is left to sum."""

from __future__ import annotations

import torch
from torch import Tensor

from excessmtl_ext import functional
from excessmtl_ext.distributed.deposit import averaged_heads
from excessmtl_ext.distributed.dtensors import is_dtensor, like_dtensor, local_part
from excessmtl_ext.distributed.partition import Partition
from excessmtl_ext.distributed.rank_step import RankStep
from excessmtl_ext.distributed.weights import update_from_own
from excessmtl_ext.passes.capture import deposit_grads
from excessmtl_ext.passes.per_task import (
    check_reached,
    run_backward,
    set_aside_grads,
    take_grads,
)
from excessmtl_ext.step import raise_if_nonfinite
from excessmtl_ext.step_arguments import moves_weights


def fully_sharded_step(parallel: Partition, step: RankStep) -> None:
    """Runs the passes, moves the weights and adds all gradients to ``.grad``."""
    rule, agreed = step.rule, step.agreed
    if rule.head_weighting == "task_weights":
        raise NotImplementedError(
            "head_weighting='task_weights' does not work with fully_shard parameters: the gradients of heads "
            "cannot be kept apart. Use 'none'."
        )
    plain_heads = [head for head in parallel.heads or [] if not is_dtensor(head)]
    moves = moves_weights(rule)
    with set_aside_grads([*parallel.shared, *plain_heads]):
        rows: list[list[Tensor | None]] = []
        last = max(task for task, root in enumerate(step.given.roots) if root is not None)
        for task, root in enumerate(step.given.roots):
            if root is None:  # on every rank
                rows.append([None] * len(parallel.shared))
                continue
            start = step.given.starts[task]
            assert start is not None
            share = agreed.shares[task]  # 0: the pass is run for the others, who take part in it
            keep = step.given.retain_graph or task != last
            run_backward([root], [start * share], retain_graph=keep)
            rows.append(take_grads(parallel.shared))
            check_reached(rows[-1], task)
        head_grads = take_grads(plain_heads)
    with torch.no_grad():
        none = torch.empty(0, device=parallel.device)
        flat = [none if grad is None else local_part(grad) for row in rows for grad in row]
        if moves:
            update_from_own(parallel, rule, flat, agreed, step.given.grad_scale)
            raise_if_nonfinite(rule)
        else:
            rule.found_nonfinite.zero_()
        outputs = [torch.zeros_like(local_part(parameter)) for parameter in parallel.shared]
        functional.weighted_sum_(
            flat,
            outputs,
            parallel.state_layout,
            rule.sum_weights() if moves else rule.pass_weights(),
            found_nonfinite=rule.found_nonfinite,
        )
        for index, parameter in enumerate(parallel.shared):
            like = next((row[index] for row in rows if row[index] is not None), None)
            if like is None:
                continue
            grad = like_dtensor(outputs[index], like)
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        by_id = dict(zip(map(id, plain_heads), head_grads, strict=True))
        averaged = averaged_heads(parallel, plain_heads, by_id)
    deposit_grads(plain_heads, averaged)
