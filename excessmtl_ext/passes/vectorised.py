"""The encoder's passes of a step that is cut at its features: one by one, or as one vectorised pass.

Vectorised, the encoder's T passes share what each of them spends on dispatch, and small matrix
products become larger ones; but every intermediate gradient lives T times at once, and convolutions
on a CPU may take a slow path. So nothing is assumed: ``batched="auto"`` runs both ways in the first
steps and keeps the faster one. Both give the same gradients up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from excessmtl_ext.passes.cut import Cut
from excessmtl_ext.passes.per_task import GradRows
from excessmtl_ext.passes.stacked import StackedLayers, Stacker
from excessmtl_ext.step import Batched, Root

NUM_UNTIMED_STEPS = 1
NUM_TIMED_STEPS = 3
"""Steps each way takes under ``"auto"``: the first one chooses kernels and faults pages in."""

HOPELESS = 2.0
"""A vectorised pass that takes this many times the fastest pass per task is not tried again."""


def check_batched(batched: object) -> None:
    """Raises ValueError unless ``batched`` is True, False, ``"auto"`` or ``"stacked"``."""
    if not isinstance(batched, bool) and batched not in ("auto", "stacked"):
        raise ValueError(
            f"Expected `batched` to be True, False, 'auto' or 'stacked', but got {batched!r}."
        )


class EncoderPasses:
    """Runs the encoder's passes one way or the other, and knows why.

    Args:
        batched: What was asked for.

    Attributes:
        is_batched: Whether the latest encoder passes were one; None before the first.
        reason: Why.
        vectorises: Whether one vectorised pass is ever thought of.
        stacker: Makes the layers of a step whose weight gradients are computed beside the passes; None: none are.
    """

    def __init__(self, batched: Batched) -> None:
        check_batched(batched)
        self.batched: Batched = batched
        self.vectorises = batched not in (False, "stacked")
        self.stacker: Stacker | None = self._stack if batched == "stacked" else None
        self.forget()

    def forget(self) -> None:
        """Returns to the state before the first step."""
        self.is_batched: bool | None = None
        self.reason = "no step so far"
        self._choice: bool | None = None if self.batched == "auto" else self.vectorises
        self._has_worked = False
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._num_steps = {True: 0, False: 0}

    def __str__(self) -> str:
        kind = {None: "none", True: "one vectorised pass", False: "one pass per task"}
        return f"{kind[self.is_batched]} ({self.reason})"

    def note(self, obstacle: str) -> None:
        """Records that a step ran a pass per task because of ``obstacle``."""
        self.is_batched = False
        self.reason = obstacle if self.vectorises else f"batched={self.batched!r}"

    def _stack(self, roots: Iterable[Root], shared: Sequence[Tensor]) -> StackedLayers:
        layers = StackedLayers(roots, shared)
        self.is_batched = False
        self.reason = str(layers.decisions)
        return layers

    def walk(self, cut: Cut, feature_grads: Sequence[Sequence[Tensor | None]]) -> GradRows:
        """Runs the passes of a step that is cut at its features."""
        obstacle = None if self._choice is False else cut.obstacle_to_batching()
        if obstacle is not None:
            self.note(obstacle)
            return cut.walk_encoder(feature_grads, self.stacker)
        if self._choice is None:
            return self._measured(cut, feature_grads)
        if self._choice:
            return self._batched(cut, feature_grads)
        self.is_batched = False
        return cut.walk_encoder(feature_grads, self.stacker)

    def _batched(self, cut: Cut, feature_grads: Sequence[Sequence[Tensor | None]]) -> GradRows:
        """Runs the vectorised pass; a pass per task from then on if some layer cannot be batched."""
        if self._has_worked:
            task_grads = cut.walk_encoder_batched(feature_grads, retain_graph=False)
        else:
            try:
                task_grads = cut.walk_encoder_batched(feature_grads, retain_graph=True)
            except RuntimeError as error:  # what vmap raises for a layer it has no rule for
                first_line = (str(error).splitlines() or [type(error).__name__])[0]
                self._choice = False
                self.note(f"a layer cannot be batched: {first_line}")
                return cut.walk_encoder(feature_grads)
            self._has_worked = True
        self.is_batched = True
        if self.batched is True:
            self.reason = "batched=True"
        return task_grads

    def _measured(self, cut: Cut, feature_grads: Sequence[Sequence[Tensor | None]]) -> GradRows:
        """Runs a step of the warm-up in the way that has had fewer steps; chooses after the last one."""
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


def _per_task(cut: Cut, feature_grads: Sequence[Sequence[Tensor | None]]) -> GradRows:
    return cut.walk_encoder(feature_grads)


def _clock(device: torch.device) -> float:
    """Waits until ``device`` has done all it was given; returns the time in seconds."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
