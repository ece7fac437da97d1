"""One balanced step of several processes, from its first exchange to ``.grad``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

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
from excessmtl_ext.distributed.partition import NumSamples, Partition
from excessmtl_ext.distributed.rank_step import RankStep, other_leaves
from excessmtl_ext.distributed.weights import repair, update_from_own
from excessmtl_ext.gradients import Root

if TYPE_CHECKING:
    from excessmtl_ext.excess_mtl import ExcessMTL


class DataParallel(Partition):
    """The data-parallel half of an :class:`excessmtl_ext.ExcessMTL`: what is sent when.

    Takes the arguments of :class:`Partition`.
    """

    @contextmanager
    def reporting(self, balancer: ExcessMTL) -> Iterator[None]:
        """An error in the body is raised here and, at their next step, on the ranks that wait for this one."""
        try:
            yield
        except Exception as error:
            agree(self, balancer, [], None, error)
            raise

    def step(
        self,
        balancer: ExcessMTL,
        roots: list[Root | None],
        num_samples: NumSamples | None,
        scale: Tensor | None,
    ) -> None:
        """One balanced step of all ranks; every rank calls it, with its own losses."""
        present = [root is not None for root in roots]
        agreed = agree(self, balancer, present, num_samples)
        if not agreed.tasks:
            return
        step = RankStep(balancer, roots, agreed, scale, other_leaves(self, roots))
        if self.is_sharded:
            fully_sharded_step(self, step)
        else:
            with static_graph_held(roots) as at_start:
                if not balancer._moves_weights():
                    shared_grads = weighted_step(self, step)
                elif self.reduce == "grads":
                    shared_grads = exact_step(self, step)
                else:
                    shared_grads = approximate_step(self, step)
            deposit(self, step, shared_grads, at_start)
        balancer._num_calls += 1
        balancer._after_call()
        balancer._record_step(agreed.tasks)

    def update(
        self, balancer: ExcessMTL, task_grads: list[Tensor], scale: Tensor | None
    ) -> list[int]:
        """Moves the weights from T * L gradients of this rank; returns the tasks that took part."""
        num_tensors = len(self.shared)
        rows = [
            task_grads[task * num_tensors : (task + 1) * num_tensors]
            for task in range(self.num_tasks)
        ]
        present = [any(grad.numel() > 0 for grad in row) for row in rows]
        heads, self.heads = self.heads, self.heads or []  # no head has a part in this
        try:
            agreed = agree(self, balancer, present, None)
        finally:
            self.heads = heads
        if not agreed.tasks or not balancer._moves_weights():
            return agreed.tasks
        with torch.no_grad():
            if self.is_sharded or self.reduce == "risks":
                flat = [local_part(grad) for grad in task_grads]
                update_from_own(self, balancer, flat, agreed, scale)
                repair(self, balancer, flat, scale)
            else:
                update_from_grads(self, balancer, rows, agreed, scale)
            balancer._raise_if_nonfinite()
        return agreed.tasks

    def exported(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """State entries of ``name`` for a checkpoint."""
        return checkpoints.exported(self, name, tensor)

    def imported(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """A copy of ``state_dict`` in which the sharded state is this rank's part."""
        return checkpoints.imported(self, state_dict, prefix)
