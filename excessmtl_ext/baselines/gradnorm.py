"""GradNorm: weights that are learned so that all tasks train at similar rates (Chen et al., ICML 2018)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from excessmtl_ext.arguments import check_positive
from excessmtl_ext.balancer import Balancer
from excessmtl_ext.baselines.gradient_norms import tensor_norms
from excessmtl_ext.baselines.gramian import move_to_gradients
from excessmtl_ext.step import Batched, HeadWeighting, NonFinite, Step, WeightScale

RESTORING_FORCE = 1.5
"""The power of the relative inverse training rate: the value of Chen et al. for NYUv2 and of this comparison."""

LEAST_WEIGHT = 1e-6
"""Floor of a weight whose mean is 1: a plain gradient step can lead below zero, where a task would be unlearned."""


class GradNorm(Balancer):
    r"""Learns the weights by gradient normalisation (Chen et al., ICML 2018, https://arxiv.org/abs/1711.02257).

    Algorithm 1 there. With weights of sum T, gradient norms :math:`n_i` of the losses at the last
    shared layer, :math:`G_i = w_i n_i` with mean :math:`\bar G`, loss ratios :math:`\tilde\ell_i = \ell_i /
    \ell_i^{(0)}` and relative inverse training rates :math:`r_i = \tilde\ell_i / \text{mean}_j
    \tilde\ell_j`, one step of gradient descent on :math:`\sum_i | G_i - \bar G r_i^{1.5} |` with
    the target held constant,

    .. math:: w_i \leftarrow w_i - \eta\, n_i \operatorname{sign}(G_i - \bar G r_i^{1.5}),

    then renormalisation. A task that has improved less than the others gets a longer gradient. The
    norms are linear in the weights, so no second backward pass is needed.

    Args:
        shared_parameters: What all tasks share.
        num_tasks: T, between 1 and 512.
        robust_step_size: :math:`\eta`, learning rate of the weights. It multiplies gradient norms,
            so a good value depends on the scale of the losses.
        last_layer: Positions among the shared parameters of what counts as the last shared layer.
            None: the last tensor with two dimensions or more and what follows it (its bias); all,
            where no tensor has two.
        weight_scale: What the weights sum to after the step; within it they sum to T.
        head_weighting: See :class:`excessmtl_ext.Balancer`.
        nonfinite: See :class:`excessmtl_ext.Balancer`; looks at gradients and losses.
        batched: See :class:`excessmtl_ext.Balancer`.
        copy_gradients: See :class:`excessmtl_ext.Balancer`.

    Raises:
        ValueError: an argument is out of range.

    Differs from Algorithm 1: the new weights act in the same step and not in the next, as in every
    balancer here, and no weight falls below 1e-6 of the mean.

    The first loss of each task is its :math:`\ell^{(0)}`, kept in ``initial_losses``. Losses are
    taken to be positive; a loss ratio with a first loss of 0 or below counts as 1, a negative ratio
    as 0. Tasks that are absent, or whose gradient is zero, keep their weight and take no part in the
    means. ``accumulate`` raises
    NotImplementedError: the mean norm is known when all gradients are.

    Example, equal training rates, so that the longer gradient loses weight (w = 1 - 0.1 * 3 and 1 +
    0.1 * 1, over their sum):

        >>> import torch
        >>> balancer = GradNorm(num_tasks=2, robust_step_size=0.1)
        >>> balancer.update_weights(torch.tensor([[3.0], [1.0]]), losses=[1.0, 1.0]).tolist()  # doctest: +ELLIPSIS
        [0.388..., 0.611...]
    """

    requires = frozenset({"task_grads", "losses"})

    open_state: ClassVar[frozenset[str]] = frozenset({"initial_losses"})

    can_stream = False

    initial_losses: Tensor

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | nn.Module | None = None,
        *,
        num_tasks: int,
        robust_step_size: float = 0.025,
        last_layer: Sequence[int] | None = None,
        weight_scale: WeightScale = "simplex",
        head_weighting: HeadWeighting = "none",
        nonfinite: NonFinite = "skip",
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
            batched=batched,
            copy_gradients=copy_gradients,
        )
        self.robust_step_size = float(robust_step_size)
        self.last_layer = None if last_layer is None else tuple(last_layer)
        self.set_state(self.initial_state(self.task_weights.device))
        if self.last_layer is not None:
            num_given = len(self.shared_parameters or ()) + len(self.frozen_parameters)
            self._check_last_layer(self.last_layer, num_given or None)

    def initial_state(self, device: torch.device) -> dict[str, Tensor]:
        """Adds the first losses, which are not known yet."""
        state = super().initial_state(device)
        del state["log_task_weights"]  # nothing streams
        # NaN until a task's first step.
        state["initial_losses"] = torch.full_like(state["task_weights"], float("nan"))
        return state

    def update(self, step: Step) -> None:
        """Moves the weights by one step of gradient descent."""
        task_grads, scale = step.task_grads.tensors, step.grad_scale
        move_to_gradients(self, task_grads)
        losses = step.losses_like(self.task_weights)
        # All norms, though only those of the last layer count: a NaN anywhere must be found.
        norms = tensor_norms(task_grads, self.num_tasks, scale)
        # A task that is absent, or has no gradient because it has no labels, takes part in nothing.
        takes_part = (norms != 0).any(1)
        self.found_nonfinite.copy_(~norms.isfinite().all(1) | (~losses.isfinite() & takes_part))
        moves = ~self.found_nonfinite.any() & takes_part

        first = torch.where(self.initial_losses.isnan(), losses, self.initial_losses)
        layer_norms = torch.linalg.vector_norm(norms[:, self._layer(task_grads)], dim=1)
        before = self.task_weights * (self.num_tasks / self.weight_total)
        moved = self._moved(before, layer_norms, losses, first, takes_part)
        # They share the weight they had, so that the others keep their own.
        total, had = _sum(moved, takes_part), _sum(before, takes_part)
        moved = moved * (had / total) * (self.weight_total / self.num_tasks)
        self.task_weights.copy_(torch.where(moves, moved, self.task_weights))
        self.initial_losses.copy_(torch.where(moves, first, self.initial_losses))
        self.num_steps += moves.any()
        self.num_skipped_steps += self.found_nonfinite.any()

    def _moved(
        self, weights: Tensor, norms: Tensor, losses: Tensor, first: Tensor, takes_part: Tensor
    ) -> Tensor:
        """Weights of mean 1 after one step of gradient descent, not yet renormalised."""
        ratios = torch.where(first > 0, losses / first, 1.0).clamp(min=0.0)
        num_tasks = takes_part.sum()
        mean_ratio = _sum(ratios, takes_part) / num_tasks
        rates = torch.where(mean_ratio > 0, ratios / mean_ratio, 1.0)
        weighted_norms = weights * norms
        mean_norm = _sum(weighted_norms, takes_part) / num_tasks
        excess = weighted_norms - mean_norm * rates**RESTORING_FORCE
        return (weights - self.robust_step_size * norms * excess.sign()).clamp(min=LEAST_WEIGHT)

    def _layer(self, task_grads: list[Tensor]) -> list[int]:
        """Positions of the last shared layer."""
        num_tensors = len(task_grads) // self.num_tasks
        if self.last_layer is not None:
            self._check_last_layer(self.last_layer, num_tensors + len(self.frozen_parameters))
            frozen = self.frozen_parameters
            return [  # among those that train
                place - sum(each < place for each in frozen)
                for place in self.last_layer
                if place not in frozen
            ]
        if self.shared_parameters is not None:
            dims = [parameter.dim() for parameter in self.shared_parameters]
        else:
            dims = [
                max(grad.dim() for grad in task_grads[index::num_tensors])
                for index in range(num_tensors)
            ]
        start = max((index for index, dim in enumerate(dims) if dim >= 2), default=0)
        return list(range(start, num_tensors))

    @staticmethod
    def _check_last_layer(last_layer: tuple[int, ...], num_tensors: int | None) -> None:
        is_integer = all(isinstance(i, int) and not isinstance(i, bool) for i in last_layer)
        if (
            not last_layer
            or not is_integer
            or len(set(last_layer)) < len(last_layer)
            or min(last_layer) < 0
            or (num_tensors is not None and max(last_layer) >= num_tensors)
        ):
            among = "" if num_tensors is None else f" between 0 and {num_tensors - 1}"
            raise ValueError(
                f"Expected `last_layer` to hold distinct positions{among} of shared parameters, but got {last_layer}. "
                "Pass None for the last tensor of two dimensions or more and what follows it."
            )

    def options(self) -> dict[str, Any]:
        """See :class:`excessmtl_ext.Balancer`."""
        options = super().options()
        return {
            "num_tasks": options.pop("num_tasks"),
            "robust_step_size": self.robust_step_size,
            "last_layer": self.last_layer,
            **options,
        }


def _sum(values: Tensor, takes_part: Tensor) -> Tensor:
    """Sums over the tasks that take part."""
    return torch.where(takes_part, values, 0.0).sum()
