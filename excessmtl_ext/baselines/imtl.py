"""IMTL: impartial to gradients (G), to losses (L), or both (Liu et al., ICLR 2021)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from excessmtl_ext.arguments import check_choice, check_positive
from excessmtl_ext.baselines.gramian import (
    GramianBalancer,
    Matrix,
    move_to_gradients,
    unit_gramian,
)
from excessmtl_ext.step import (
    Batched,
    HeadWeighting,
    NonFinite,
    Step,
    StreamedWeight,
    WeightScale,
)
from excessmtl_ext.weighting import log_shares

Variant = Literal["G", "L", "both"]


class IMTL(GramianBalancer):
    r"""Impartial multi-task learning (Liu et al., ICLR 2021, https://openreview.net/forum?id=IMPnRXEWpvr).

    ``variant="G"``: the weighted sum of the gradients has equal projections onto all
    of them,

    .. math:: \Big\langle \sum_j \alpha_j g_j, \; g_i / \|g_i\| \Big\rangle = c \quad \text{for all } i.

    ``variant="L"``: losses are scaled by :math:`e^{s_i}` with learned :math:`s_i`,
    which follow the gradient of :math:`e^{s_i} \ell_i - s_i` and so tend to :math:`-\log \ell_i`:
    all scaled losses tend to 1. The weights are :math:`e^{s_i}` over their sum.

    ``variant="both"``: IMTL-G on the gradients of the scaled losses. Equal projections are those of
    unit gradients, which no scale changes, so with weights of a fixed sum the shared gradient is
    the one of ``"G"``; the scales act on the heads, with ``head_weighting="task_weights"``.

    The weights of IMTL-G may be negative; only their sum is that of the convention. Where
    :math:`\sum_i \alpha_i` of the direction with c > 0 is negative, the sum of 1 that the paper asks
    for turns the direction round (c < 0): so it is printed, and so it is done.

    Args:
        shared_parameters: What all tasks share.
        num_tasks: T, between 1 and 512.
        variant: Which of the three.
        robust_step_size: Learning rate of :math:`s`, for ``"L"`` and ``"both"``. A step never passes
            :math:`-\log \ell_i`.
        weight_scale: See :class:`excessmtl_ext.Balancer`.
        head_weighting: ``"none"``: heads get the gradient of their own loss. ``"task_weights"``:
            times :math:`e^{s_i}`, scaled to the sum of the weights (1 / T for ``"G"``); never times
            the weights of IMTL-G, which would make a head climb its loss where they are negative.
        nonfinite: See :class:`excessmtl_ext.Balancer`; looks at what the variant needs.
        batched: See :class:`excessmtl_ext.Balancer`.
        copy_gradients: See :class:`excessmtl_ext.Balancer`.

    Raises:
        ValueError: an argument is out of range.
        ImportError: torchjd, which solves IMTL-G, is not installed.

    A task that is absent from a batch, or whose gradient is zero, keeps its :math:`s`. Its weight:
    ``"L"``, which looks at the gradient where a loss is NaN: as it was, the others share the rest;
    ``"G"``, ``"both"``: 1 / T, the k present tasks share k / T. ``accumulate`` works for ``"L"``
    alone. IMTL-L expects losses above 0: :math:`e^s \ell - s` has no minimum otherwise, and s grows
    by ``robust_step_size`` or more per step.

    Example, losses 1 and 1/2, from s = 0:

        >>> balancer = IMTL(num_tasks=2, variant="L", robust_step_size=0.1)
        >>> # 1 : exp(0.1 * 0.5)
        >>> balancer.update_weights(losses=[1.0, 0.5]).tolist()  # doctest: +ELLIPSIS
        [0.487..., 0.512...]
    """

    requires = frozenset({"task_grads", "losses"})

    binding_options: ClassVar[frozenset[str]] = frozenset({"weight_scale", "variant"})

    log_loss_scales: Tensor

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | nn.Module | None = None,
        *,
        num_tasks: int,
        variant: Variant = "both",
        robust_step_size: float = 0.01,
        weight_scale: WeightScale = "simplex",
        head_weighting: HeadWeighting = "none",
        nonfinite: NonFinite = "skip",
        batched: Batched = False,
        copy_gradients: bool = False,
    ) -> None:
        check_choice("variant", variant, ("G", "L", "both"))
        check_positive("robust_step_size", robust_step_size)
        if variant != "L":
            _check_torchjd()
        super().__init__(
            shared_parameters,
            num_tasks=num_tasks,
            weight_scale=weight_scale,
            head_weighting=head_weighting,
            nonfinite=nonfinite,
            batched=batched,
            copy_gradients=copy_gradients,
        )
        self.variant: Variant = variant
        self.robust_step_size = float(robust_step_size)
        self.can_stream = variant == "L"
        # What is needed decides how many backward passes a step has: one where losses are enough.
        needs = {"G": {"task_grads"}, "L": {"losses"}, "both": {"task_grads", "losses"}}
        self.requires = frozenset(needs[variant])  # pyright: ignore[reportAttributeAccessIssue]
        self.set_state(self.initial_state(self.task_weights.device))

    def initial_state(self, device: torch.device) -> dict[str, Tensor]:
        """Adds the log-scales of the losses, 0 at first."""
        state = super().initial_state(device)
        state["log_loss_scales"] = torch.zeros_like(state["task_weights"])
        return state

    def _solve(self, gramian: Matrix) -> Matrix | None:
        return equal_projection_weights(gramian)

    def update(self, step: Step) -> None:
        """Sets the weights from what the variant needs, and moves the scales of the losses."""
        if self.variant == "G":
            super().update(step)
            return
        if self.variant == "both":
            move_to_gradients(self, step.task_grads.tensors)
            tasks = self._weigh(step, step.losses_like(self.task_weights))
            if tasks is None:
                return
            index = self._index(tasks)
            present = step.losses_like(self.task_weights)[index]
            self.log_loss_scales[index] = self._moved(self.log_loss_scales[index], present)
            self.num_steps += 1
            return
        index = self._index(step.tasks)
        present = step.losses_like(self.task_weights)[index]
        is_out = None if step.has_no_labels is None else step.has_no_labels[index]
        is_bad = ~present.isfinite() if is_out is None else ~(present.isfinite() | is_out)
        self.found_nonfinite.zero_()
        self.found_nonfinite[index] = is_bad
        is_finite = ~self.found_nonfinite.any()
        before = self.log_loss_scales[index]
        moves = is_finite if is_out is None else is_finite & ~is_out
        moved = torch.where(moves, self._moved(before, present), before)
        self.log_loss_scales[index] = moved
        weights = self.log_task_weights[index]
        shared_out = log_shares(moved, weights, is_out)
        self.log_task_weights[index] = torch.where(is_finite, shared_out, weights)
        self.task_weights.copy_(self.weight_total * self.log_task_weights.softmax(0))
        self.num_steps += moves.any()
        self.num_skipped_steps += ~is_finite

    def _index(self, tasks: Sequence[int]) -> slice | Tensor:
        everyone = len(tasks) == self.num_tasks
        return slice(None) if everyone else torch.tensor(tasks, device=self.task_weights.device)

    def _moved(self, log_scales: Tensor, losses: Tensor) -> Tensor:
        moved = log_scales - self.robust_step_size * (log_scales.exp() * losses - 1.0)
        # Differs from the paper: the step ends at the minimiser for this loss at the latest. A first loss of 1000
        # would else throw s so far down that it takes thousands of steps (at most one step size each) to come back.
        optimum = -losses.log()
        is_past = (optimum - log_scales) * (optimum - moved) < 0  # False for losses of 0 and below
        return torch.where(is_past, optimum, moved)

    def head_weights(self) -> Tensor:
        """Returns the scales of the losses, brought to the sum of the weights."""
        if self.variant == "L":  # weights follow from the scales
            return self.task_weights
        return self.weight_total * self.log_loss_scales.softmax(0)

    def stream_task(self, step: Step) -> StreamedWeight:
        """Returns the task's moved log-scale (``"L"`` alone)."""
        (task,) = step.tasks
        if not step.moves_weights:
            return StreamedWeight(self.log_task_weights[task].clone())
        scales = self.log_loss_scales
        loss = step.losses_like(scales).reshape(())
        moved = self._moved(scales[task], loss)
        return StreamedWeight(torch.where(loss.isnan(), scales[task], moved))

    def stream_finish(self, step: Step) -> None:
        """Moves scales and weights by the losses of the step."""
        if step.moves_weights:
            self.update(step)

    def options(self) -> dict[str, Any]:
        """See :class:`excessmtl_ext.Balancer`."""
        options = super().options()
        return {
            "num_tasks": options.pop("num_tasks"),
            "variant": self.variant,
            "robust_step_size": self.robust_step_size,
            **options,
        }


def equal_projection_weights(gramian: Matrix) -> Matrix | None:
    r"""Weights whose combination has equal projections onto all unit gradients, by torchjd.

    torchjd gets the Gramian of the unit gradients and not G itself: the weights of unit gradients
    give those of the gradients by division, and its pseudo-inverse would take gradients that are
    1e8 times shorter than others for zero. Where the gradients depend on each other so that no such
    combination exists but zero, its least squares solution stands.

    Args:
        gramian: G [k, k].

    Returns:
        The weights [k], sum 1, zero for a gradient that is zero; None if all are, or if the sum
        cannot be made 1.
    """
    from torchjd.aggregation import IMTLGWeighting

    has_gradient = np.diagonal(gramian) > 0.0
    if not has_gradient.any():
        return None
    cosines, norms = unit_gramian(gramian[np.ix_(has_gradient, has_gradient)])
    unit_weights: Matrix = IMTLGWeighting()(torch.from_numpy(cosines)).numpy()
    if not unit_weights.any():
        # Unit gradients that cancel (two opposite ones): every combination of them with equal projections is zero.
        unit_weights = np.ones_like(norms)
    raw = unit_weights * (norms.min() / norms)
    if abs(raw.sum()) <= 1e-12 * np.abs(raw).sum():
        return None
    weights = np.zeros(len(gramian))
    weights[has_gradient] = raw / raw.sum()
    return weights


def _check_torchjd() -> None:
    if importlib.util.find_spec("torchjd") is None:
        raise ImportError(
            "Expected torchjd, which solves IMTL-G, but it is not installed. "
            'Run: pip install ".[train]" in a clone; variant="L" works without it.'
        )
