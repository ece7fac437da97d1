"""MOML: MGDA's weights, computed on validation data (Ye et al., NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from excessmtl_ext.baselines.gramian import GramianBalancer, Matrix
from excessmtl_ext.baselines.mgda import min_norm_weights
from excessmtl_ext.extra_state import Fields
from excessmtl_ext.given_gradients import GivenGrads, given_task_grads
from excessmtl_ext.passes.per_task import HeadGrads, backward_per_task
from excessmtl_ext.step import Losses, Step, raise_if_nonfinite
from excessmtl_ext.step_arguments import as_scale, read_step


class MOML(GramianBalancer):
    r"""Weights tasks by the minimum-norm point of their *validation* gradients (Ye et al., NeurIPS 2021).

    After https://arxiv.org/abs/2102.07121, as He et al. 2024 compare it in their Fig. 5. A step has
    two halves, in this order::

        balancer.observe_validation(validation_losses)  # T passes; sets the weights, leaves no gradient
        balancer.backward(train_losses)                 # one pass with these weights

    With clean validation data the weights do not see the label noise of the training data.
    Differs from Ye et al.: the validation gradient is taken at the present parameters and not after
    a step of the inner problem.

    Args: see :class:`excessmtl_ext.Balancer`. ``nonfinite`` is about the validation gradients:
        ``"skip"`` keeps the weights and counts in ``num_skipped_steps``. The training losses are not
        looked at.

    A task that is absent from the validation batch, or has no gradient there, holds the weight
    1 / T and the k others share k / T; one that is absent from the training batch keeps its weight. ``accumulate``
    raises NotImplementedError. ``update_weights`` takes the gradients of the validation losses.

    Example:
        >>> import torch
        >>> balancer = MOML(num_tasks=2)
        >>> balancer.update_weights(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).round(decimals=6).tolist()
        [0.2, 0.8]
    """

    requires = frozenset({"validation_losses"})

    _has_observed = False

    def _solve(self, gramian: Matrix) -> Matrix | None:
        return min_norm_weights(gramian)

    def observe_validation(
        self, losses: Losses, *, grad_scale: Tensor | float | None = None
    ) -> Tensor:
        """Sets the weights from validation losses; every ``.grad``, those of the heads too, stays as it is.

        Args:
            losses: T scalar losses of a validation batch, as for :meth:`backward`.
            grad_scale: Factor by which the passes are scaled against underflow; undone inside.

        Returns:
            The weights [T], float64.

        Raises:
            ValueError: number, shape, device or graph of the losses is not as expected.
            FloatingPointError: a gradient is not finite and ``nonfinite="raise"``.
        """
        step = read_step(self, losses, grad_scale=grad_scale)
        heads = HeadGrads.of(step.roots, step.shared)
        rows, _ = backward_per_task(
            step.roots, step.starts, step.shared, heads=heads, copy=step.copy_gradients
        )
        return self._observe(step, rows)

    def update_weights(
        self,
        task_grads: GivenGrads | None = None,
        losses: Sequence[Tensor | None] | Tensor | None = None,
        *,
        grad_scale: Tensor | float | None = None,
    ) -> Tensor:
        """Sets the weights from gradients of the validation losses that the caller has.

        Args:
            task_grads: See :meth:`excessmtl_ext.Balancer.update_weights`.
            losses: Not needed.
            grad_scale: Factor that ``task_grads`` carry, to be undone.

        Returns:
            The new weights [T], float64.

        Raises:
            ValueError: ``task_grads`` is missing, or does not fit.
        """
        if task_grads is None:
            raise ValueError(
                "Expected `task_grads`: MOML computes its weights from the gradients of the validation losses."
            )
        scale = None if grad_scale is None else as_scale(grad_scale, self.task_weights.device)
        return self._observe(Step(roots=[], tasks=[], shared=[], grad_scale=scale), task_grads)

    def _observe(self, step: Step, task_grads: GivenGrads) -> Tensor:
        step.task_grads, step.tasks = given_task_grads(self, task_grads)
        if step.tasks:
            with torch.no_grad():
                self._weigh(step)
            raise_if_nonfinite(self)
            self._has_observed = True
        return self.task_weights

    def reset(self) -> None:
        """Forgets everything: the state is as before the first step."""
        self._has_observed = False
        super().reset()

    def host_state(self) -> Fields:
        """See :class:`excessmtl_ext.Balancer`; with whether validation losses were ever observed."""
        return {**super().host_state(), "has_observed": [float(self._has_observed)]}

    def set_host_state(self, fields: Fields) -> None:
        """Takes what :meth:`host_state` gave."""
        super().set_host_state(fields)
        self._has_observed = bool(round(fields["has_observed"][0]))

    def begin(self, step: Step) -> None:
        """Raises RuntimeError where validation losses were never observed."""
        if not self._has_observed:
            raise RuntimeError(
                "Expected observe_validation(losses) before the first backward(): MOML computes its weights from the "
                "losses of a validation batch. Call it with T losses of held-out data before each step."
            )

    def update(self, step: Step) -> None:
        """Counts the step: the weights are those of the validation losses."""
        self.found_nonfinite.zero_()  # the flags are those of the latest call
        self.num_steps += 1
