"""``fully_shard`` parameters: gradients arrive averaged and cut, and T risks are all that is left to sum."""

from __future__ import annotations

import torch
from torch import Tensor

from excessmtl_ext import functional, gradients
from excessmtl_ext.distributed.deposit import averaged_heads
from excessmtl_ext.distributed.dtensors import is_dtensor, like_dtensor, local_part
from excessmtl_ext.distributed.partition import Partition
from excessmtl_ext.distributed.rank_step import RankStep
from excessmtl_ext.distributed.weights import repair, update_from_own


def fully_sharded_step(parallel: Partition, step: RankStep) -> None:
    """Runs the passes, moves the weights and adds all gradients to ``.grad``."""
    balancer, agreed = step.balancer, step.agreed
    if balancer.head_weighting == "task_weights":
        raise NotImplementedError(
            "head_weighting='task_weights' does not work with fully_shard parameters: the gradients of heads "
            "cannot be kept apart. Use 'none'."
        )
    plain_heads = [head for head in parallel.heads or [] if not is_dtensor(head)]
    moves = balancer._moves_weights()
    with gradients.set_aside_grads([*parallel.shared, *plain_heads]):
        rows: list[list[Tensor | None]] = []
        last = max(task for task, root in enumerate(step.roots) if root is not None)
        for task, root in enumerate(step.roots):
            if root is None:  # on every rank
                rows.append([None] * len(parallel.shared))
                continue
            start = gradients.start_of(root, step.scale)
            share = agreed.shares[task]  # 0: the pass is run for the others, who take part in it
            gradients.run_backward([root], [start * share], retain_graph=task != last)
            rows.append(gradients.take_grads(parallel.shared))
            gradients.check_reached(rows[-1], task)
        head_grads = gradients.take_grads(plain_heads)
    with torch.no_grad():
        none = torch.empty(0, device=parallel.device)
        flat = [none if grad is None else local_part(grad) for row in rows for grad in row]
        if moves:
            update_from_own(parallel, balancer, flat, agreed, step.scale)
            repair(parallel, balancer, flat, step.scale)
            balancer._raise_if_nonfinite()
        else:
            balancer.found_nonfinite.zero_()
        outputs = [torch.zeros_like(local_part(parameter)) for parameter in parallel.shared]
        functional.weighted_sum_(
            flat,
            outputs,
            parallel.state_layout,
            balancer.task_weights,
            found_nonfinite=balancer.found_nonfinite,
        )
        for index, parameter in enumerate(parallel.shared):
            like = next((row[index] for row in rows if row[index] is not None), None)
            if like is None:
                continue
            grad = like_dtensor(outputs[index], like)
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        by_id = dict(zip(map(id, plain_heads), head_grads, strict=True))
        averaged = averaged_heads(parallel, plain_heads, by_id)
    gradients.deposit_grads(plain_heads, averaged)
