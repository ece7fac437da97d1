"""A table of how each task fares, and a sentence on which task looks noisy or stuck, with the evidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from torch import Tensor

from excessmtl_ext.gradient_statistics import GRADIENT_QUANTITIES
from excessmtl_ext.history import History
from excessmtl_ext.history_writers import HistoryRecords
from excessmtl_ext.step import Batched

NOT_RECORDED = "not recorded"

WINDOW = 100
"""Records at the end, and at the start, over which the gradient statistics are averaged; half if fewer than 200."""

FEWEST_STEPS = 20
"""Fewer records with gradients are no evidence."""

NOISY_SHARE = 0.9
"""From here on a task's gradients have next to nothing in common from one step to the next.

True of most tasks once mini-batches are small or training is under way: no evidence of label noise by itself."""

UNSHRUNK = 0.7
"""A gradient of at least this share of its length at the start has not shrunk: the task has got no nearer."""

OUTGROWN = 1.5
"""Label noise shows in the comparison: gradients of the other tasks shrink, those of wrong labels stay or grow.

On digit pairs (10 epochs, 3 seeds, preset "recommended") the ratio of final to first length of the task with 40 % or
80 % wrong labels was 1.9 to 2.6 times the clean one's; without noise the two differed by at most 1.1."""

CONSISTENT_SHARE = 0.5
"""Below this most of a task's squared gradient points the same way at every step."""

IGNORED_COSINE = 0.1
"""Below this the combined gradient hardly helps the task."""


@dataclass(frozen=True)
class TaskReport:
    """One task; None where a number was not recorded.

    Attributes:
        name: Of the task.
        weight: Now.
        excess_risk: Of its latest step, for ExcessMTL.
        baseline: What the risk is divided by, 0 before there is one.
        relative_risk: Risk over baseline.
        gradient_norm: Mean over the latest ``WINDOW`` records.
        noise_share: Part of the mean squared gradient that is variance between steps, 0 to 1; see
            :class:`excessmtl_ext.gradient_statistics.GradientStatistics`.
        cosine: With the combined gradient, mean over the latest ``WINDOW`` records.
        skipped_steps: Steps that this task's non-finite gradients spoilt, since recording began.
        absent_steps: Steps without a label for it; since recording began, or for ExcessMTL of all that counted.
        first_gradient_norm: Mean over the first ``WINDOW`` records that are kept.
        num_gradients: Records with a gradient of this task.
    """

    name: str
    weight: float
    excess_risk: float | None = None
    baseline: float | None = None
    relative_risk: float | None = None
    gradient_norm: float | None = None
    noise_share: float | None = None
    cosine: float | None = None
    skipped_steps: int | None = None
    absent_steps: int | None = None
    first_gradient_norm: float | None = None
    num_gradients: int = 0

    @property
    def gradient_trend(self) -> float | None:
        """Gradient norm now over that at the start of the record; None where either is unknown."""
        if self.gradient_norm is None or not self.first_gradient_norm:
            return None
        return self.gradient_norm / self.first_gradient_norm

    def is_noisy(self, others: Sequence[TaskReport]) -> bool:
        """Its gradients cancel from step to step and have not shrunk as those of some other task have."""
        trends = [task.gradient_trend for task in others if task.gradient_trend is not None]
        return (
            self._has_evidence
            and self._noise_share >= NOISY_SHARE
            and self._trend >= UNSHRUNK
            and self._trend >= OUTGROWN * min(trends, default=1.0)
        )

    def is_stuck(self) -> bool:
        """Its gradients agree from step to step and have not shrunk, and the combined gradient ignores them."""
        return (
            self._has_evidence
            and self._noise_share <= CONSISTENT_SHARE
            and self._trend >= UNSHRUNK
            and self.cosine is not None
            and self.cosine < IGNORED_COSINE
        )

    @property
    def _has_evidence(self) -> bool:
        return self.num_gradients >= FEWEST_STEPS and self.gradient_trend is not None

    @property
    def _noise_share(self) -> float:
        return math.nan if self.noise_share is None else self.noise_share

    @property
    def _trend(self) -> float:
        return math.nan if self.gradient_trend is None else self.gradient_trend


