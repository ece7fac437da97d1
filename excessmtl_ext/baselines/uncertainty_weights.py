"""Uncertainty weights: a learned variance per task (Kendall et al., CVPR 2018)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from excessmtl_ext.arguments import check_positive
from excessmtl_ext.baselines.loss_based import LearnedNumbers, Rows
from excessmtl_ext.gradient_sizes import Combination
from excessmtl_ext.step import Batched, HeadWeighting, NonFinite, WeightScale


class UncertaintyWeights(LearnedNumbers):
    r"""Weights tasks by a learned variance (Kendall et al., CVPR 2018, https://arxiv.org/abs/1705.07115).

    Adam descends :math:`\sum_i e^{-s_i} \ell_i + s_i` in the log-variances :math:`s_i` (their Eq. 7
    up to factors of 2, with :math:`s = \log \sigma^2`), and :math:`\alpha_i \propto e^{-s_i}`. With
    losses at rest these approach :math:`1 / \ell_i`.

    Args:
        shared_parameters: What all tasks share.
        num_tasks: T, between 1 and 512.
        learning_rate: Of Adam, which moves the log-variances only.
        weight_scale: See :class:`excessmtl_ext.Balancer`.
        head_weighting: See :class:`excessmtl_ext.Balancer`.
        nonfinite: See :class:`excessmtl_ext.Balancer`; looks at the losses.
        combine: See :class:`SizedSum <excessmtl_ext.sized_sum.SizedSum>`, as ``batched`` and ``copy_gradients``.

    Raises:
        ValueError: an argument is out of range.

    Differs from Kendall et al.: weights are brought to one sum, and heads get the gradient of their
    own loss, as under every method here; the log-variances have an optimizer of their own. A step
    applies the weights from before its losses, as where they are trained with the network.

    Example, the second step (Adam's first moves every number by the learning rate, here up for the
    loss above 1 and down for the one below):

        >>> balancer = UncertaintyWeights(num_tasks=2, learning_rate=0.5)
        >>> balancer.update_weights(losses=[2.0, 0.5]).tolist()
        [0.5, 0.5]
        >>> balancer.update_weights(losses=[2.0, 0.5]).tolist()  # 1 / (1 + e)  # doctest: +ELLIPSIS
        [0.268..., 0.731...]
    """

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | nn.Module | None = None,
        *,
        num_tasks: int,
        learning_rate: float = 0.01,
        weight_scale: WeightScale = "simplex",
        head_weighting: HeadWeighting = "none",
        nonfinite: NonFinite = "skip",
        combine: Combination = "sum",
        batched: Batched = False,
        copy_gradients: bool = False,
    ) -> None:
        check_positive("learning_rate", learning_rate)
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
        self.learning_rate = float(learning_rate)
        self.set_state(self.initial_state(self.task_weights.device))

    def log_weights(self, losses: Tensor, tasks: Rows) -> Tensor:
        """See :class:`LossBalancer <excessmtl_ext.baselines.loss_based.LossBalancer>`."""
        return -self.learned[tasks]

    def _learn(self, losses: Tensor, tasks: Rows, counts: Tensor) -> None:
        grads = 1.0 - (-self.learned[tasks]).exp() * losses
        self._descend(grads, tasks, counts, self.learning_rate)

    def options(self) -> dict[str, Any]:
        """See :class:`excessmtl_ext.Balancer`."""
        options = super().options()
        return {
            "num_tasks": options.pop("num_tasks"),
            "learning_rate": self.learning_rate,
            **options,
        }
