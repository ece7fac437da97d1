"""Uniform weights: the plain mean of the task losses."""

from __future__ import annotations

from torch import Tensor

from excessmtl_ext.sized_sum import SizedSum
from excessmtl_ext.step import Step


class Uniform(SizedSum):
    r"""Every task weighs the same, always: :math:`\alpha_i = 1 / T`. One backward pass per step.

    Args: see :class:`SizedSum <excessmtl_ext.sized_sum.SizedSum>`.

    Example:
        >>> Uniform(num_tasks=4).task_weights.tolist()
        [0.25, 0.25, 0.25, 0.25]
    """

    requires = frozenset()

    has_uniform_weights = True

    def move(self, step: Step, unfit: Tensor | None) -> None:
        """Counts the step."""
        self.end_without_losses(unfit)

    def stream_log_weight(self, step: Step) -> Tensor:
        """Returns the log-weight that never changes."""
        (task,) = step.tasks
        return self.log_task_weights[task].clone()
