"""Smooth Tchebycheff scalarization: a smooth maximum of the losses (Lin et al., ICML 2024)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from excessmtl_ext.arguments import check_positive
from excessmtl_ext.baselines.loss_based import SMALLEST_LOSS, EpochLossBalancer, Rows
from excessmtl_ext.gradient_sizes import Combination
from excessmtl_ext.step import Batched, HeadWeighting, NonFinite, WeightScale


class SmoothTchebycheff(EpochLossBalancer):
    r"""Descends a smooth maximum of the losses (STCH; Lin et al., ICML 2024, https://arxiv.org/abs/2402.19078).

    .. math:: \mu \log \textstyle\sum_i \exp\big(\log(\ell_i / n_i) / \mu\big), \qquad
              \alpha_i \propto \operatorname{softmax}_i\big(\log(\ell / n) / \mu\big) / \ell_i

    the objective on log-losses and the weights that its gradient has. :math:`n_i` is the mean loss
    of the first epoch, in which weights are uniform; the loop says where it ends:
    ``balancer.end_epoch()``.

    Args:
        shared_parameters: What all tasks share.
        num_tasks: T, between 1 and 512.
        smoothness: :math:`\mu > 0`. Near 0 the worst task counts alone.
        weight_scale: See :class:`excessmtl_ext.Balancer`.
        head_weighting: See :class:`excessmtl_ext.Balancer`.
        nonfinite: See :class:`excessmtl_ext.Balancer`; looks at the losses.
        combine: See :class:`SizedSum <excessmtl_ext.sized_sum.SizedSum>`, as ``batched`` and ``copy_gradients``.

    Raises:
        ValueError: an argument is out of range.

    The ideal point of the paper is 0: losses are taken to be positive, and count as 1e-8 below
    that. A task without a loss in the first epoch has its :math:`n_i` from its first epoch with one;
    until then :math:`n_i` is its loss. Differs from the paper: weights are brought to one sum.

    Example (losses at 1 and 2 times those of the first epoch: 1 / 4 and 4 / 4, over the losses):

        >>> balancer = SmoothTchebycheff(num_tasks=2, smoothness=0.5)
        >>> balancer.update_weights(losses=[4.0, 2.0]).tolist()
        [0.5, 0.5]
        >>> balancer.end_epoch()
        >>> balancer.update_weights(losses=[4.0, 4.0]).round(decimals=6).tolist()
        [0.2, 0.8]
    """

    first_mean_loss: Tensor

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | nn.Module | None = None,
        *,
        num_tasks: int,
        smoothness: float = 0.5,
        weight_scale: WeightScale = "simplex",
        head_weighting: HeadWeighting = "none",
        nonfinite: NonFinite = "skip",
        combine: Combination = "sum",
        batched: Batched = False,
        copy_gradients: bool = False,
    ) -> None:
        check_positive("smoothness", smoothness)
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
        self.smoothness = float(smoothness)
        self.set_state(self.initial_state(self.task_weights.device))

    def initial_state(self, device: torch.device) -> dict[str, Tensor]:
        """Adds the mean losses of each task's first epoch, 0 until they are known."""
        state = super().initial_state(device)
        state["first_mean_loss"] = torch.zeros_like(state["task_weights"])
        return state

    def log_weights(self, losses: Tensor, tasks: Rows) -> Tensor:
        """See :class:`LossBalancer <excessmtl_ext.baselines.loss_based.LossBalancer>`."""
        losses = losses.clamp(min=SMALLEST_LOSS)
        first = self.first_mean_loss[tasks]
        ratio = losses / torch.where(first > 0, first, losses)
        log_weights = ratio.log() / self.smoothness - losses.log()
        return torch.where(self.first_mean_loss.any(), log_weights, 0.0)

    def _take_epoch(self, means: Tensor) -> None:
        first = self.first_mean_loss
        first.copy_(torch.where((first > 0) | means.isnan(), first, means))

    def options(self) -> dict[str, Any]:
        """See :class:`excessmtl_ext.Balancer`."""
        options = super().options()
        return {
            "num_tasks": options.pop("num_tasks"),
            "smoothness": self.smoothness,
            **options,
        }
