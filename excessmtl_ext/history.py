"""Records weights and risks step by step on the device and flushes them to the host and to writers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from excessmtl_ext.arguments import check_count
from excessmtl_ext.gradient_statistics import (
    GRADIENT_QUANTITIES,
    GradientStatistics,
    RunningMean,
)
from excessmtl_ext.history_writers import (
    CSVWriter,
    HistoryRecords,
    HistoryWriter,
    TensorBoardWriter,
)
from excessmtl_ext.step import Step

__all__ = [
    "STATE_QUANTITIES",
    "CSVWriter",
    "History",
    "HistoryRecords",
    "HistoryWriter",
    "TensorBoardWriter",
]

STATE_QUANTITIES = (
    "task_weights",
    "excess_risk",
    "relative_excess_risk",
    "baseline_excess_risk",
    "found_nonfinite",
)
"""Attributes of a balancer, [T] each, that are kept where the method has them."""


class RecordedRule(Protocol):
    """What is recorded of a balancer, and what else it has of ``STATE_QUANTITIES``."""

    num_tasks: int
    num_calls: int
    task_weights: Tensor
    found_nonfinite: Tensor

    def pass_weights(self) -> Tensor:
        """Factors [T] of the task gradients."""
        ...


class History:
    """What a balancer did, see :meth:`excessmtl_ext.Balancer.record_history`, which makes it.

    A recorded step adds its [T] vectors to a ring on their device: three small kernels and no wait. A flush is one copy
    to the host. Nothing here changes a number of the balancer, and nothing is in its ``state_dict``; a copied or
    unpickled balancer has no history. Steps inside a CUDA graph are not recorded: its replays run no Python.

    Use as a context manager, or call :meth:`close`, so that the last records are written.

    Attributes:
        task_names: T names.
        every: Calls 1, 1 + every, 1 + 2 * every, ... of the balancer are recorded.
        has_gradients: Whether the gradient statistics are asked for.
        num_steps: Calls since the recording began, recorded or not.
        num_absent_steps: [T] calls in which each task was absent, recorded or not.
        wants_gradients: Whether the gradients of the next step are to be shown.
    """

    period = 1

    def __init__(
        self,
        rule: RecordedRule,
        *,
        every: int = 1,
        flush_every: int = 100,
        keep: int = 10_000,
        gradients: bool = False,
        task_names: Sequence[str] | None = None,
        writers: Iterable[HistoryWriter] = (),
    ) -> None:
        check_count("every", every, 1)
        check_count("flush_every", flush_every, 1)
        check_count("keep", keep, 1)
        num_tasks = rule.num_tasks
        names = tuple(f"task{task}" for task in range(num_tasks))
        if task_names is not None:
            names = tuple(task_names)
            if len(names) != num_tasks or len(set(names)) != num_tasks:
                raise ValueError(
                    f"Expected `task_names` to hold {num_tasks} different names, one per task, but got {names}."
                )
        self.task_names = names
        self.every = every
        self._flush_every = flush_every
        self._writers = tuple(writers)
        self._undelivered: list[deque[HistoryRecords]] = [deque() for _ in self._writers]
        self.has_gradients = gradients
        self.wants_gradients = gradients
        self._gradients = GradientStatistics(num_tasks) if gradients else None
        self._is_closed = False
        self._quantities = tuple(name for name in STATE_QUANTITIES if hasattr(rule, name))
        if gradients:
            self._quantities += GRADIENT_QUANTITIES
        self._ring: Tensor | None = None  # [flush_every, quantities, T]
        self._missing: Tensor | None = None  # [T] NaN
        self._num_nonfinite_steps: Tensor | None = None  # [T], on the device
        self._pending: list[
            tuple[int, list[bool]]
        ] = []  # step and present tasks of the ring's rows
        self._kept: deque[HistoryRecords] = deque()
        self._num_kept = 0
        self._keep = keep
        self.num_steps = 0
        self.num_absent_steps = [0] * num_tasks

    def __enter__(self) -> History:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        # Open files and the memory on the device stay with the balancer that is recorded.
        return type(None), ()

    @property
    def is_closed(self) -> bool:
        """Whether recording has ended."""
        return self._is_closed

    def records(self) -> HistoryRecords:
        """Returns the latest ``keep`` recorded steps. Flushes, so it waits for the device."""
        self.flush()
        if not self._kept:
            num_tasks = len(self.task_names)
            return HistoryRecords(
                self.task_names,
                torch.empty(0, dtype=torch.int64, device="cpu"),
                torch.empty(0, num_tasks, dtype=torch.bool, device="cpu"),
                {
                    name: torch.empty(0, num_tasks, dtype=torch.float64, device="cpu")
                    for name in self._quantities
                },
            )
        parts = list(self._kept)
        return HistoryRecords(
            self.task_names,
            torch.cat([part.steps for part in parts])[-self._keep :],
            torch.cat([part.is_present for part in parts])[-self._keep :],
            {
                name: torch.cat([part.values[name] for part in parts])[-self._keep :]
                for name in self._quantities
            },
        )

    def num_nonfinite_steps(self) -> list[int]:
        """Calls in which each task's gradient or loss was not finite, recorded or not. Waits for the device."""
        if self._num_nonfinite_steps is None:
            return [0] * len(self.task_names)
        return self._num_nonfinite_steps.tolist()

    def flush(self) -> None:
        """Brings what is on the device to the host in one copy and hands it to the writers.

        Every writer gets every record once: where one raises, the others get theirs before the error is raised, and the
        one that raised gets its records again at the next flush.
        """
        if not self._pending:
            self._deliver()
            return
        assert self._ring is not None
        values = self._ring[: len(self._pending)].to("cpu", copy=True)  # the ring is written again
        steps, present = zip(*self._pending, strict=True)
        self._pending = []
        records = HistoryRecords(
            self.task_names,
            torch.tensor(steps, dtype=torch.int64, device="cpu"),
            torch.tensor(present, dtype=torch.bool, device="cpu"),
            {name: values[:, index] for index, name in enumerate(self._quantities)},
        )
        self._kept.append(records)
        self._num_kept += len(steps)
        while self._num_kept - len(self._kept[0].steps) >= self._keep:
            self._num_kept -= len(self._kept.popleft().steps)
        for waiting in self._undelivered:
            waiting.append(records)
        self._deliver()

    def close(self) -> None:
        """Flushes, closes the writers and ends the recording; what was kept can still be read."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self.flush()
        finally:
            self._ring = self._gradients = None
            self.wants_gradients = False
            _ask_all([writer.close for writer in self._writers])

    def _deliver(self) -> None:
        def deliver(writer: HistoryWriter, waiting: deque[HistoryRecords]) -> None:
            while waiting:
                writer.write(waiting[0])
                waiting.popleft()

        _ask_all(
            [
                partial(deliver, writer, waiting)
                for writer, waiting in zip(self._writers, self._undelivered, strict=True)
            ]
        )

    def restart(self) -> None:
        """Forgets what was kept, after writing it: the balancer begins anew."""
        self.flush()
        self._kept.clear()
        self._num_kept = 0
        self._num_nonfinite_steps = None
        self.num_steps = 0
        self.num_absent_steps = [0] * len(self.task_names)
        if self._gradients is not None:
            self._gradients = GradientStatistics(len(self.task_names))

    # ---- as an observer

    def on_gradients(self, rule: RecordedRule, step: Step) -> None:
        """Takes in the task gradients of the step under way, before anything overwrites them."""
        grads = step.task_grads
        if (
            self._gradients is None
            or rule.num_calls % self.every != 0
            or _is_capturing(grads.tensors[0] if grads.tensors else None)
        ):
            return
        self._gradients.take(
            grads.tensors,
            grads.tasks,
            grads.layout.numels,
            step.grad_scale,
            keep_mean=not _keeps_mean(rule),
        )

    def on_end(self, rule: RecordedRule, step: Step, tasks: Sequence[int]) -> None:
        """Records a step whose state is written."""
        if self._is_closed or _is_capturing(rule.task_weights):
            return
        present = [False] * len(self.task_names)
        for task in tasks:
            present[task] = True
        self.num_steps += 1
        for task, was in enumerate(present):
            self.num_absent_steps[task] += not was
        flags = rule.found_nonfinite
        if self._num_nonfinite_steps is None:
            self._num_nonfinite_steps = torch.zeros(
                len(present), dtype=torch.int64, device=flags.device
            )
        elif self._num_nonfinite_steps.device != flags.device:
            self._num_nonfinite_steps = self._num_nonfinite_steps.to(flags.device)
        self._num_nonfinite_steps += flags
        if (rule.num_calls - 1) % self.every != 0:
            return
        ring = self._prepared_ring(rule)
        vectors = [
            getattr(rule, name).to(torch.float64)
            for name in STATE_QUANTITIES
            if hasattr(rule, name)
        ]
        if self._gradients is not None:
            assert self._missing is not None
            if self._gradients.has_step:
                mean = _running_mean(rule) if _keeps_mean(rule) else None
                vectors += self._gradients.end_step(rule.pass_weights(), mean)
            else:
                vectors += [self._missing] * len(GRADIENT_QUANTITIES)
        torch.stack(vectors, out=ring[len(self._pending)])
        self._pending.append((rule.num_calls, present))
        if len(self._pending) == self._flush_every:
            self.flush()

    def _prepared_ring(self, rule: RecordedRule) -> Tensor:
        device = rule.task_weights.device
        if self._ring is None or self._ring.device != device:
            self.flush()  # from where the balancer was
            shape = (self._flush_every, len(self._quantities), len(self.task_names))
            self._ring = torch.empty(shape, dtype=torch.float64, device=device)
            self._missing = torch.full(shape[2:], float("nan"), dtype=torch.float64, device=device)
        return self._ring


def _ask_all(calls: Sequence[Callable[[], None]]) -> None:
    """Makes every call in turn, also after one has raised; raises the last error at the end."""
    with ExitStack() as stack:
        for call in reversed(calls):
            stack.callback(call)


def _keeps_mean(rule: RecordedRule) -> bool:
    """Tells whether the balancer's state has a running mean of the gradients (``gradient_momentum`` of ExcessMTL)."""
    return getattr(rule, "gradient_momentum", 0.0) > 0.0 and hasattr(rule, "grad_mean")


def _running_mean(rule: Any) -> RunningMean:
    return RunningMean(
        torch.linalg.vector_norm(rule.grad_mean, dim=1, dtype=torch.float64).square(),
        rule.num_task_steps,
        rule.gradient_momentum,
    )


def _is_capturing(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_cuda and torch.cuda.is_current_stream_capturing()
