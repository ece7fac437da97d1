"""GroupDRO: the worst task by its loss (Sagawa et al., ICLR 2020)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from excessmtl_ext.arguments import check_positive
from excessmtl_ext.baselines.loss_based import LossBalancer, Rows
from excessmtl_ext.gradient_sizes import Combination
from excessmtl_ext.step import Batched, HeadWeighting, NonFinite, WeightScale


class GroupDRO(LossBalancer):
    r"""Weights tasks by their loss (Sagawa et al., ICLR 2020, https://arxiv.org/abs/1911.08731, Algorithm 1).

    .. math:: \alpha_i \leftarrow \alpha_i \exp(\eta_\alpha \ell_i) / Z

    then one backward pass with the new weights. The task with the largest loss gains most, also
    when noise is all its loss is. One whose loss is NaN and has no gradient (no label in the batch)
    counts as absent.

    Args:
        shared_parameters: What all tasks share.
        num_tasks: T, between 1 and 512.
        robust_step_size: :math:`\eta_\alpha > 0`. Larger moves the weights faster.
        weight_scale: See :class:`excessmtl_ext.Balancer`.
        head_weighting: See :class:`excessmtl_ext.Balancer`.
        nonfinite: See :class:`excessmtl_ext.Balancer`; looks at the losses.
        combine: See :class:`SizedSum <excessmtl_ext.sized_sum.SizedSum>`, as ``batched`` and ``copy_gradients``.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> balancer = GroupDRO(num_tasks=2, robust_step_size=1.0)
        >>> # e / (e + 1), 1 / (e + 1)
        >>> balancer.update_weights(losses=[1.0, 0.0]).tolist()  # doctest: +ELLIPSIS
        [0.731..., 0.268...]
    """

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | nn.Module | None = None,
        *,
        num_tasks: int,
        robust_step_size: float = 0.01,
        weight_scale: WeightScale = "simplex",
        head_weighting: HeadWeighting = "none",
        nonfinite: NonFinite = "skip",
        combine: Combination = "sum",
        batched: Batched = False,
        copy_gradients: bool = False,
    ) -> None:
        check_positive("robust_step_size", robust_step_size)
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
        self.robust_step_size = float(robust_step_size)

    def log_weights(self, losses: Tensor, tasks: Rows) -> Tensor:
        """See :class:`LossBalancer <excessmtl_ext.baselines.loss_based.LossBalancer>`."""
        return self.log_task_weights[tasks] + self.robust_step_size * losses

    def options(self) -> dict[str, Any]:
        """See :class:`excessmtl_ext.Balancer`."""
        return {
            "num_tasks": self.num_tasks,
            "robust_step_size": self.robust_step_size,
            **super().options(),
        }
