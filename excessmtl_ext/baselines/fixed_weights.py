"""Fixed weights: chosen beforehand, the same in every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from excessmtl_ext.arguments import check_count, checked_numbers
from excessmtl_ext.balancer import Balancer
from excessmtl_ext.step import HeadWeighting, NonFinite, Step, StreamedWeight, WeightScale


class FixedWeights(Balancer):
    r"""Weights that were chosen beforehand: :math:`\alpha_i = w_i / \sum_j w_j`. One backward pass per step.

    Tuned on validation data these are what every adaptive method has to beat (Xin et al., NeurIPS
    2022, https://arxiv.org/abs/2209.11379).

    Args:
        shared_parameters: What all tasks share.
        num_tasks: T, between 1 and 512.
        weights: T positive numbers of any sum.
        weight_scale: See :class:`excessmtl_ext.Balancer`.
        head_weighting: See :class:`excessmtl_ext.Balancer`.
        nonfinite: Without effect, as in :class:`excessmtl_ext.Uniform`: a step looks at nothing.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument has the wrong type.

    Example:
        >>> FixedWeights(num_tasks=2, weights=[1, 3]).task_weights.tolist()
        [0.25, 0.75]
    """

    binding_options: ClassVar[frozenset[str]] = frozenset({"weight_scale", "weights"})

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | nn.Module | None = None,
        *,
        num_tasks: int,
        weights: Sequence[float],
        weight_scale: WeightScale = "simplex",
        head_weighting: HeadWeighting = "none",
        nonfinite: NonFinite = "skip",
    ) -> None:
        check_count("num_tasks", num_tasks, 1)
        numbers = checked_numbers("weights", weights, num_tasks)
        if not all(0.0 < number < float("inf") for number in numbers):
            raise ValueError(f"Expected `weights` > 0 and finite, but got {numbers}.")
        super().__init__(
            shared_parameters,
            num_tasks=num_tasks,
            weight_scale=weight_scale,
            head_weighting=head_weighting,
            nonfinite=nonfinite,
        )
        self.weights = tuple(numbers)
        self.set_state(self.initial_state(self.task_weights.device))

    def initial_state(self, device: torch.device) -> dict[str, Tensor]:
        """Returns the chosen weights."""
        state = super().initial_state(device)
        weights = torch.tensor(self.weights, dtype=torch.float64, device=device)
        state["task_weights"] = self.weight_total * weights / weights.sum()
        state["log_task_weights"] = weights.log() - weights.sum().log()
        return state

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

    def options(self) -> dict[str, Any]:
        """See :class:`excessmtl_ext.Balancer`."""
        options = super().options()
        return {"num_tasks": options.pop("num_tasks"), "weights": self.weights, **options}
