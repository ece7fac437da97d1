"""GroupDRO: the worst task by its loss (Sagawa et al., ICLR 2020)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from excessmtl_ext.arguments import check_positive
from excessmtl_ext.balancer import Balancer
from excessmtl_ext.step import HeadWeighting, NonFinite, Step, StreamedWeight, WeightScale


class GroupDRO(Balancer):
    r"""Weights tasks by their loss (Sagawa et al., ICLR 2020, https://arxiv.org/abs/1911.08731, Algorithm 1).

    .. math:: \alpha_i \leftarrow \alpha_i \exp(\eta_\alpha \ell_i) / Z

    then one backward pass with the new weights. The task with the largest loss gains most, also
    when noise is all its loss is.

    Args:
        shared_parameters: What all tasks share.
        num_tasks: T, between 1 and 512.
        robust_step_size: :math:`\eta_\alpha > 0`. Larger moves the weights faster.
        weight_scale: See :class:`excessmtl_ext.Balancer`.
        head_weighting: See :class:`excessmtl_ext.Balancer`.
        nonfinite: See :class:`excessmtl_ext.Balancer`; looks at the losses.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> balancer = GroupDRO(num_tasks=2, robust_step_size=1.0)
        >>> # e / (e + 1), 1 / (e + 1)
        >>> balancer.update_weights(losses=[1.0, 0.0]).tolist()  # doctest: +ELLIPSIS
        [0.731..., 0.268...]
    """

    requires: ClassVar[frozenset[str]] = frozenset({"losses"})

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | nn.Module | None = None,
        *,
        num_tasks: int,
        robust_step_size: float = 0.01,
        weight_scale: WeightScale = "simplex",
        head_weighting: HeadWeighting = "none",
        nonfinite: NonFinite = "skip",
    ) -> None:
        check_positive("robust_step_size", robust_step_size)
        super().__init__(
            shared_parameters,
            num_tasks=num_tasks,
            weight_scale=weight_scale,
            head_weighting=head_weighting,
            nonfinite=nonfinite,
        )
        self.robust_step_size = float(robust_step_size)

    def update(self, step: Step) -> None:
        """Moves the weights by the losses."""
        losses, tasks = step.losses_like(self.task_weights), step.tasks
        # A slice where all are present: an index made on the host would make a GPU wait.
        everyone = len(tasks) == self.num_tasks
        index = slice(None) if everyone else torch.tensor(tasks, device=losses.device)
        present = losses[index]
        self.found_nonfinite.zero_()
        self.found_nonfinite[index] = ~present.isfinite()
        is_finite = ~self.found_nonfinite.any()
        before = self.log_task_weights[index]
        moved = before + self.robust_step_size * present
        # Present tasks share the weight they had, so that a task without labels keeps its own.
        moved = (moved - moved.logsumexp(0)) + before.logsumexp(0)
        self.log_task_weights[index] = torch.where(is_finite, moved, before)
        self.task_weights.copy_(self.weight_total * self.log_task_weights.softmax(0))
        self.num_steps += is_finite
        self.num_skipped_steps += ~is_finite

    def stream_task(self, step: Step) -> StreamedWeight:
        """Returns the task's log-weight after its loss, not normalised."""
        (task,) = step.tasks
        loss = step.losses_like(self.log_task_weights).reshape(())
        return StreamedWeight(self.log_task_weights[task] + self.robust_step_size * loss)

    def stream_finish(self, step: Step) -> None:
        """Moves the weights by the losses of the step."""
        self.update(step)

    def options(self) -> dict[str, Any]:
        """See :class:`excessmtl_ext.Balancer`."""
        return {
            "num_tasks": self.num_tasks,
            "robust_step_size": self.robust_step_size,
            **super().options(),
        }
