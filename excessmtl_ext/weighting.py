"""What a weighting method defines: what its weights need, how they move, how gradients are combined with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from excessmtl_ext import functional
from excessmtl_ext.dense_order import DenseOrder
from excessmtl_ext.saved_state import StateModule
from excessmtl_ext.state import ParamLayout, init_state
from excessmtl_ext.step import Step, Targets


def log_shares(moved: Tensor, before: Tensor, is_out: Tensor | None) -> Tensor:
    """Log-weights of the tasks of a step: they share what they had, so that an absent one keeps its own.

    Args:
        moved: [k], where the step takes them, up to a common constant.
        before: [k], where they were.
        is_out: [k] bool, those of them that count as absent; None: none.
    """
    if is_out is None:
        return (moved - moved.logsumexp(0)) + before.logsumexp(0)
    never = float("-inf")
    shared = before.masked_fill(is_out, never).logsumexp(0)
    total = torch.where(is_out, never, moved).logsumexp(0)
    return torch.where(is_out, before, (moved - total) + shared)


class WeightingMethod(StateModule, ABC):
    """The part of a balancer that differs between methods; each defines :meth:`update`."""

    requires: frozenset[str] = frozenset()
    """What the weights are computed from: ``"task_grads"``, ``"losses"``, both, or nothing.

    What the loop gives besides: ``"validation_losses"`` (``observe_validation``) and
    ``"losses_after_step"`` (``after_step``).
    """

    can_stream: bool = True
    """Whether ``accumulate`` works: not where the weight of one task depends on the gradients of the others."""

    needs_features: bool = False
    """Whether ``backward`` must be given ``features``."""

    follows_order: bool = False
    """Whether the state takes the order in which the parameters lie in memory."""

    order: DenseOrder | None = None
    """In which order of a parameter's elements such a state lies; None: the contiguous one, as in ``state_dict``."""

    has_uniform_weights: bool = False
    """Whether all weights are equal, whatever happens."""

    update_every: int = 1
    """Weights move on calls 1, k + 1, 2k + 1, ..."""

    min_weight: float | tuple[float, ...] = 0.0
    """Floor of every weight, or one per task, as a share of their sum."""

    log_task_weights: Tensor
    task_weights: Tensor
    num_steps: Tensor
    num_skipped_steps: Tensor
    found_nonfinite: Tensor

    num_tasks: int
    weight_total: float
    """What the weights sum to."""

    def initial_state(self, device: torch.device) -> dict[str, Tensor]:
        """Returns every state tensor before the first step, by name; a method with more of them adds its own.

        It calls ``self.set_state(self.initial_state(device))`` at the end of its constructor.
        """
        state = init_state(
            self.num_tasks, ParamLayout([]), device=device, weight_total=self.weight_total
        )
        return {
            "log_task_weights": state.log_task_weights,
            "task_weights": state.task_weights,
            "num_steps": state.num_steps,
            "num_skipped_steps": state.num_skipped_steps,
            "found_nonfinite": state.found_nonfinite,
        }

    def follow(self, order: DenseOrder | None) -> None:
        """Brings the state into the order of the gradients to come; called where ``follows_order``."""
        self.order = order

    @abstractmethod
    def update(self, step: Step) -> None:
        """Moves the weights by one step, from ``step.task_grads`` or ``step.losses`` as the method ``requires``."""

    def end_lone_step(self, step: Step, task: int) -> None:
        """Ends a step in which one of several tasks was present; for methods that compare tasks."""

    def end_epoch(self, mean_losses: Tensor | Sequence[float] | None = None) -> None:
        """Learns that an epoch has ended: without effect but for methods that look back at epochs (DWA, STCH)."""

    def head_weights(self) -> Tensor:
        """Factors [T] of the head gradients where they are weighted."""
        return self.task_weights

    def pass_weights(self) -> Tensor:
        """Factors [T] of the task gradients in a step of one pass for all tasks."""
        return self.task_weights

    def combine(self, step: Step, targets: Targets) -> None:
        """Writes the weighted sum to ``targets``; NaN after a non-finite step."""
        grads = step.task_grads
        functional.weighted_sum_(
            grads.tensors,
            targets.outputs,
            grads.layout,
            self.task_weights,
            found_nonfinite=self.found_nonfinite,
            accumulate=targets.accumulate,
        )

    def update_and_combine(self, step: Step, targets: Targets) -> None:
        """:meth:`update`, then :meth:`combine` with the new weights; overridden where one op does both."""
        self.update(step)
        self.combine(step, targets)
