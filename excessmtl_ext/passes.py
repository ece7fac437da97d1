"""The backward passes of one balanced step: cut at the features or not, one by one or as one vectorised pass.

Vectorised, the encoder's T passes share what each of them spends on dispatch, and small matrix
products become larger ones; but every intermediate gradient lives T times at once, and convolutions
on a CPU may take a slow path. So nothing is assumed: ``batched="auto"`` runs both ways in the first
steps and keeps the faster one. Both give the same gradients up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from excessmtl_ext import gradients
from excessmtl_ext.features import Cut
from excessmtl_ext.gradients import HeadGrads, Root

Batched: TypeAlias = bool | Literal["auto"]
"""True: one vectorised pass where it can be had; False: a pass per task; ``"auto"``: what is faster here."""

TaskGrads: TypeAlias = list[list[Tensor | None]]

NUM_UNTIMED_STEPS = 1
NUM_TIMED_STEPS = 3
"""Steps each way takes under ``"auto"``: the first one chooses kernels and faults pages in."""

HOPELESS = 2.0
"""A vectorised pass that takes this many times the fastest pass per task is not tried again."""


def check_batched(batched: object) -> None:
    """Raises ValueError unless ``batched`` is True, False or ``"auto"``."""
    if not isinstance(batched, bool) and batched != "auto":
        raise ValueError(f"Expected `batched` to be True, False or 'auto', but got {batched!r}.")


class Passes:
    """Runs the passes of a step one way or the other, and knows why.

    Args:
        batched: What was asked for.

    Attributes:
        is_batched: Whether the latest encoder passes were one; None before the first.
        reason: Why.
    """

    def __init__(self, batched: Batched) -> None:
        check_batched(batched)
        self.batched: Batched = batched
        self.forget()

    def forget(self) -> None:
        """As before the first step."""
        self.is_batched: bool | None = None
        self.reason = "no step so far"
        self._choice: bool | None = None if self.batched == "auto" else bool(self.batched)
        self._has_worked = False
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._num_steps = {True: 0, False: 0}

    def __str__(self) -> str:
        kind = {None: "none", True: "one vectorised pass", False: "one pass per task"}
        return f"{kind[self.is_batched]} ({self.reason})"

    def task_grads(
        self,
        roots: Sequence[Root | None],
        shared: Sequence[Tensor],
        features: Sequence[Tensor] | None,
        scale: Tensor | None,
        *,
        keep_heads: bool,
    ) -> tuple[TaskGrads, HeadGrads | None]:
        """Runs T passes and returns T rows of L gradients; ``.grad`` of ``shared`` is as before.

        Args:
            roots: One per task, None where absent.
            shared: The L shared parameters.
            features: Where to cut, or None.
            scale: Factor of every loss, or None.
            keep_heads: Return the gradients of heads, per task, instead of adding them to ``.grad``.

        Raises:
            ValueError: a loss does not depend on the shared parameters, or not through ``features``.
        """
        cut = self._cut(roots, shared, features)
        if cut is None:
            heads = HeadGrads(gradients.head_leaves(roots, shared)) if keep_heads else None
            others = heads.all_parameters() if heads else ()
            with gradients.set_aside_grads([*shared, *others]):
                rows = gradients.backward_per_task(
                    roots, shared, scale=scale, on_task=heads.take if heads else None
                )
            return rows, heads
        feature_grads, head_grads = cut.walk_heads(roots, gradients.starts_of(roots, scale))
        with gradients.set_aside_grads(shared):
            rows = self._walk_encoder(cut, feature_grads)
        if not keep_heads:
            cut.deposit_heads(head_grads)
            return rows, None
        heads = HeadGrads(cut.heads)
        heads.grads = dict(enumerate(head_grads))
        return rows, heads

    def weighted_backward(
        self,
        roots: Sequence[Root | None],
        shared: Sequence[Tensor],
        features: Sequence[Tensor] | None,
        task_weights: Tensor,
        *,
        scale: Tensor | None,
        weighted_heads: bool,
        is_uniform: bool,
    ) -> None:
        """As :func:`excessmtl_ext.gradients.weighted_backward`, cut where that saves dividing head gradients."""
        cut = None
        if features is not None and not weighted_heads and not is_uniform:
            cut = self._cut(roots, shared, features)
        if cut is not None:
            cut.weighted_backward(roots, task_weights, scale=scale)
            return
        gradients.weighted_backward(
            roots,
            shared,
            task_weights,
            scale=scale,
            weighted_heads=weighted_heads,
            is_uniform=is_uniform,
        )

    def _cut(
        self,
        roots: Sequence[Root | None],
        shared: Sequence[Tensor],
        features: Sequence[Tensor] | None,
    ) -> Cut | None:
        """The step's graphs apart at the features; None where ordinary passes are due."""
        cut = None if features is None else Cut(roots, features, shared)
        obstacle = "no features were given" if cut is None else cut.obstacle
        if obstacle is None:
            return cut
        self._note(obstacle)
        return None

    def _note(self, obstacle: str) -> None:
        self.is_batched = False
        self.reason = obstacle if self.batched is not False else "batched=False"

    def _walk_encoder(
        self, cut: Cut, feature_grads: Sequence[Sequence[Tensor | None]]
    ) -> TaskGrads:
        obstacle = None if self._choice is False else cut.obstacle_to_batching()
        if obstacle is not None:
            self._note(obstacle)
            return cut.walk_encoder(feature_grads)
        if self._choice is None:
            return self._measured(cut, feature_grads)
        if self._choice:
            return self._batched(cut, feature_grads)
        self.is_batched = False
        if self.batched is False:
            self.reason = "batched=False"
        return cut.walk_encoder(feature_grads)

    def _batched(self, cut: Cut, feature_grads: Sequence[Sequence[Tensor | None]]) -> TaskGrads:
        """The vectorised pass; a pass per task from then on if some layer cannot be batched."""
        if self._has_worked:
            task_grads = cut.walk_encoder_batched(feature_grads, retain_graph=False)
        else:
            try:
                task_grads = cut.walk_encoder_batched(feature_grads, retain_graph=True)
            except RuntimeError as error:  # what vmap raises for a layer it has no rule for
                first_line = (str(error).splitlines() or [type(error).__name__])[0]
                self._choice = False
                self._note(f"a layer cannot be batched: {first_line}")
                return cut.walk_encoder(feature_grads)
            self._has_worked = True
        self.is_batched = True
        if self.batched is True:
            self.reason = "batched=True"
        return task_grads

    def _measured(self, cut: Cut, feature_grads: Sequence[Sequence[Tensor | None]]) -> TaskGrads:
        """A step of the warm-up, in the way that has had fewer; chooses after the last one."""
        batched = self._num_steps[True] < self._num_steps[False]
        self.is_batched = batched
        self.reason = "measuring"
        self._num_steps[batched] += 1
        walk = self._batched if batched else _per_task
        begin = _clock(cut.features[0].device)
        task_grads = walk(cut, feature_grads)
        seconds = _clock(cut.features[0].device) - begin
        if self._choice is None and self._num_steps[batched] > NUM_UNTIMED_STEPS:
            self._seconds[batched].append(seconds)
            self._choose()
        return task_grads

    def _choose(self) -> None:
        vectorised, per_task = self._seconds[True], self._seconds[False]
        if not vectorised:
            return
        is_hopeless = min(vectorised) > HOPELESS * min(per_task)
        if len(vectorised) < NUM_TIMED_STEPS and not is_hopeless:
            return
        self._choice = min(vectorised) < min(per_task)
        self.is_batched = self._choice
        self.reason = f"measured: {min(vectorised) * 1e3:.3g} ms vectorised, {min(per_task) * 1e3:.3g} ms per task"


def _per_task(cut: Cut, feature_grads: Sequence[Sequence[Tensor | None]]) -> TaskGrads:
    return cut.walk_encoder(feature_grads)


def _clock(device: torch.device) -> float:
    """The time in seconds when ``device`` has done all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
