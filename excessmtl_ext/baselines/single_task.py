"""Single-task learning: one task alone, the others do not exist."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from excessmtl_ext.arguments import check_count
from excessmtl_ext.balancer import Balancer
from excessmtl_ext.extra_state import Fields
from excessmtl_ext.step import HeadWeighting, NonFinite, Step, StreamedWeight, WeightScale
from excessmtl_ext.step_arguments import check_loss


class SingleTask(Balancer):
    r"""Trains one task alone (STL): :math:`\alpha_k = 1` for ``task``, 0 for the others. One backward pass per step.

    The losses of the other tasks may be given or be None: no pass starts from them, and their heads
    receive no gradient. A batch without the task is no step.

    Args:
        shared_parameters: What all tasks share.
        num_tasks: T, between 1 and 512.
        task: Index of the task that is trained.
        weight_scale: See :class:`excessmtl_ext.Balancer`.
        head_weighting: See :class:`excessmtl_ext.Balancer`.
        nonfinite: Without effect, as in :class:`excessmtl_ext.Uniform`: the weights depend on
            nothing, so a step looks at nothing.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument has the wrong type.

    Example:
        >>> SingleTask(num_tasks=3, task=1).task_weights.tolist()
        [0.0, 1.0, 0.0]
    """

    requires = frozenset()
    open_state: ClassVar[frozenset[str]] = frozenset({"log_task_weights"})
    binding_options: ClassVar[frozenset[str]] = frozenset({"weight_scale", "task"})

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | nn.Module | None = None,
        *,
        num_tasks: int,
        task: int,
        weight_scale: WeightScale = "simplex",
        head_weighting: HeadWeighting = "none",
        nonfinite: NonFinite = "skip",
    ) -> None:
        check_count("num_tasks", num_tasks, 1)
        check_count("task", task, 0)
        if task >= num_tasks:
            raise ValueError(f"Expected `task` between 0 and {num_tasks - 1}, but got {task}.")
        super().__init__(
            shared_parameters,
            num_tasks=num_tasks,
            weight_scale=weight_scale,
            head_weighting=head_weighting,
            nonfinite=nonfinite,
        )
        self.task = task
        self._has_passed_over = False
        self.set_state(self.initial_state(self.task_weights.device))

    def initial_state(self, device: torch.device) -> dict[str, Tensor]:
        """Returns the weights that this task has alone."""
        state = super().initial_state(device)
        state["task_weights"].zero_()[self.task] = self.weight_total
        state["log_task_weights"].fill_(float("-inf"))[self.task] = 0.0
        return state

    def reset(self) -> None:
        """Forgets everything: the state is as before the first step."""
        self._has_passed_over = False
        super().reset()

    def _check_sizes(self, fields: Fields) -> None:
        super()._check_sizes(fields)
        task = round(fields.get("task", [self.task])[0])  # of version 1, which had no options
        if task != self.task:
            raise ValueError(
                f"Expected the state of a SingleTask with `task` {self.task}, but got one with {task}."
            )

    def accumulate(
        self,
        task: int,
        loss: Tensor,
        *,
        retain_graph: bool = False,
        grad_scale: Tensor | float | None = None,
    ) -> None:
        """See :meth:`excessmtl_ext.Balancer.accumulate`; the losses of other tasks are passed over."""
        if task in range(self.num_tasks) and task != self.task:
            check_loss(loss, "loss")
            self._has_passed_over = True
            return
        super().accumulate(task, loss, retain_graph=retain_graph, grad_scale=grad_scale)

    def finish(self) -> None:
        """See :meth:`excessmtl_ext.Balancer.finish`; nothing to do where only other tasks had labels."""
        has_passed_over, self._has_passed_over = self._has_passed_over, False
        if self.stream is None and has_passed_over:
            return
        super().finish()

    def begin(self, step: Step) -> None:
        """Passes over the losses of the other tasks."""
        step.keep_only(self.task)

    def update(self, step: Step) -> None:
        """Counts the step."""
        self.num_steps += 1

    def stream_task(self, step: Step) -> StreamedWeight:
        """Returns the log-weight that never changes."""
        (task,) = step.tasks
        return StreamedWeight(self.log_task_weights[task].clone())

    def stream_finish(self, step: Step) -> None:
        """Counts the step."""
        self.num_steps += step.moves_weights

    def options(self) -> dict[str, Any]:
        """See :class:`excessmtl_ext.Balancer`."""
        options = super().options()
        return {"num_tasks": options.pop("num_tasks"), "task": self.task, **options}