@dataclass(frozen=True)
class BalancerReport:
    """What :meth:`excessmtl_ext.Balancer.report` gives; ``print`` it for the table.

    Attributes:
        method: Class of the balancer.
        num_steps: Steps that changed its state.
        num_skipped_steps: Steps with a gradient that was not finite.
        tasks: T rows.
        finding: Which task looks noisy or stuck, with the evidence, or why that cannot be said.
        backward_mode: How the encoder's passes run and why, where ``batched`` was asked for.
    """

    method: str
    num_steps: int
    num_skipped_steps: int
    tasks: tuple[TaskReport, ...]
    finding: str
    backward_mode: str | None = None

    def __str__(self) -> str:
        head = f"{self.method} after {_count(self.num_steps, 'step')}, {self.num_skipped_steps} skipped"
        columns = [
            [title, *(_cell(getattr(task, name)) for task in self.tasks)]
            for name, title in _COLUMNS
        ]
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(
                cell.ljust(width) if index == 0 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in zip(*columns, strict=True)
        ]
        passes = [] if self.backward_mode is None else [f"Encoder: {self.backward_mode}.", ""]
        return "\n".join([head, "", *lines, "", *passes, self.finding])


_COLUMNS = (
    ("name", "task"),
    ("weight", "weight"),
    ("excess_risk", "risk"),
    ("baseline", "baseline"),
    ("relative_risk", "relative risk"),
    ("gradient_norm", "gradient norm"),
    ("noise_share", "noise share"),
    ("cosine", "cosine"),
    ("skipped_steps", "skipped"),
    ("absent_steps", "absent"),
)
assert {name for name, _ in _COLUMNS} < {field.name for field in fields(TaskReport)}


class ReportedRule(Protocol):
    """What a report reads of a balancer; risks where the method has them."""

    requires: frozenset[str]
    num_tasks: int
    batched: Batched
    history: History | None
    task_weights: Tensor
    num_steps: Tensor
    num_skipped_steps: Tensor

    @property
    def backward_mode(self) -> str:
        """How the encoder's passes ran, and why."""
        ...


def make_report(rule: ReportedRule) -> BalancerReport:
    """See :meth:`excessmtl_ext.Balancer.report`."""
    history = rule.history
    state = {
        name: getattr(rule, attribute).tolist()
        for name, attribute in (
            ("weight", "task_weights"),
            ("excess_risk", "excess_risk"),
            ("baseline", "baseline_excess_risk"),
            ("relative_risk", "relative_excess_risk"),
        )
        if hasattr(rule, attribute)
    }
    num_steps = int(rule.num_steps)
    num_task_steps: Any = getattr(rule, "num_task_steps", None)
    if num_task_steps is not None:
        state["absent_steps"] = [num_steps - taken for taken in num_task_steps.tolist()]
    names: Sequence[str] = [f"task{task}" for task in range(rule.num_tasks)]
    if history is not None:
        names = history.task_names
        state["skipped_steps"] = history.num_nonfinite_steps()
        state.setdefault("absent_steps", history.num_absent_steps)
        if history.has_gradients:
            state |= _gradient_summary(history.records())
    tasks = tuple(
        TaskReport(name, **{field: values[task] for field, values in state.items()})
        for task, name in enumerate(names)
    )
    return BalancerReport(
        method=type(rule).__name__,
        num_steps=num_steps,
        num_skipped_steps=int(rule.num_skipped_steps),
        tasks=tasks,
        finding=_finding(rule, tasks),
        backward_mode=None if rule.batched is False else rule.backward_mode,
    )


