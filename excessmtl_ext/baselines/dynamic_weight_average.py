"""Dynamic weight average: tasks whose loss falls slowly (Liu et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from excessmtl_ext.arguments import check_positive
from excessmtl_ext.baselines.loss_based import EpochLossBalancer, Rows
from excessmtl_ext.gradient_sizes import Combination
from excessmtl_ext.step import Batched, HeadWeighting, NonFinite, WeightScale


class DynamicWeightAverage(EpochLossBalancer):
    r"""Weights tasks whose loss falls slowly (DWA; Liu et al., CVPR 2019, https://arxiv.org/abs/1803.10704, Eq. 7).

    .. math:: \alpha_i \propto \exp(r_i / \tau), \qquad r_i = \bar\ell_i(e - 1) / \bar\ell_i(e - 2)

    with :math:`\bar\ell(e)` the mean loss in epoch e. The loop says where an epoch ends:
    ``balancer.end_epoch()``. Weights are uniform until two have ended.

    Args:
        shared_parameters: What all tasks share.
        num_tasks: T, between 1 and 512.
        temperature: :math:`\tau > 0`. Larger is closer to uniform; the paper has 2.
        weight_scale: See :class:`excessmtl_ext.Balancer`.
        head_weighting: See :class:`excessmtl_ext.Balancer`.
        nonfinite: See :class:`excessmtl_ext.Balancer`; looks at the losses.
        combine: See :class:`SizedSum <excessmtl_ext.sized_sum.SizedSum>`, as ``batched`` and ``copy_gradients``.

    Raises:
        ValueError: an argument is out of range.

    A task without a loss in a whole epoch keeps its latest mean, and counts as standing still until
    it has two. Mean losses below 1e-8 count as that.

    Example, with a loss that has halved and one that stands still (odds of exp(1/2 - 1)):

        >>> balancer = DynamicWeightAverage(num_tasks=2, temperature=1.0)
        >>> for losses in ([4.0, 1.0], [2.0, 1.0]):
        ...     weights = balancer.update_weights(losses=losses)
        ...     balancer.end_epoch()
        >>> balancer.update_weights(losses=[2.0, 1.0]).tolist()  # doctest: +ELLIPSIS
        [0.377..., 0.622...]
    """

    epoch_means: Tensor

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | nn.Module | None = None,
        *,
        num_tasks: int,
        temperature: float = 2.0,
        weight_scale: WeightScale = "simplex",
        head_weighting: HeadWeighting = "none",
        nonfinite: NonFinite = "skip",
        combine: Combination = "sum",
        batched: Batched = False,
        copy_gradients: bool = False,
    ) -> None:
        check_positive("temperature", temperature)
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
        self.temperature = float(temperature)
        self.set_state(self.initial_state(self.task_weights.device))

    def initial_state(self, device: torch.device) -> dict[str, Tensor]:
        """Adds the mean losses of the last two epochs, [2, T], 0 until they are known."""
        state = super().initial_state(device)
        state["epoch_means"] = torch.zeros_like(state["task_weights"]).repeat(2, 1)
        return state

    def log_weights(self, losses: Tensor, tasks: Rows) -> Tensor:
        """See :class:`LossBalancer <excessmtl_ext.baselines.loss_based.LossBalancer>`."""
        before, latest = self.epoch_means[:, tasks]
        ratio = torch.where((before > 0) & (latest > 0), latest / before, 1.0)
        two_have_ended = self.epoch_means[0].any()
        return torch.where(two_have_ended, ratio, 0.0) / self.temperature

    def _take_epoch(self, means: Tensor) -> None:
        latest = self.epoch_means[1]
        moved = torch.stack([latest, torch.where(means.isnan(), latest, means)])
        self.epoch_means.copy_(torch.where(means.isnan().all(), self.epoch_means, moved))

    def options(self) -> dict[str, Any]:
        """See :class:`excessmtl_ext.Balancer`."""
        options = super().options()
        return {
            "num_tasks": options.pop("num_tasks"),
            "temperature": self.temperature,
            **options,
        }
