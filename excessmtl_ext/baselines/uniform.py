"""Uniform weights: the plain mean of the task losses."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from excessmtl_ext.balancer import Balancer


class Uniform(Balancer):
    r"""Every task weighs the same, always: :math:`\alpha_i = 1 / T`. One backward pass per step.

    Args: see :class:`excessmtl_ext.Balancer`.

    Example:
        >>> Uniform(num_tasks=4).task_weights.tolist()
        [0.25, 0.25, 0.25, 0.25]
    """

    requires: ClassVar[frozenset[str]] = frozenset()

    def _update(
        self,
        task_grads: list[Tensor] | None,
        losses: Tensor | None,
        tasks: list[int],
        scale: Tensor | None,
    ) -> None:
        self.num_steps += 1

    def _has_uniform_weights(self) -> bool:
        return True

    def _stream_task(
        self, task: int, grads: list[Tensor], loss: Tensor, scale: Tensor | None
    ) -> Tensor:
        return self.log_task_weights[task].clone()

    def _stream_finish(self, tasks: list[int], losses: dict[int, Tensor]) -> None:
        self.num_steps += 1
