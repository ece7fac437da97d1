"""FAMO: weights under which all losses fall at one rate (Liu et al., NeurIPS 2023)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from excessmtl_ext.arguments import check_positive, stacklevel_of_caller
from excessmtl_ext.baselines.loss_based import SMALLEST_LOSS, LearnedNumbers, Rows
from excessmtl_ext.gradient_sizes import Combination
from excessmtl_ext.step import Batched, HeadWeighting, NonFinite, Step, WeightScale
from excessmtl_ext.step_arguments import loss_values

PATIENCE = 10
"""Steps in a row without :meth:`FAMO.after_step` until it warns."""


class FAMO(LearnedNumbers):
    r"""Weights tasks so that all losses fall at one rate (Liu et al., NeurIPS 2023, https://arxiv.org/abs/2306.03792).

    Algorithm 1 there. The shared gradient is that of :math:`\sum_i z_i \log \ell_i` with :math:`z =
    \operatorname{softmax}(w)`, so :math:`\alpha_i \propto z_i / \ell_i`; Adam moves the logits
    :math:`w` against the gradient of :math:`\sum_i z_i (\log \ell_i - \log \ell_i')`, with
    :math:`\ell'` the losses of the same batch after the optimizer's step::

        balancer.backward(losses)
        optimizer.step()
        with torch.no_grad():
            balancer.after_step(compute_losses(batch))  # one more forward pass

    Args:
        shared_parameters: What all tasks share.
        num_tasks: T, between 1 and 512.
        learning_rate: Of the logits; the authors have 0.025.
        decay: Pulls the logits to 0, :math:`\gamma` there; the authors tune it. 0 for none.
        weight_scale: See :class:`excessmtl_ext.Balancer`.
        head_weighting: See :class:`excessmtl_ext.Balancer`.
        nonfinite: See :class:`excessmtl_ext.Balancer`; looks at the losses.
        combine: See :class:`SizedSum <excessmtl_ext.sized_sum.SizedSum>`, as ``batched`` and ``copy_gradients``.

    Raises:
        ValueError: an argument is out of range.

    Warns:
        UserWarning: once, after ten steps in a row without :meth:`after_step`: the logits rest.

    The least possible loss of every task is taken to be 0; losses below 1e-8 count as that. Absent
    tasks keep weight and logit. The authors' code also clips the norm of the shared gradient at 1,
    which is left to the loop.

    Example (z is uniform, so weights are 1 and 1/4 over their sum):

        >>> FAMO(num_tasks=2).update_weights(losses=[1.0, 4.0]).round(decimals=6).tolist()
        [0.8, 0.2]
    """

    requires = frozenset({"losses", "losses_after_step"})

    losses_before: Tensor

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | nn.Module | None = None,
        *,
        num_tasks: int,
        learning_rate: float = 0.025,
        decay: float = 1e-2,
        weight_scale: WeightScale = "simplex",
        head_weighting: HeadWeighting = "none",
        nonfinite: NonFinite = "skip",
        combine: Combination = "sum",
        batched: Batched = False,
        copy_gradients: bool = False,
    ) -> None:
        check_positive("learning_rate", learning_rate)
        if isinstance(decay, bool) or not isinstance(decay, int | float):
            raise TypeError(f"Expected `decay` to be a number, but got {type(decay).__name__}.")
        if not 0.0 <= decay < math.inf:
            raise ValueError(f"Expected `decay` >= 0 and finite, but got {decay}.")
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
        self.decay = float(decay)
        self._num_waiting = 0
        self.set_state(self.initial_state(self.task_weights.device))

    def initial_state(self, device: torch.device) -> dict[str, Tensor]:
        """Adds the losses of the step that :meth:`after_step` is to follow, 0 where there are none."""
        state = super().initial_state(device)
        state["losses_before"] = torch.zeros_like(state["task_weights"])
        return state

    def reset(self) -> None:
        """Forgets everything: the state is as before the first step."""
        self._num_waiting = 0
        super().reset()

    def log_weights(self, losses: Tensor, tasks: Rows) -> Tensor:
        """See :class:`LossBalancer <excessmtl_ext.baselines.loss_based.LossBalancer>`."""
        return self.learned[tasks] - losses.clamp(min=SMALLEST_LOSS).log()

    def _learn(self, losses: Tensor, tasks: Rows, counts: Tensor) -> None:
        latest = torch.zeros_like(self.losses_before)
        latest[tasks] = torch.where(counts, losses.clamp(min=SMALLEST_LOSS), 0.0)
        self.losses_before.copy_(torch.where(counts.any(), latest, self.losses_before))

    def move(self, step: Step, unfit: Tensor | None) -> None:
        """See :class:`LossBalancer <excessmtl_ext.baselines.loss_based.LossBalancer>`."""
        super().move(step, unfit)
        self._num_waiting += 1
        if self._num_waiting == PATIENCE:
            warnings.warn(
                f"FAMO had {PATIENCE} steps without after_step(losses): its logits rest, so that it weighs tasks by "
                "1 / loss. Call balancer.after_step() with the losses of the same batch after optimizer.step().",
                stacklevel=stacklevel_of_caller(),
            )

    def after_step(self, losses: Tensor | Sequence[Tensor | float | None]) -> None:
        """Moves the logits, once per step and after the optimizer's.

        Does nothing after a skipped step, or where one of the losses is not finite.

        Args:
            losses: T losses of the step's batch under the new parameters; those of absent tasks may be None.

        Raises:
            ValueError: the number of losses is not T.
        """
        if len(losses) != self.num_tasks:
            raise ValueError(
                f"Expected `losses` to hold {self.num_tasks} losses, one per task, but got {len(losses)}."
            )
        self._num_waiting = 0
        with torch.no_grad():
            if not isinstance(losses, Tensor):
                losses = [
                    torch.tensor(loss) if isinstance(loss, int | float) else loss for loss in losses
                ]
            now = loss_values(losses, self.task_weights)
            is_present = self.losses_before > 0
            counts = is_present.any() & ~self.found_nonfinite.any()
            counts = counts & (now.isfinite() | ~is_present).all()
            fallen = self.losses_before.log() - now.clamp(min=SMALLEST_LOSS).log()
            fallen = torch.where(is_present & counts, fallen, 0.0)
            share = torch.where(is_present, self.learned, float("-inf")).softmax(0)
            grads = share * (fallen - (share * fallen).sum())
            self._descend(
                grads, slice(None), counts & is_present, self.learning_rate, decay=self.decay
            )
            self.losses_before.copy_(torch.where(counts, 0.0, self.losses_before))

    def options(self) -> dict[str, Any]:
        """See :class:`excessmtl_ext.Balancer`."""
        options = super().options()
        return {
            "num_tasks": options.pop("num_tasks"),
            "learning_rate": self.learning_rate,
            "decay": self.decay,
            **options,
        }