def _gradient_summary(records: HistoryRecords) -> dict[str, list[Any]]:
    """Returns [T] lists by field of TaskReport; None where a task has no record with a gradient."""
    norms, cosines, shares = (records.values[name] for name in GRADIENT_QUANTITIES)

    def mean(values: Tensor) -> float | None:
        return float(values.mean()) if len(values) else None

    summary: dict[str, list[Any]] = {
        "gradient_norm": [],
        "first_gradient_norm": [],
        "cosine": [],
        "noise_share": [],
        "num_gradients": [],
    }
    for task in range(len(records.task_names)):
        norm, cosine, share = (
            values[~values.isnan()]
            for values in (norms[:, task], cosines[:, task], shares[:, task])
        )
        window = max(1, min(WINDOW, len(norm) // 2))  # the start and the end do not overlap
        summary["gradient_norm"].append(mean(norm[-window:]))
        summary["first_gradient_norm"].append(mean(norm[:window]))
        summary["cosine"].append(mean(cosine[-WINDOW:]))
        summary["noise_share"].append(mean(share[-1:]))  # a running mean already
        summary["num_gradients"].append(len(norm))
    return summary


def _finding(rule: ReportedRule, tasks: Sequence[TaskReport]) -> str:
    sentences = [_skips(task) for task in tasks if task.skipped_steps]
    noisy = [task for task in tasks if task.is_noisy([other for other in tasks if other != task])]
    stuck = [task for task in tasks if task.is_stuck()]
    for task in noisy:
        others = [other.gradient_trend for other in tasks if other != task and other.gradient_trend]
        compared = f", where another task's are {min(others):.2f} times as long" if others else ""
        sentences.append(
            f"{task.name} looks noisy: {task.noise_share:.0%} of its squared gradient is variance from step to step, "
            f"and its gradients are {task.gradient_trend:.2f} times as long as when the record began{compared}"
            f"{_risk_and_weight(task)}."
        )
    sentences += [
        f"{task.name} looks stuck: its gradients agree from step to step (noise share {task.noise_share:.0%}) and are "
        f"{task.gradient_trend:.2f} times as long as when the record began, but the combined gradient hardly follows "
        f"them (cosine {task.cosine:.2f}){_risk_and_weight(task)}."
        for task in stuck
    ]
    if not noisy and not stuck:
        sentences.append(_why_nothing(rule, tasks))
    return " ".join(sentences)


def _why_nothing(rule: ReportedRule, tasks: Sequence[TaskReport]) -> str:
    """Says that no task stands out, or what is missing to judge it."""
    history = rule.history
    num_gradients = min(task.num_gradients for task in tasks)
    if history is None or not history.has_gradients:
        return (
            f"{_heaviest(tasks)}. Whether a task is noisy or stuck needs its gradients, which are {NOT_RECORDED}: call "
            "balancer.record_history(gradients=True) before training."
        )
    if "task_grads" not in rule.requires:
        return (
            f"{_heaviest(tasks)}. Whether a task is noisy or stuck cannot be said: {type(rule).__name__} never "
            "sees the gradient of one task alone."
        )
    if num_gradients < FEWEST_STEPS:
        return (
            f"Too early to say which task is noisy or stuck: {num_gradients} of at least {FEWEST_STEPS} records have a "
            "gradient of every task."
        )
    shares = [task.noise_share for task in tasks if task.noise_share is not None]
    trends = [task.gradient_trend for task in tasks if task.gradient_trend is not None]
    evidence = ""
    if shares and trends:
        evidence = (
            f" Noise shares lie between {min(shares):.0%} and {max(shares):.0%}, and gradients are "
            f"{min(trends):.2f} to {max(trends):.2f} times as long as when the record began."
        )
    return f"No task looks noisy or stuck.{evidence}"


def _heaviest(tasks: Sequence[TaskReport]) -> str:
    heaviest = max(tasks, key=lambda task: task.weight)
    share = heaviest.weight / sum(task.weight for task in tasks)
    risks = [task for task in tasks if task.relative_risk is not None]
    if not risks:
        return f"{heaviest.name} has the largest weight ({share:.0%})"
    farthest = max(risks, key=lambda task: task.relative_risk or 0.0)
    return (
        f"{heaviest.name} has the largest weight ({share:.0%}), {farthest.name} the largest relative risk "
        f"({farthest.relative_risk:.3g})"
    )


def _risk_and_weight(task: TaskReport) -> str:
    risk = "" if task.relative_risk is None else f"relative risk {task.relative_risk:.3g}, "
    return f"; {risk}weight {task.weight:.3g}"


def _skips(task: TaskReport) -> str:
    assert task.skipped_steps is not None
    return (
        f"{task.name} had gradients that were not finite in {_count(task.skipped_steps, 'step')}, which were skipped: "
        "look for a NaN or an overflow in its loss."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _cell(value: str | float | None) -> str:
    if value is None:
        return NOT_RECORDED
    return f"{value:.3g}" if isinstance(value, float) else str(value)
