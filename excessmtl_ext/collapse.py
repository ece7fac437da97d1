"""Watches for weights that have left all but one task while the others are as far from their optimum."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from excessmtl_ext.arguments import stacklevel_of_caller
from excessmtl_ext.step import Step

CALLS_PER_LOOK = 50
"""Calls between two looks at the weights. The risk of one mini-batch is noisy, and a look is not free on a GPU."""

LOOKS_REMEMBERED = 8
"""The latest looks that are judged together, so that the noise of one batch is averaged away: 400 calls."""

LOOKS_COLLAPSED = 4
"""So many of them must find a collapse. Not all: in published settings the weight goes back and forth without noise."""

FEWEST_EFFECTIVE_TASKS = 1.1
"""Below this the weights count as collapsed: the heaviest task then has more than 90 % of them."""

RISK_RATIO = 0.5
"""Collapse is justified while every other task's risk stays under this share of the heaviest task's."""


class TaskCollapseWarning(RuntimeWarning):
    """One task has nearly all the weight, though another one's excess risk is of the same order."""


def effective_num_tasks(task_weights: Tensor) -> Tensor:
    r"""Counts the equal tasks that the weights amount to (Kish 1965, effective sample size; inverse Simpson index).

    .. math:: (\textstyle\sum_i \alpha_i)^2 / \sum_i \alpha_i^2

    T for equal weights, 1 when one task has all; does not depend on what the weights sum to.

    Args:
        task_weights: [T], none negative.

    Shape:
        Returns [], on the weights' device.
    """
    return task_weights.sum().square() / task_weights.square().sum()


class WatchedRule(Protocol):
    """What the guard reads of a balancer."""

    num_calls: int
    task_weights: Tensor
    relative_excess_risk: Tensor


class CollapseGuard:
    """Issues one :class:`TaskCollapseWarning` when weights collapse that the risks do not justify.

    It looks every ``CALLS_PER_LOOK`` calls. It warns when ``LOOKS_COLLAPSED`` of the latest
    ``LOOKS_REMEMBERED`` looks found fewer than ``FEWEST_EFFECTIVE_TASKS`` effective tasks, and over
    those the mean relative excess risk of some task, while it was not the heaviest, is at least
    ``RISK_RATIO`` times the mean risk of the heaviest. A task that is alone far from its optimum may
    therefore have all the weight. The guard reads and never writes.

    On a GPU nothing waits: a look starts a copy of 2 T numbers and is judged at the next one. A step
    that is captured in a CUDA graph is not watched, since its replays do not run this code.

    Attributes:
        has_warned: Whether the warning was issued since the last :meth:`restart`.
    """

    period = CALLS_PER_LOOK
    wants_gradients = False

    def __init__(self) -> None:
        """Starts without evidence."""
        self.restart()

    def restart(self) -> None:
        """Forgets all evidence, and that it warned."""
        self.has_warned = False
        self._copy_under_way: _CopyUnderWay | None = None
        self._looks: deque[_Look | None] = deque(maxlen=LOOKS_REMEMBERED)

    def on_gradients(self, rule: WatchedRule, step: Step) -> None:
        """Needs no gradients."""

    def on_end(self, rule: WatchedRule, step: Step, tasks: Sequence[int]) -> None:
        """Looks at a step whose state is written."""
        self.look(rule.num_calls, rule.task_weights, rule.relative_excess_risk)

    def look(self, num_calls: int, task_weights: Tensor, relative_excess_risk: Tensor) -> None:
        """Looks at the state after call number ``num_calls``; does nothing on most calls.

        Args:
            num_calls: Calls so far.
            task_weights: [T].
            relative_excess_risk: [T].
        """
        if self.has_warned or num_calls % CALLS_PER_LOOK != 0 or task_weights.numel() < 2:
            return
        if not task_weights.is_cuda:
            self._judge(num_calls, task_weights, relative_excess_risk)
            return
        if torch.cuda.is_current_stream_capturing():
            return
        earlier = self._copy_under_way
        self._copy_under_way = _CopyUnderWay(num_calls, task_weights, relative_excess_risk)
        if earlier is not None and earlier.is_done():
            self._judge(earlier.num_calls, *earlier.values.unbind())

    def _judge(self, num_calls: int, task_weights: Tensor, relative_excess_risk: Tensor) -> None:
        effective = float(effective_num_tasks(task_weights))
        if not effective < FEWEST_EFFECTIVE_TASKS:
            self._looks.append(None)
            return
        heaviest = int(task_weights.argmax())
        self._looks.append(_Look(heaviest, relative_excess_risk.tolist()))
        collapsed = [look for look in self._looks if look is not None]
        if len(collapsed) < LOOKS_COLLAPSED:
            return
        largest = fmean(look.risks[look.heaviest] for look in collapsed)
        others: dict[int, float] = {}
        for task in range(len(task_weights)):
            risks = [look.risks[task] for look in collapsed if look.heaviest != task]
            if len(risks) >= LOOKS_COLLAPSED // 2:
                others[task] = fmean(risks)
        worst = max(others, key=lambda task: others[task])
        if not 0.0 < RISK_RATIO * largest <= others[worst]:
            return
        self.has_warned = True
        share = float(task_weights[heaviest] / task_weights.sum())
        warnings.warn(
            f"One task has nearly all the weight (now task {heaviest} with {share:.1%}; effective number of tasks "
            f"{effective:.2f} after {num_calls} steps), but the risks do not justify it: that of task {worst}, while "
            f"another was the heaviest, averaged {others[worst] / largest:.2g} times the heaviest's. Keep every task "
            f"in training with min_weight={0.5 / len(task_weights):.2g}, take a smaller robust_step_size, or start "
            'from ExcessMTL.from_preset("recommended").',
            TaskCollapseWarning,
            stacklevel=stacklevel_of_caller(),
        )


class _Look(NamedTuple):
    """What was seen of weights that had collapsed."""

    heaviest: int
    risks: list[float]


class _CopyUnderWay:
    """Weights and risks on their way from a GPU to the host."""

    def __init__(self, num_calls: int, task_weights: Tensor, relative_excess_risk: Tensor) -> None:
        self.num_calls = num_calls
        values = torch.stack([task_weights, relative_excess_risk])
        self.values = values.to("cpu", non_blocking=True)
        self._arrival = torch.cuda.Event()
        self._arrival.record(torch.cuda.current_stream(values.device))

    def is_done(self) -> bool:
        return self._arrival.query()

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return type(None), ()  # a copied or pickled guard takes its next look afresh
