"""Watches for steps that are skipped one after the other: a run that skips all of them looks like one that trains."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from excessmtl_ext.arguments import stacklevel_of_caller
from excessmtl_ext.step import Step

SKIPS_IN_A_ROW = 10
"""So many are told. A GradScaler that begins at 65,536 may skip some five steps until its scale fits."""

CALLS_PER_LOOK = 5
"""Calls between two looks at a GPU's counter; on a CPU each call looks."""


class SkippedStepsWarning(RuntimeWarning):
    """Many steps in a row had a gradient that is not finite."""


class WatchedRule(Protocol):
    """What the guard reads of a balancer."""

    num_calls: int
    num_skipped_steps: Tensor
    found_nonfinite: Tensor


class SkipGuard:
    """Issues one :class:`SkippedStepsWarning` after ``SKIPS_IN_A_ROW`` skipped steps in a row.

    On a GPU nothing waits: a look starts a copy of the counter and is judged at the next one, so the
    warning comes up to 2 * ``CALLS_PER_LOOK`` steps later. A step that is captured in a CUDA graph is
    not watched.

    Attributes:
        has_warned: Whether the warning was issued since the last :meth:`restart`.
    """

    period = 1
    wants_gradients = False

    def __init__(self) -> None:
        """Starts without evidence."""
        self.restart()

    def restart(self) -> None:
        """Forgets all evidence, and that it warned."""
        self.has_warned = False
        self._num_skipped = 0
        self._in_a_row = 0
        self._num_moves = 0
        self._copy: tuple[Tensor, torch.cuda.Event, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_copy": None,
        }  # a copied or pickled guard takes its next look afresh

    def on_gradients(self, rule: WatchedRule, step: Step) -> None:
        """Needs no gradients."""

    def on_end(self, rule: WatchedRule, step: Step, tasks: Sequence[int]) -> None:
        """Looks at the counter of skipped steps."""
        if self.has_warned or not step.moves_weights:
            return
        counter = rule.num_skipped_steps
        self._num_moves += 1
        if counter.device.type == "cpu" and type(counter) is Tensor:
            self._judge(rule, int(counter.numpy()), self._num_moves)  # a view: no op runs
            self._num_moves = 0
        elif (
            counter.is_cuda
            and self._num_moves >= CALLS_PER_LOOK
            and not torch.cuda.is_current_stream_capturing()
        ):
            if self._copy is not None:
                value, arrival, num_moves = self._copy
                if not arrival.query():
                    return
                self._judge(rule, int(value), num_moves)
            arrival = torch.cuda.Event()
            self._copy = (counter.to("cpu", non_blocking=True), arrival, self._num_moves)
            arrival.record(torch.cuda.current_stream(counter.device))
            self._num_moves = 0

    def _judge(self, rule: WatchedRule, num_skipped: int, num_moves: int) -> None:
        """Takes in that ``num_skipped`` steps were skipped in all, ``num_moves`` steps after the last look."""
        added, self._num_skipped = num_skipped - self._num_skipped, num_skipped
        self._in_a_row = self._in_a_row + added if added == num_moves else 0
        if self._in_a_row < SKIPS_IN_A_ROW:
            return
        self.has_warned = True
        warnings.warn(
            f"{self._in_a_row} steps in a row had a gradient or loss that is not finite and were skipped "
            f"({num_skipped} in all): the weights do not move. If the loop guards its optimizer the model does not "
            "train either; if it does not, its parameters are NaN by now. See balancer.found_nonfinite for the "
            "tasks, and look for NaN in their targets, in the inputs, or in the parameters.",
            SkippedStepsWarning,
            stacklevel=stacklevel_of_caller(),
        )
