"""Fixed weights: chosen beforehand, the same in every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from excessmtl_ext.arguments import check_count, checked_numbers
from excessmtl_ext.gradient_sizes import Combination
from excessmtl_ext.sized_sum import SizedSum
from excessmtl_ext.step import Batched, HeadWeighting, NonFinite, WeightScale


class FixedWeights(SizedSum):
    r"""Weights that were chosen beforehand: :math:`\alpha_i = w_i / \sum_j w_j`. One backward pass per step.

    Tuned on validation data these are what every adaptive method has to beat (Xin et al., NeurIPS
    2022, https://arxiv.org/abs/2209.11379).

    Args:
        shared_parameters: What all tasks share.
        num_tasks: T, between 1 and 512.
        weights: T positive numbers of any sum.
        weight_scale: See :class:`excessmtl_ext.Balancer`.
        head_weighting: See :class:`excessmtl_ext.Balancer`.
        nonfinite: See :class:`excessmtl_ext.Balancer`; without effect where no gradient is looked at.
        combine: See :class:`SizedSum <excessmtl_ext.sized_sum.SizedSum>`, as ``batched`` and ``copy_gradients``.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument has the wrong type.

    Example:
        >>> FixedWeights(num_tasks=2, weights=[1, 3]).task_weights.tolist()
        [0.25, 0.75]
    """

    binding_options: ClassVar[frozenset[str]] = SizedSum.binding_options | {"weights"}

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | nn.Module | None = None,
        *,
        num_tasks: int,
        weights: Sequence[float],
        weight_scale: WeightScale = "simplex",
        head_weighting: HeadWeighting = "none",
        nonfinite: NonFinite = "skip",
        combine: Combination = "sum",
        batched: Batched = False,
        copy_gradients: bool = False,
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
            combine=combine,
            batched=batched,
            copy_gradients=copy_gradients,
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

    def options(self) -> dict[str, Any]:
        """See :class:`excessmtl_ext.Balancer`."""
        options = super().options()
        return {"num_tasks": options.pop("num_tasks"), "weights": self.weights, **options}
