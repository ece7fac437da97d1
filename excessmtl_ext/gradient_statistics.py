"""Norms, cosines and noise shares of the task gradients, computed on their device without waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GRADIENT_QUANTITIES = ("gradient_norm", "cosine", "noise_share")
"""What is computed from the task gradients where that is asked for, [T] each."""

GRADIENT_MEMORY = 0.98
"""Share of the running mean of the gradients that one recorded step keeps: about the latest 50 decide."""


@dataclass(frozen=True)
class RunningMean:
    """A running mean of the task gradients: m <- b m + (1 - b) g, from 0.

    Attributes:
        sq_norm: [T] |m|^2.
        num_updates: [T] how many gradients it has taken in.
        memory: b.
    """

    sq_norm: Tensor
    num_updates: Tensor
    memory: float


class GradientStatistics:
    r"""Norms, cosines and noise shares of the task gradients, on their device.

    Noise share of a task: the part of its mean squared gradient that is variance from step to step,

    .. math:: \nu = \frac{1}{1 - q} \Bigl(1 - \frac{|\bar g|^2}{\overline{|g|^2}}\Bigr), \qquad
              q = \frac{1 - b}{1 + b} \cdot \frac{1 + b^t}{1 - b^t},

    with the bias-corrected running means of g and of :math:`|g|^2`. :math:`q` is the sum of the squared weights in the
    mean of g, the share of its squared norm that pure noise keeps; without it :math:`\nu` would be too small.
    1: the gradients of different batches have nothing in common. 0: they are all equal. Clamped to [0, 1]; NaN
    before the second gradient. A gradient that turns as training goes on counts as noise as well.

    Cost of a step: the gradients are read twice; T * P elements of state for the mean, read and written, unless the
    balancer keeps one (``gradient_momentum``); 2 T^2 P operations for the T inner products with the combined gradient;
    memory for the T gradients of the largest parameter. About nine kernels per parameter and forty per step.
    """

    def __init__(self, num_tasks: int) -> None:
        self._num_tasks = num_tasks
        self._mean: list[Tensor] | None = None  # L times [T, numel]
        self._mean_sq_norm: Tensor | None = None  # [T] |m|^2 of the mean kept here
        self._num_updates: Tensor | None = None  # [T] gradients in the mean of |g|^2
        self._sq_norm_mean: Tensor | None = None  # [T] running mean of |g|^2, not bias-corrected
        self._gramian: Tensor | None = None  # [T, T] of the step under way
        self._is_present: Tensor | None = None  # [T]
        self._taken: set[int] = set()
        self._has_inner_products = False

    def take(
        self,
        task_grads: Sequence[Tensor],
        tasks: Sequence[int],
        numels: Sequence[int],
        scale: Tensor | None,
        *,
        keep_mean: bool,
    ) -> None:
        """Takes in gradients of the step under way.

        Args:
            task_grads: Gradients of ``tasks``, task-major; without elements where there is none.
            tasks: All tasks, or the one that streams in.
            numels: Sizes of the shared parameters.
            scale: What the gradients are multiplied by, or None.
            keep_mean: Keep a running mean here; False where the balancer has its own.
        """
        num_params = len(numels)
        rows = [
            list(task_grads[start : start + num_params])
            for start in range(0, len(task_grads), num_params)
        ]
        present = [any(grad.numel() > 0 for grad in row) for row in rows]
        given = [grad for row in rows for grad in row if grad.numel() > 0]
        if not given:
            return
        device = given[0].device
        wide = (
            torch.float64 if any(grad.dtype == torch.float64 for grad in given) else torch.float32
        )
        if self._taken & set(tasks):  # the step before ended in an error
            self._forget_step()
        self._place(device)
        assert self._gramian is not None and self._is_present is not None
        unscale = None if scale is None else scale.reciprocal().to(wide)

        def columns(index: int) -> Tensor:
            """Returns [rows, numel]: every task's gradient for one parameter, zeros where it has none."""
            numel = numels[index]
            grads = [
                row[index].detach().reshape(-1).to(wide)
                if row[index].numel() > 0
                else torch.zeros(numel, dtype=wide, device=device)
                for row in rows
            ]
            stacked = torch.stack(grads)
            return stacked if unscale is None else stacked * unscale

        reached = {
            index for index in range(num_params) if any(row[index].numel() > 0 for row in rows)
        }
        gramian = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
        for index in sorted(reached):
            gradients = columns(index)
            gramian += gradients @ gradients.T
        # Without a copy from the host, which would wait: fills are kernels with the value as an argument.
        is_present = torch.ones(len(rows), dtype=torch.bool, device=device)
        for row, was in enumerate(present):
            if not was:
                is_present[row].fill_(False)
        span = slice(tasks[0], tasks[0] + len(rows))
        self._gramian[span, span] = gramian
        self._is_present[span] = is_present
        self._taken.update(task for task, was in zip(tasks, present, strict=True) if was)
        self._has_inner_products = len(rows) == self._num_tasks

        sq_norms = gramian.diagonal()
        counts = is_present & sq_norms.isfinite()
        self._update_means(counts, sq_norms, span)
        if keep_mean:
            self._update_mean_gradient(columns, reached, numels, counts, span, wide)

    @property
    def has_step(self) -> bool:
        """Whether the step under way has given gradients."""
        return bool(self._taken)

    def end_step(self, task_weights: Tensor, running_mean: RunningMean | None) -> list[Tensor]:
        """Returns the norm, cosine and noise share, [T] each, of the step that ends and has given gradients.

        Args:
            task_weights: [T] those of the combined gradient, one number for all tensors.
            running_mean: The balancer's own, after this step, or None to use the one kept here.
        """
        gramian, is_present = self._gramian, self._is_present
        assert gramian is not None and is_present is not None
        nan = torch.full_like(gramian[0], float("nan"))
        norms = gramian.diagonal().sqrt()
        cosines = nan
        if self._has_inner_products:
            products = gramian @ task_weights.to(gramian)
            combined = (products @ task_weights.to(gramian)).clamp(min=0.0).sqrt()
            cosines = torch.where(is_present, products / (norms * combined), nan)
        norms = torch.where(is_present & norms.isfinite(), norms, nan)
        noise_shares = self._noise_shares(running_mean, nan)
        self._forget_step()
        return [norms, cosines, noise_shares]

    def _noise_shares(self, mean: RunningMean | None, nan: Tensor) -> Tensor:
        assert self._num_updates is not None and self._sq_norm_mean is not None
        if mean is None:
            if self._mean_sq_norm is None:
                return nan
            mean = RunningMean(self._mean_sq_norm, self._num_updates, GRADIENT_MEMORY)
        corrected = self._sq_norm_mean / (1.0 - GRADIENT_MEMORY**self._num_updates)
        decayed = mean.memory ** mean.num_updates.double()
        share_of_mean = mean.sq_norm.double() / (1.0 - decayed).square() / corrected
        leak = (1.0 - mean.memory) / (1.0 + mean.memory) * (1.0 + decayed) / (1.0 - decayed)
        shares = ((1.0 - share_of_mean) / (1.0 - leak)).clamp(0.0, 1.0)
        return torch.where((self._num_updates >= 2) & (mean.num_updates >= 2), shares, nan)

    def _update_means(self, counts: Tensor, sq_norms: Tensor, span: slice) -> None:
        assert self._num_updates is not None and self._sq_norm_mean is not None
        self._num_updates[span] += counts
        before = self._sq_norm_mean[span]
        before.lerp_(torch.where(counts, sq_norms, before), 1.0 - GRADIENT_MEMORY)
        # An absent task's mean stays: its own value was mixed in.

    def _update_mean_gradient(
        self,
        columns: Callable[[int], Tensor],
        reached: set[int],
        numels: Sequence[int],
        counts: Tensor,
        span: slice,
        wide: torch.dtype,
    ) -> None:
        if self._mean is None:
            self._mean = [
                torch.zeros(self._num_tasks, numel, dtype=wide, device=counts.device)
                for numel in numels
            ]
            self._mean_sq_norm = torch.zeros(
                self._num_tasks, dtype=torch.float64, device=counts.device
            )
        assert self._mean_sq_norm is not None
        total = torch.zeros(len(counts), dtype=torch.float64, device=counts.device)
        for index, whole in enumerate(self._mean):
            mean = whole[span]
            gradients = columns(index) if index in reached else torch.zeros_like(mean)
            mean.lerp_(torch.where(counts[:, None], gradients, mean), 1.0 - GRADIENT_MEMORY)
            total += torch.linalg.vector_norm(mean, dim=1, dtype=torch.float64).square()
        self._mean_sq_norm[span] = total

    def _place(self, device: torch.device) -> None:
        """Makes the [T] state where the gradients are; statistics begin anew on another device."""
        if self._gramian is not None and self._gramian.device == device:
            return
        wide: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self._gramian = torch.zeros(self._num_tasks, self._num_tasks, **wide)
        self._is_present = torch.zeros(self._num_tasks, dtype=torch.bool, device=device)
        self._num_updates = torch.zeros(self._num_tasks, **wide)
        self._sq_norm_mean = torch.zeros(self._num_tasks, **wide)
        self._mean = self._mean_sq_norm = None

    def _forget_step(self) -> None:
        self._taken.clear()
        if self._gramian is not None and self._is_present is not None:
            self._gramian.zero_()
            self._is_present.zero_()
