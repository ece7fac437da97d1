"""Published methods that the benchmark compares with and the package does not offer, under the package's own contract.

Each takes the losses or the gradients of a step in which every task is present. Weights sum to 1 and act on the shared
parameters; heads get the gradient of their own loss, as under every method of the benchmark.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from excessmtl_ext import functional
from excessmtl_ext.balancer import Balancer
from excessmtl_ext.baselines.gramian import GramianBalancer, Matrix, task_gramian
from excessmtl_ext.step import Step, Targets

# Losses below this count as this where a method divides by them or takes their logarithm.
SMALLEST_LOSS = 1e-8


class LossWeights(Balancer):
    """Base of the methods whose weights follow from the losses alone; one backward pass per step."""

    requires: ClassVar[frozenset[str]] = frozenset({"losses"})
    can_stream = False

    def update(self, step: Step) -> None:
        """Sets the weights; a step with a loss that is not finite changes nothing and is counted."""
        losses = step.losses_like(self.task_weights)
        self.found_nonfinite.copy_(~losses.isfinite())
        if bool(self.found_nonfinite.any()):
            self.num_skipped_steps += 1
            return
        weights = self.weights_from(losses)
        self.task_weights.copy_(self.weight_total * weights / weights.sum())
        self.num_steps += 1

    @abstractmethod
    def weights_from(self, losses: Tensor) -> Tensor:
        """Returns the weights [T] for losses [T], positive, of any sum."""


class FixedWeights(LossWeights):
    """Weights that somebody chose beforehand.

    Args:
        shared_parameters: What all tasks share.
        weights: T positive numbers.
    """

    def __init__(
        self, shared_parameters: Iterable[Tensor], *, weights: Sequence[float], **convention: Any
    ) -> None:
        if not all(weight > 0 for weight in weights):
            raise ValueError(f"Expected `weights` > 0, but got {list(weights)}.")
        super().__init__(shared_parameters, **convention)
        if len(weights) != self.num_tasks:
            raise ValueError(f"Expected {self.num_tasks} `weights`, but got {len(weights)}.")
        self._fixed = torch.tensor(weights, dtype=torch.float64)

    def weights_from(self, losses: Tensor) -> Tensor:
        return self._fixed.to(losses)


class UncertaintyWeights(LossWeights):
    r"""Weights tasks by a learned variance (Kendall et al., CVPR 2018, https://arxiv.org/abs/1705.07115).

    Adam descends :math:`\sum_i e^{-s_i} \ell_i + s_i` in :math:`s`; the weights are :math:`e^{-s_i}` over their sum.

    Args:
        shared_parameters: What all tasks share.
        learning_rate: Of Adam.
    """

    def __init__(
        self, shared_parameters: Iterable[Tensor], *, learning_rate: float = 0.01, **convention: Any
    ) -> None:
        super().__init__(shared_parameters, **convention)
        self._log_variance = torch.zeros(
            self.num_tasks, dtype=torch.float64, device=self.task_weights.device, requires_grad=True
        )
        self._optimizer = torch.optim.Adam([self._log_variance], lr=learning_rate)

    def weights_from(self, losses: Tensor) -> Tensor:
        weights = (-self._log_variance.detach()).exp()
        self._log_variance.grad = 1.0 - weights * losses
        self._optimizer.step()
        return weights


class DynamicWeightAverage(LossWeights):
    r"""Weights tasks whose loss falls slowly (Liu et al., CVPR 2019, https://arxiv.org/abs/1803.10704, Eq. 7).

    :math:`\alpha \propto \exp(r_i / \tau)` with :math:`r_i` the mean loss of the last epoch over that of the one
    before; uniform in the first two epochs.

    Args:
        shared_parameters: What all tasks share.
        temperature: :math:`\tau > 0`; the paper has 2.
    """

    def __init__(
        self, shared_parameters: Iterable[Tensor], *, temperature: float = 2.0, **convention: Any
    ) -> None:
        super().__init__(shared_parameters, **convention)
        self._temperature = temperature
        self._means: list[Tensor] = []

    def end_epoch(self, mean_losses: Tensor) -> None:
        """Takes the mean training losses [T] of the epoch that has ended."""
        self._means = [*self._means[-1:], mean_losses.clamp(min=SMALLEST_LOSS)]

    def weights_from(self, losses: Tensor) -> Tensor:
        if len(self._means) < 2:
            return torch.ones_like(losses)
        ratios = (self._means[1] / self._means[0]).to(losses)
        return (ratios / self._temperature).softmax(0)


class FAMO(LossWeights):
    r"""Weights tasks so that all losses fall at one rate (Liu et al., NeurIPS 2023, https://arxiv.org/abs/2306.03792).

    The shared gradient is that of :math:`\sum_i z_i \log \ell_i` with :math:`z` the softmax of logits; Adam moves the
    logits by how much each log-loss fell in the step (Algorithm 1).

    Args:
        shared_parameters: What all tasks share.
        learning_rate: Of the logits; the authors have 0.025.
        decay: Of the logits; the authors tune it.
    """

    def __init__(
        self,
        shared_parameters: Iterable[Tensor],
        *,
        learning_rate: float = 0.025,
        decay: float = 1e-2,
        **convention: Any,
    ) -> None:
        super().__init__(shared_parameters, **convention)
        self._logits = torch.zeros(
            self.num_tasks, dtype=torch.float64, device=self.task_weights.device, requires_grad=True
        )
        self._optimizer = torch.optim.Adam([self._logits], lr=learning_rate, weight_decay=decay)
        self._before = torch.zeros_like(self.task_weights)

    def weights_from(self, losses: Tensor) -> Tensor:
        self._before = losses.clamp(min=SMALLEST_LOSS)
        return self._logits.detach().softmax(0) / self._before

    def after_step(self, losses: Tensor) -> None:
        """Takes the losses [T] of the same batch after the optimizer's step."""
        if not bool(losses.isfinite().all()):
            return
        fallen = self._before.log() - losses.to(self._before).clamp(min=SMALLEST_LOSS).log()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(self._logits.softmax(0), self._logits, fallen)
        self._logits.grad = grad
        self._optimizer.step()


class SmoothTchebycheff(LossWeights):
    r"""Descends a smooth maximum of the losses (Lin et al., ICML 2024, https://arxiv.org/abs/2402.19078).

    :math:`\mu \log \sum_i \exp(\log(\ell_i / n_i) / \mu)` with :math:`n_i` the mean loss of the first epoch, in which
    weights are uniform; its gradient has weights softmax(:math:`\log(\ell / n) / \mu`) over :math:`\ell`.

    Args:
        shared_parameters: What all tasks share.
        smoothness: :math:`\mu > 0`; near 0 the worst task counts alone.
    """

    def __init__(
        self, shared_parameters: Iterable[Tensor], *, smoothness: float = 0.5, **convention: Any
    ) -> None:
        super().__init__(shared_parameters, **convention)
        self._smoothness = smoothness
        self._nadir: Tensor | None = None

    def end_epoch(self, mean_losses: Tensor) -> None:
        """Takes the mean training losses [T] of the first epoch."""
        if self._nadir is None:
            self._nadir = mean_losses.clamp(min=SMALLEST_LOSS)

    def weights_from(self, losses: Tensor) -> Tensor:
        if self._nadir is None:
            return torch.ones_like(losses)
        losses = losses.clamp(min=SMALLEST_LOSS)
        return ((losses / self._nadir.to(losses)).log() / self._smoothness).softmax(0) / losses


class InverseNorm(GramianBalancer):
    """Brings the shared gradients of all tasks to one norm before they are added."""

    requires: ClassVar[frozenset[str]] = frozenset({"task_grads"})

    def _solve(self, gramian: Matrix) -> Matrix | None:
        norms = np.sqrt(np.diagonal(gramian))
        if not norms.all():
            return None
        inverse = norms.min() / norms
        return inverse / inverse.sum()


class UPGrad(GramianBalancer):
    """Projects each gradient onto the cone of no conflict and averages (Quinton & Rey 2024, arXiv 2406.16232)."""

    requires: ClassVar[frozenset[str]] = frozenset({"task_grads"})

    def _solve(self, gramian: Matrix) -> Matrix | None:
        from scipy.optimize import nnls

        # The projection of gradient i is the shortest combination with weights of at least those of i alone.
        values, vectors = np.linalg.eigh(gramian / np.trace(gramian))
        root = np.sqrt(values.clip(0))[:, None] * vectors.T
        weights = np.eye(len(gramian))
        for row in weights:
            row += nnls(root, -root @ row)[0]
        total = weights.sum(0)
        return total / total.sum()


class GramianWeights(GramianBalancer):
    """Weights that a ``Weighting`` of torchjd makes from the Gramian.

    Args:
        shared_parameters: What all tasks share.
        make: Makes the weighting.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"task_grads"})

    def __init__(
        self, shared_parameters: Iterable[Tensor], *, make: Callable[[], Any], **convention: Any
    ) -> None:
        super().__init__(shared_parameters, **convention)
        self._weighting = make()

    def _solve(self, gramian: Matrix) -> Matrix | None:
        weights = self._weighting(torch.from_numpy(gramian / np.trace(gramian))).numpy()
        total = weights.sum()
        return weights / total if total > 1e-12 * np.abs(weights).sum() else None


class DualBalancing(Balancer):
    r"""Brings running means of the log-losses' gradients to the largest norm (Lin et al. 2023, "DB-MTL").

    :math:`m_i \leftarrow \beta_k m_i + (1 - \beta_k) \nabla \log \ell_i` with :math:`\beta_k = \beta / \sqrt{k}` in
    step k, and the shared gradient :math:`\sum_i \max_j \|m_j\| \, m_i / \|m_i\|` (https://arxiv.org/abs/2308.12029).

    Args:
        shared_parameters: What all tasks share.
        beta: In [0, 1).
    """

    requires: ClassVar[frozenset[str]] = frozenset({"task_grads", "losses"})
    can_stream = False

    def __init__(
        self, shared_parameters: Iterable[Tensor], *, beta: float = 0.9, **convention: Any
    ) -> None:
        super().__init__(shared_parameters, **convention)
        self._beta = beta
        self._means: list[Tensor] = []
        self._scale = 1.0

    def update(self, step: Step) -> None:
        """Moves the running means and sets the weights of them."""
        grads = step.task_grads.tensors
        losses = step.losses_like(self.task_weights)
        norms = task_gramian(grads, self.num_tasks, step.grad_scale).diagonal()
        self.found_nonfinite.copy_(~(norms.isfinite() & losses.isfinite()))
        if bool(self.found_nonfinite.any()):
            self.num_skipped_steps += 1
            return
        self.num_steps += 1
        if not self._means:
            self._means = [torch.zeros_like(grad) for grad in grads]
        beta = self._beta / float(self.num_steps) ** 0.5
        factors = ((1 - beta) / losses.clamp(min=SMALLEST_LOSS)).tolist()
        num_tensors = len(grads) // self.num_tasks
        for index, (mean, grad) in enumerate(zip(self._means, grads, strict=True)):
            mean.mul_(beta).add_(grad, alpha=factors[index // num_tensors])
        norms = task_gramian(self._means, self.num_tasks).diagonal().sqrt()
        inverse = 1.0 / norms.clamp(min=float(norms.max()) * 1e-12 + 1e-300)
        self._scale = float(norms.max() * inverse.sum()) / self.weight_total
        self.task_weights.copy_(self.weight_total * inverse / inverse.sum())

    def combine(self, step: Step, targets: Targets) -> None:
        """Writes the weighted sum of the running means."""
        is_skipped = bool(self.found_nonfinite.any())
        functional.weighted_sum_(
            step.task_grads.tensors if is_skipped else self._means,
            targets.outputs,
            step.task_grads.layout,
            self.task_weights * self._scale,
            found_nonfinite=self.found_nonfinite,
            accumulate=targets.accumulate,
        )
