"""Uniform weights: the plain mean of the task losses."""

from __future__ import annotations

from typing import ClassVar

from excessmtl_ext.balancer import Balancer
from excessmtl_ext.step import Step, StreamedWeight


class Uniform(Balancer):
    r"""Every task weighs the same, always: :math:`\alpha_i = 1 / T`. One backward pass per step.

    Args: see :class:`excessmtl_ext.Balancer`.

    Example:
        >>> Uniform(num_tasks=4).task_weights.tolist()
        [0.25, 0.25, 0.25, 0.25]
    """

    requires: ClassVar[frozenset[str]] = frozenset()

    has_uniform_weights = True

    def update(self, step: Step) -> None:
        """Counts the step."""
        self.num_steps += 1

    def stream_task(self, step: Step) -> StreamedWeight:
        """Returns the log-weight that never changes."""
        (task,) = step.tasks
        return StreamedWeight(self.log_task_weights[task].clone())

    def stream_finish(self, step: Step) -> None:
        """Counts the step."""
        self.num_steps += 1
