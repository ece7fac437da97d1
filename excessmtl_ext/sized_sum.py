"""Sums of task gradients as they are, or brought to one size per tensor first: a choice beside the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from excessmtl_ext import functional, gradient_sizes
from excessmtl_ext.arguments import check_choice
from excessmtl_ext.balancer import Balancer
from excessmtl_ext.gradient_sizes import Combination
from excessmtl_ext.state import ParamLayout
from excessmtl_ext.step import (
    Batched,
    HeadWeighting,
    NonFinite,
    Step,
    StreamedWeight,
    Targets,
    WeightScale,
)

_PER_TENSOR = ("tensor_mean_square", "num_tensor_steps", "tensor_weights")


class SizedSum(Balancer):
    r"""Base of the methods whose weights do not depend on gradients, so that these may be brought to one size.

    ``combine="per_tensor"`` makes ``.grad`` of shared tensor l
    :math:`\sum_i \alpha_i \sqrt{\max_k n_{kl} / n_{il}}\, g_{il}` with the running mean squares n of
    :mod:`excessmtl_ext.gradient_sizes`, so that every task pulls at a tensor with its weight, whatever
    the size of its loss. Gradients of equal size give the plain sum, others a longer one: at most that
    of T gradients as large as the largest. A step then takes T passes instead of one, and looks at all
    gradients, but keeps no state of the parameters' size.

    Args:
        combine: ``"sum"``: gradients are summed as they are, by one pass. ``"per_tensor"``: see above.
        batched: See :class:`excessmtl_ext.Balancer`; for ``"per_tensor"``.
        copy_gradients: See :class:`excessmtl_ext.Balancer`; for ``"per_tensor"``.

    The other arguments are those of :class:`excessmtl_ext.Balancer`.

    Raises:
        ValueError: an argument is out of range.
    """

    binding_options: ClassVar[frozenset[str]] = frozenset({"weight_scale", "combine"})

    transient_state: ClassVar[frozenset[str]] = frozenset({"tensor_weights"})

    tensor_mean_square: Tensor
    num_tensor_steps: Tensor
    tensor_weights: Tensor

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | nn.Module | None = None,
        *,
        num_tasks: int,
        combine: Combination = "sum",
        weight_scale: WeightScale = "simplex",
        head_weighting: HeadWeighting = "none",
        nonfinite: NonFinite = "skip",
        batched: Batched = False,
        copy_gradients: bool = False,
    ) -> None:
        check_choice("combine", combine, ("sum", "per_tensor"))
        super().__init__(
            shared_parameters,
            num_tasks=num_tasks,
            weight_scale=weight_scale,
            head_weighting=head_weighting,
            nonfinite=nonfinite,
            batched=batched,
            copy_gradients=copy_gradients,
        )
        self.combination: Combination = combine
        if self.brings_to_size:
            self.requires = self.requires | {"task_grads"}
            self.has_uniform_weights = False  # their sum is not that of one unweighted pass
            self.set_state(self.sizes_with(self.state_tensors()))

    @property
    def brings_to_size(self) -> bool:
        """Whether gradients are brought to one size."""
        return self.combination == "per_tensor"

    def initial_state(self, device: torch.device) -> dict[str, Tensor]:
        """Adds the sizes where gradients are brought to one."""
        state = super().initial_state(device)
        return self.sizes_with(state) if self.brings_to_size else state

    def sizes_with(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns ``state`` and sizes [T, L] of no steps; L is 0 while no gradients were seen."""
        layout = self.layout or ParamLayout([])
        weights = state["task_weights"]
        sizes = weights.new_zeros(self.num_tasks, len(layout.numels))
        return {
            **state,
            "tensor_mean_square": sizes,
            "num_tensor_steps": torch.zeros_like(sizes, dtype=torch.int64),
            "tensor_weights": sizes.clone(),
        }

    def move(self, step: Step, unfit: Tensor | None) -> None:
        """Moves the weights, and counts the step or the skip; sets ``found_nonfinite``. Here they stay as they are.

        Args:
            step: Its losses are known where the method requires them.
            unfit: [T] bool, tasks with a gradient that is not finite: the step is skipped then. None where no
                gradient was looked at.
        """
        if unfit is None:
            self.num_steps += 1
            return
        self.found_nonfinite.copy_(unfit)
        has_nonfinite = unfit.any()
        self.num_steps += ~has_nonfinite
        self.num_skipped_steps += has_nonfinite

    def update(self, step: Step) -> None:
        """Moves the weights and, where gradients are brought to one size, the sizes."""
        if not self.brings_to_size:
            self.move(step, None)
            return
        grads = step.task_grads
        self._size_state(grads.layout, grads.tensors[0].device)
        sums = gradient_sizes.exact_sums_of_squares(
            grads.tensors, len(grads.layout.numels), step.grad_scale
        )
        if step.losses is not None:
            step.has_no_labels = step.losses.isnan() & (sums == 0).all(1)
        self.move(step, ~sums.isfinite().all(1))
        means = gradient_sizes.mean_squares(sums, grads.layout)
        counts = ~self.found_nonfinite.any()
        sizes = self.tensor_mean_square
        gradient_sizes.update_sizes_(sizes, self.num_tensor_steps, means, counts)
        factors = gradient_sizes.tensor_weights(self.task_weights, sizes, means)
        self.tensor_weights.copy_(torch.where(counts, factors, self.tensor_weights))

    def _size_state(self, layout: ParamLayout, device: torch.device) -> None:
        """Gives the sizes their shape and place by the first gradients."""
        if device != self.task_weights.device and self.num_calls == 0:
            self.to(device)
        if layout.numels and self.tensor_mean_square.shape[1] == 0:
            fresh = self.sizes_with(self.state_tensors())
            self.put_back({name: fresh[name] for name in _PER_TENSOR})

    def combine(self, step: Step, targets: Targets) -> None:
        """Writes the weighted sum to ``targets``; NaN after a non-finite step."""
        if not self.brings_to_size:
            super().combine(step, targets)
            return
        grads = step.task_grads
        functional.weighted_sum_(
            grads.tensors,
            targets.outputs,
            grads.layout,
            self.tensor_weights,
            found_nonfinite=self.found_nonfinite,
            accumulate=targets.accumulate,
        )

    def pass_weights(self) -> Tensor:
        """Returns factors [T] of the task gradients in a step of one pass for all tasks."""
        ratios = self._pass_ratios()
        return self.task_weights if ratios is None else self.task_weights * ratios

    def _pass_ratios(self) -> Tensor | None:
        if not self.brings_to_size or self.layout is None or not self.tensor_mean_square.shape[1]:
            return None
        return gradient_sizes.pass_ratios(
            self.tensor_mean_square, self.num_tensor_steps, self.layout
        )

    # ---- streaming

    def stream_log_weight(self, step: Step) -> Tensor:
        """Returns the new log-weight [] of the one task of ``step``, not normalised; here the one it has."""
        (task,) = step.tasks
        return self.log_task_weights[task].clone()

    def stream_task(self, step: Step) -> StreamedWeight:
        """Returns the task's new log-weight, and the size that its gradients are divided by; takes the size in."""
        (task,) = step.tasks
        if not self.brings_to_size:
            moves = step.moves_weights
            return StreamedWeight(
                self.stream_log_weight(step) if moves else self.log_task_weights[task].clone()
            )
        grads = step.task_grads
        self._size_state(grads.layout, grads.tensors[0].device)
        if not step.moves_weights:
            ratios = self._pass_ratios()
            scale = None if ratios is None else gradient_sizes.log_ratio(ratios[task])
            return StreamedWeight(self.log_task_weights[task].clone(), scale)
        sums = gradient_sizes.exact_sums_of_squares(
            grads.tensors, len(grads.layout.numels), step.grad_scale
        )
        is_finite = sums.isfinite().all()
        self.found_nonfinite[task] = ~is_finite
        means = gradient_sizes.mean_squares(sums, grads.layout)
        row = slice(task, task + 1)
        sizes = self.tensor_mean_square[row]
        gradient_sizes.update_sizes_(sizes, self.num_tensor_steps[row], means, is_finite)
        scale = -0.5 * gradient_sizes.sizes_now(sizes, means)[0].log()
        return StreamedWeight(self.stream_log_weight(step), scale)

    def stream_finish(self, step: Step) -> Tensor | None:
        """Moves the weights; returns log-factors [L] of the sum where gradients are brought to one size."""
        if not step.moves_weights:
            return None
        if not self.brings_to_size:
            self.move(step, None)
            return None
        self.move(step, self.found_nonfinite.clone())
        return 0.5 * gradient_sizes.largest_sizes(self.tensor_mean_square).log()

    # ---- saving and loading

    def _fits(self, name: str, saved: Tensor) -> bool:
        if self.layout is None and name in _PER_TENSOR:
            return saved.dim() == 2 and saved.shape[0] == self.num_tasks
        return super()._fits(name, saved)

    def options(self) -> dict[str, Any]:
        """Returns the keyword arguments of the constructor that rebuild the balancer."""
        options = super().options()
        return {"num_tasks": options.pop("num_tasks"), **options, "combine": self.combination}


__all__ = ["SizedSum"]
