"""MOML: MGDA's weights, computed on validation data (Ye et al., NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from excessmtl_ext import gradients
from excessmtl_ext.baselines.gramian import GramianBalancer, Matrix
from excessmtl_ext.baselines.mgda import min_norm_weights
from excessmtl_ext.gradients import Losses, Root


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

    A task that is absent from the validation batch holds the weight 1 / T and the k tasks that are
    present share k / T; one that is absent from the training batch keeps its weight. ``accumulate``
    raises NotImplementedError. ``update_weights`` takes the gradients of the validation losses.

    Example:
        >>> import torch
        >>> balancer = MOML(num_tasks=2)
        >>> balancer.update_weights(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).round(decimals=6).tolist()
        [0.2, 0.8]
    """

    requires: ClassVar[frozenset[str]] = frozenset({"validation_losses"})

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
        roots = gradients.loss_roots(losses, self.num_tasks)
        shared = self._bound_parameters()
        gradients.check_device(roots, shared[0].device)
        scale = self._as_scale(grad_scale)
        heads = gradients.HeadGrads(gradients.head_leaves(roots, shared))
        with gradients.set_aside_grads([*shared, *heads.all_parameters()]):
            task_grads = gradients.backward_per_task(roots, shared, scale=scale)
        return self._observe(task_grads, scale)

    def update_weights(
        self,
        task_grads: Sequence[Sequence[Tensor | None]] | Tensor | None = None,
        losses: Sequence[Tensor] | Tensor | None = None,
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
        return self._observe(task_grads, self._as_scale(grad_scale))

    def _observe(
        self, task_grads: Sequence[Sequence[Tensor | None]] | Tensor, scale: Tensor | None
    ) -> Tensor:
        flat, tasks = self._flat_task_grads(task_grads)
        if tasks:
            with torch.no_grad():
                self._weigh(flat, tasks, scale)
            self._raise_if_nonfinite()
            self._has_observed = True
        return self.task_weights

    def reset(self) -> None:
        """Forgets everything: the state is as before the first step."""
        self._has_observed = False
        super().reset()

    def get_extra_state(self) -> dict[str, Any]:
        """See :class:`excessmtl_ext.Balancer`; with whether validation losses were ever observed."""
        return {**super().get_extra_state(), "has_observed": self._has_observed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`get_extra_state` gave."""
        super().set_extra_state(state)
        self._has_observed = state["has_observed"]

    def _step(
        self,
        roots: list[Root | None],
        values: Tensor | None,
        scale: Tensor | None,
        features: list[Tensor] | None = None,
    ) -> None:
        if not self._has_observed:
            raise RuntimeError(
                "Expected observe_validation(losses) before the first backward(): MOML computes its weights from the "
                "losses of a validation batch. Call it with T losses of held-out data before each step."
            )
        super()._step(roots, values, scale, features)

    def _update(
        self,
        task_grads: list[Tensor] | None,
        losses: Tensor | None,
        tasks: list[int],
        scale: Tensor | None,
    ) -> None:
        self.found_nonfinite.zero_()  # the flags are those of the latest call
        self.num_steps += 1
