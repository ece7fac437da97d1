"""One balanced step of several processes, from its first exchange to ``.grad``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from excessmtl_ext.distributed import checkpoints
from excessmtl_ext.distributed.agreement import agree
from excessmtl_ext.distributed.approximate import approximate_step, weighted_step
from excessmtl_ext.distributed.ddp import static_graph_held
from excessmtl_ext.distributed.deposit import deposit
from excessmtl_ext.distributed.dtensors import local_part
from excessmtl_ext.distributed.exact import exact_step, update_from_grads
from excessmtl_ext.distributed.fully_sharded import fully_sharded_step
from excessmtl_ext.distributed.partition import Partition
from excessmtl_ext.distributed.rank_step import RankStep, other_leaves
from excessmtl_ext.distributed.weights import update_from_own
from excessmtl_ext.engines.exact import ExactEngine
from excessmtl_ext.step import Batched, FisherRule, Step, raise_if_nonfinite


class DataParallel(Partition, ExactEngine):
    """The engine of an :class:`excessmtl_ext.ExcessMTL` that shares its steps with other ranks.

    Takes the arguments of :class:`Partition`.
    """

    stream_obstacle = (
        "accumulate() works in one process: with several ranks call backward(losses), which holds two "
        "gradients and 1 / W of the others at a time."
    )
    statistics_obstacle = (
        "record_history(gradients=True) works in one process: with several ranks no rank holds the whole "
        "gradient of a task. Weights, risks and skipped steps are recorded with gradients=False."
    )

    allows_hooks = True
    shards_state = True

    def __init__(self, *args: Any, batched: Batched = False, **kwargs: Any) -> None:
        ExactEngine.__init__(self, batched)
        Partition.__init__(self, *args, **kwargs)

    def refuse(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, rule: FisherRule, error: Exception
    ) -> None:
        """Raises ``error`` here and, at their next step, an error on the ranks that wait for this one."""
        agree(self, rule, [], None, error)

    def run(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, rule: FisherRule, step: Step
    ) -> Sequence[int]:
        """Takes one balanced step of all ranks; every rank calls it, with its own losses."""
        present = [root is not None for root in step.roots]
        agreed = agree(self, rule, present, step.num_samples)
        if not agreed.tasks:
            return []
        rank_step = RankStep(
            rule, step, agreed, other_leaves(self, step.roots), stacker=self.stacker
        )
        if self.is_sharded:
            fully_sharded_step(self, rank_step)
            return agreed.tasks
        with static_graph_held(step.roots) as at_start:
            if not step.moves_weights:
                shared_grads = weighted_step(self, rank_step)
            elif self.reduce == "grads":
                shared_grads = exact_step(self, rank_step)
            else:
                shared_grads = approximate_step(self, rank_step)
        deposit(self, rank_step, shared_grads, at_start)
        return agreed.tasks

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, rule: FisherRule, step: Step
    ) -> Sequence[int]:
        """Moves the weights from T * L gradients of this rank."""
        task_grads, num_tensors = step.task_grads.tensors, len(self.shared)
        rows = [
            task_grads[task * num_tensors : (task + 1) * num_tensors]
            for task in range(self.num_tasks)
        ]
        try:
            rule.ready_state(step)
            self._check_sizes(rows)
        except Exception as error:
            self.refuse(rule, error)
            raise
        present = [any(grad.numel() > 0 for grad in row) for row in rows]
        heads, self.heads = self.heads, self.heads or []  # no head has a part in this
        try:
            agreed = agree(self, rule, present, None)
        finally:
            self.heads = heads
        if not agreed.tasks or not step.moves_weights:
            return agreed.tasks
        with torch.no_grad():
            if self.is_sharded or self.reduce == "risks":
                flat = [local_part(grad) for grad in task_grads]
                update_from_own(self, rule, flat, agreed, step.grad_scale)
            else:
                update_from_grads(self, rule, rows, agreed, step.grad_scale)
            raise_if_nonfinite(rule)
        return agreed.tasks

    def _check_sizes(self, rows: Sequence[Sequence[Tensor]]) -> None:
        for task, row in enumerate(rows):
            for index, (grad, numel) in enumerate(zip(row, self.layout.numels, strict=True)):
                if grad.numel() not in (0, numel):
                    raise ValueError(
                        f"Expected `task_grads` of task {task}, parameter {index} to have {numel} elements, but got "
                        f"{grad.numel()}."
                    )

    def exported(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Returns the state entries of ``name`` for a checkpoint."""
        return checkpoints.exported(self, name, tensor)

    def imported(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Returns a copy of ``state_dict`` in which the sharded state is this rank's part."""
        return checkpoints.imported(self, state_dict, prefix)
