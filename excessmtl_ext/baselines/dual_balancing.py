"""DB-MTL: running means of the log-losses' gradients, brought to the largest norm (Lin et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from excessmtl_ext import functional
from excessmtl_ext.balancer import Balancer
from excessmtl_ext.baselines.gradient_norms import tensor_norms
from excessmtl_ext.baselines.gramian import move_to_gradients
from excessmtl_ext.baselines.inverse_norm import share_mass, share_of
from excessmtl_ext.baselines.loss_based import SMALLEST_LOSS
from excessmtl_ext.state import ParamLayout
from excessmtl_ext.step import Batched, HeadWeighting, NonFinite, Step, Targets, WeightScale


class DualBalancing(Balancer):
    r"""Balances losses and gradients (DB-MTL; Lin et al. 2023, https://arxiv.org/abs/2308.12029, Algorithm 1).

    .. math:: m_i \leftarrow \beta_k m_i + (1 - \beta_k) \nabla \log \ell_i, \quad \beta_k = \beta / \sqrt{k},
              \qquad \text{shared gradient } \textstyle\sum_i \max_j \|m_j\| \; m_i / \|m_i\|

    in a task's step k. ``task_weights`` are :math:`1 / \|m_i\|` over their sum.

    Args:
        shared_parameters: What all tasks share.
        num_tasks: T, between 1 and 512.
        beta: :math:`\beta` in [0, 1). The paper tunes it.
        weight_scale: See :class:`excessmtl_ext.Balancer`. The size of the shared gradient is that above all the same.
        head_weighting: See :class:`excessmtl_ext.Balancer`.
        nonfinite: See :class:`excessmtl_ext.Balancer`; looks at gradients and losses.
        batched: See :class:`excessmtl_ext.Balancer`.
        copy_gradients: See :class:`excessmtl_ext.Balancer`.

    Raises:
        ValueError: an argument is out of range, or the gradients change shape between steps.

    Losses are taken to be positive; below 1e-8 they count as that. Absent tasks, and those whose
    gradient is zero, keep mean and weight and take no part in the sum. Heads get the gradient of
    their own loss, not of its logarithm. ``accumulate`` raises NotImplementedError.

    Memory: T * P state elements in float32 (float64 for float64 gradients), each parameter padded to
    a multiple of 32, and as much again while a step moves them. Costs one wait for the device per step.

    Example, the first step (beta 1/2; the means are half of (2, 0) / 4 and of (0, 3) / 2):

        >>> import torch
        >>> balancer = DualBalancing(num_tasks=2, beta=0.5)
        >>> balancer.update_weights(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), losses=[4.0, 2.0]).tolist()
        [0.75, 0.25]
    """

    requires = frozenset({"task_grads", "losses"})

    can_stream = False

    grad_mean: Tensor
    num_task_steps: Tensor

    _factors: Tensor | None = None
    """[T], what the means are multiplied by in the sum of the step under way."""

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | nn.Module | None = None,
        *,
        num_tasks: int,
        beta: float = 0.9,
        weight_scale: WeightScale = "simplex",
        head_weighting: HeadWeighting = "none",
        nonfinite: NonFinite = "skip",
        batched: Batched = False,
        copy_gradients: bool = False,
    ) -> None:
        if isinstance(beta, bool) or not isinstance(beta, int | float):
            raise TypeError(f"Expected `beta` to be a number, but got {type(beta).__name__}.")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Expected `beta` in [0, 1), but got {beta}.")
        super().__init__(
            shared_parameters,
            num_tasks=num_tasks,
            weight_scale=weight_scale,
            head_weighting=head_weighting,
            nonfinite=nonfinite,
            batched=batched,
            copy_gradients=copy_gradients,
        )
        self.beta = float(beta)
        self.set_state(self.initial_state(self.task_weights.device))

    def initial_state(self, device: torch.device) -> dict[str, Tensor]:
        """Adds the means [T, padded P], without columns until the parameters are known, and each task's steps."""
        state = super().initial_state(device)
        has_float64 = any(each.dtype is torch.float64 for each in self.shared_parameters or ())
        state["grad_mean"] = torch.zeros(
            self.num_tasks,
            (self.layout or ParamLayout([])).padded_numel,
            dtype=torch.float64 if has_float64 else torch.float32,
            device=device,
        )
        state["num_task_steps"] = torch.zeros(self.num_tasks, dtype=torch.int64, device=device)
        return state

    def update(self, step: Step) -> None:
        """Moves the running means and sets the weights of them."""
        grads = step.task_grads
        move_to_gradients(self, grads.tensors)
        self._size_state(step)
        losses = step.losses_like(self.task_weights)
        norms = tensor_norms(grads.tensors, self.num_tasks, step.grad_scale)
        norms = torch.linalg.vector_norm(norms, dim=1)
        is_here = torch.zeros(self.num_tasks, dtype=torch.bool)
        is_here[step.tasks] = True
        is_here = is_here.to(norms.device)
        has_grad = is_here & (norms > 0)
        self.found_nonfinite.copy_(~norms.isfinite() | (has_grad & ~losses.isfinite()))
        scale = norms.new_ones(()) if step.grad_scale is None else step.grad_scale.to(norms)
        factors = 1.0 / (losses.clamp(min=SMALLEST_LOSS) * scale)
        steps = self.num_task_steps + has_grad
        on_host = torch.stack(
            [self.found_nonfinite.double(), has_grad.double(), steps.double(), factors]
        ).tolist()
        if any(on_host[0]):
            self.num_skipped_steps += 1
            return
        # One assignment, so that Ctrl-C leaves the means as before or after the step.
        moved = torch.empty_like(self.grad_mean)
        for task, (moves, count, factor) in enumerate(zip(*on_host[1:], strict=True)):
            if moves:
                self._move(step, task, self.beta / count**0.5, factor, moved[task])
            else:
                moved[task] = self.grad_mean[task]
        self.put_back({"grad_mean": moved})
        self.num_steps += 1
        self.num_task_steps.copy_(steps)
        means = tensor_norms(self._rows(), self.num_tasks)
        self._set_weights(torch.linalg.vector_norm(means, dim=1), has_grad, scale)

    def _move(self, step: Step, task: int, beta: float, factor: float, moved: Tensor) -> None:
        """Writes a task's running mean after its gradient, times ``factor``, to ``moved`` [padded P]."""
        torch.mul(self.grad_mean[task], beta, out=moved)
        grads = step.task_grads
        num = len(grads.layout.numels)
        own = grads.tensors[task * num : (task + 1) * num]
        for mean, grad in zip(grads.layout.views(moved), own, strict=True):
            if grad.numel() > 0:
                mean.add_(grad.reshape(-1), alpha=(1.0 - beta) * factor)

    def _set_weights(self, norms: Tensor, has_grad: Tensor, scale: Tensor) -> None:
        """Sets weights and factors from the norms [T] of the means; ``scale`` is that of the gradients."""
        # A mean may be zero where the gradients of two steps cancel: it adds nothing to the sum.
        counts = has_grad & (norms > 0)
        before = self.log_task_weights
        moved = share_of(counts, -norms.log()) + share_mass(counts, before)
        before.copy_(torch.where(counts, moved, before))
        self.task_weights.copy_(self.weight_total * before.softmax(0))
        largest = torch.where(counts, norms, 0.0).amax()
        self._factors = torch.where(counts, scale * largest / norms, 0.0)

    def _rows(self) -> list[Tensor]:
        assert self.layout is not None
        return [view for row in self.grad_mean.unbind() for view in self.layout.views(row)]

    def combine(self, step: Step, targets: Targets) -> None:
        """Writes the sum of the running means, all of the largest norm; NaN after a step that does not count."""
        factors, self._factors = self._factors, None
        if not targets.outputs:
            return
        grads = step.task_grads
        rows = grads.tensors
        if factors is None:  # of a skipped step
            factors = self.task_weights
        else:
            is_reached = [output.numel() > 0 for output in targets.outputs] * self.num_tasks
            rows = [
                mean if reached else mean[:0]
                for mean, reached in zip(self._rows(), is_reached, strict=True)
            ]
        functional.weighted_sum_(
            rows,
            targets.outputs,
            grads.layout,
            factors,
            found_nonfinite=self.found_nonfinite,
            accumulate=targets.accumulate,
        )

    # ---- state

    def _size_state(self, step: Step) -> None:
        """Sizes and widens the means for the gradients of ``step``."""
        grads = step.task_grads
        has_float64 = any(grad.dtype == torch.float64 for grad in grads.tensors if grad.numel() > 0)
        mean = self.grad_mean
        if mean.shape[1] == 0:
            mean = mean.new_zeros(self.num_tasks, grads.layout.padded_numel)
        self.put_back({"grad_mean": mean.double() if has_float64 else mean})

    def _fits(self, name: str, saved: Tensor) -> bool:
        if name == "grad_mean" and self.layout is None:
            return saved.dim() == 2 and saved.shape[0] == self.num_tasks
        return super()._fits(name, saved)

    def _in_own_type(self, name: str, saved: Tensor) -> Tensor:
        if name == "grad_mean" and self.layout is None:
            return saved if saved.dtype == torch.float64 else saved.float()
        return super()._in_own_type(name, saved)

    def options(self) -> dict[str, Any]:
        """See :class:`excessmtl_ext.Balancer`."""
        options = super().options()
        return {"num_tasks": options.pop("num_tasks"), "beta": self.beta, **options}
