"""Weights that follow from the losses alone: what GroupDRO, FAMO, DWA, STCH and uncertainty weights have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from excessmtl_ext.sized_sum import SizedSum
from excessmtl_ext.step import Step
from excessmtl_ext.weighting import log_shares

SMALLEST_LOSS = 1e-8
"""Losses below count as this where a method divides by them or takes their logarithm."""

ADAM = (0.9, 0.999, 1e-8)
"""Decay rates and eps of Adam: the values of Kingma & Ba, and torch's."""

Rows: TypeAlias = slice | Tensor
"""Tasks of a step, to index [T] with: a slice where all are present, as an index made on the host makes a GPU wait."""


class LossBalancer(SizedSum):
    """Base of the methods whose log-weight of a task is a function of its own loss: one backward pass per step.

    The tasks that are present share the weight that they had before the step, so that one without
    labels keeps its own: ``None``, or a loss of NaN without a gradient. No step waits for the device.
    """

    requires = frozenset({"losses"})

    @abstractmethod
    def log_weights(self, losses: Tensor, tasks: Rows) -> Tensor:
        """Returns new log-weights [k], up to one number that they share, from the losses [k] of ``tasks``."""

    def _learn(self, losses: Tensor, tasks: Rows, counts: Tensor) -> None:
        """Takes the losses [k] of ``tasks`` in where the step ``counts``, a bool [] or [k]; the weights have moved."""

    def move(self, step: Step, unfit: Tensor | None) -> None:
        """Moves the weights by the losses; a loss that is not finite changes nothing and is counted."""
        losses = step.losses_like(self.task_weights)
        everyone = len(step.tasks) == self.num_tasks
        tasks = slice(None) if everyone else torch.tensor(step.tasks, device=losses.device)
        present = losses[tasks]
        self.found_nonfinite.zero_()
        is_out = None if step.has_no_labels is None else step.has_no_labels[tasks]
        is_bad = ~present.isfinite() if is_out is None else ~(present.isfinite() | is_out)
        self.found_nonfinite[tasks] = is_bad
        if unfit is not None:
            self.found_nonfinite |= unfit
        is_finite = ~self.found_nonfinite.any()
        before = self.log_task_weights[tasks]
        moved = log_shares(self.log_weights(present, tasks), before, is_out)
        self.log_task_weights[tasks] = torch.where(is_finite, moved, before)
        self.task_weights.copy_(self.weight_total * self.log_task_weights.softmax(0))
        counts = is_finite if is_out is None else is_finite & ~is_out
        self._learn(present, tasks, counts)
        self.num_steps += counts.any()
        self.num_skipped_steps += ~is_finite

    def stream_log_weight(self, step: Step) -> Tensor:
        """Returns the task's log-weight for its loss, not normalised."""
        (task,) = step.tasks
        loss = step.losses_like(self.log_task_weights).reshape(1)
        moved = self.log_weights(loss, slice(task, task + 1))[0]
        return torch.where(loss[0].isnan(), self.log_task_weights[task], moved)


class EpochLossBalancer(LossBalancer):
    """Base of the methods that look back at the mean losses of whole epochs: the loop calls :meth:`end_epoch`."""

    epoch_loss_sum: Tensor
    num_epoch_losses: Tensor

    def initial_state(self, device: torch.device) -> dict[str, Tensor]:
        """Adds the sum and the number of the losses of the epoch under way."""
        state = super().initial_state(device)
        state["epoch_loss_sum"] = torch.zeros_like(state["task_weights"])
        state["num_epoch_losses"] = torch.zeros(self.num_tasks, dtype=torch.int64, device=device)
        return state

    @abstractmethod
    def _take_epoch(self, means: Tensor) -> None:
        """Takes the mean losses [T] of the epoch that has ended, all NaN if it had none; NaN for a task without any."""

    def _learn(self, losses: Tensor, tasks: Rows, counts: Tensor) -> None:
        self.epoch_loss_sum[tasks] += torch.where(counts, losses, 0.0)
        self.num_epoch_losses[tasks] += counts

    def end_epoch(self, mean_losses: Tensor | Sequence[float] | None = None) -> None:
        """Ends an epoch.

        Args:
            mean_losses: Mean training losses [T] of the epoch, NaN for a task without labels. None:
                the means of what the steps since the last call were given.

        Raises:
            ValueError: ``mean_losses`` is not of shape [T].
        """
        with torch.no_grad():
            if mean_losses is None:
                # 0 / 0 for a task without losses.
                means = self.epoch_loss_sum / self.num_epoch_losses
            else:
                means = torch.as_tensor(mean_losses).detach().to(self.epoch_loss_sum)
            if means.shape != (self.num_tasks,):
                raise ValueError(
                    f"Expected `mean_losses` of shape [{self.num_tasks}], one mean per task, but got "
                    f"{list(means.shape)}."
                )
            self._take_epoch(means.clamp(min=SMALLEST_LOSS))
            self.epoch_loss_sum.zero_()
            self.num_epoch_losses.zero_()


class LearnedNumbers(LossBalancer):
    """Base of the methods that learn one number per task with Adam (Kingma & Ba, ICLR 2015, Algorithm 1).

    Each task has its own count of Adam's steps, so that one that is absent rests, and one that
    begins late begins with a step of full size.
    """

    learned: Tensor
    learned_grad_mean: Tensor
    learned_sq_grad_mean: Tensor
    num_learning_steps: Tensor

    def initial_state(self, device: torch.device) -> dict[str, Tensor]:
        """Adds the numbers, 0 at first, and Adam's state."""
        state = super().initial_state(device)
        zeros = torch.zeros_like(state["task_weights"])
        for name in ("learned", "learned_grad_mean", "learned_sq_grad_mean"):
            state[name] = zeros.clone()
        state["num_learning_steps"] = torch.zeros(self.num_tasks, dtype=torch.int64, device=device)
        return state

    def _descend(
        self, grads: Tensor, tasks: Rows, counts: Tensor, learning_rate: float, decay: float = 0.0
    ) -> None:
        """Returns one step of Adam on the numbers of ``tasks``, [k] gradients, where ``counts``, [] or [k]."""
        beta, sq_beta, eps = ADAM
        before = self.learned[tasks]
        grads = grads + decay * before
        old_mean, old_sq_mean = self.learned_grad_mean[tasks], self.learned_sq_grad_mean[tasks]
        mean = torch.lerp(old_mean, grads, 1.0 - beta)
        sq_mean = sq_beta * old_sq_mean + (1.0 - sq_beta) * grads * grads
        steps = (self.num_learning_steps[tasks] + 1).to(before)
        root = sq_mean.sqrt() / (1.0 - sq_beta**steps).sqrt() + eps
        after = before - learning_rate / (1.0 - beta**steps) * mean / root
        self.learned[tasks] = torch.where(counts, after, before)
        self.learned_grad_mean[tasks] = torch.where(counts, mean, old_mean)
        self.learned_sq_grad_mean[tasks] = torch.where(counts, sq_mean, old_sq_mean)
        self.num_learning_steps[tasks] += counts
