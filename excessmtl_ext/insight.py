"""What a balancer tells about itself: the history of its steps, a report on the tasks, its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from excessmtl_ext.history import History, HistoryWriter
from excessmtl_ext.memory import MemoryReport, make_memory_report
from excessmtl_ext.report import BalancerReport, make_report
from excessmtl_ext.saved_state import StateModule
from excessmtl_ext.step import Engine, Observer


class Insight(StateModule):
    """Adds a balancer's record, report and memory report; none of them changes a number of it."""

    engine: Engine
    observers: list[Observer]

    history: History | None
    """The history that :meth:`record_history` began last, or None."""

    def record_history(
        self,
        *,
        every: int = 1,
        flush_every: int = 100,
        keep: int = 10_000,
        gradients: bool = False,
        task_names: Sequence[str] | None = None,
        writers: Iterable[HistoryWriter] = (),
    ) -> History:
        """Records weights, risks and skipped steps from now on, without changing any of them.

        A recorded step adds three small kernels and waits for nothing; a flush is one copy to the host. Close
        the history, or use it in a ``with`` statement, so that the last records are written. Not in ``state_dict``.

        Args:
            every: Record calls 1, 1 + every, 1 + 2 * every, ...
            flush_every: Records on the device between two flushes.
            keep: Latest records that stay in the host's memory, for ``history.records()`` and :meth:`report`.
            gradients: Also the norm of each task's gradient, its noise share and its cosine with the combined
                gradient, in recorded steps that compute task gradients. For the cost see
                :class:`excessmtl_ext.gradient_statistics.GradientStatistics`; a larger ``every``
                divides it. No cosine in streaming, where only one gradient lives at a time.
            task_names: T names for writers and report.
            writers: Such as :class:`excessmtl_ext.history.CSVWriter` and ``TensorBoardWriter``. With several
                processes, give writers to one.

        Raises:
            RuntimeError: a history is being recorded already.
            ValueError: an argument is out of range.
        """
        if self.history is not None and not self.history.is_closed:
            raise RuntimeError(
                "Expected no history under way, but one is being recorded. Call history.close() first."
            )
        if gradients and self.engine.statistics_obstacle is not None:
            raise NotImplementedError(self.engine.statistics_obstacle)
        history = History(
            cast(Any, self),
            every=every,
            flush_every=flush_every,
            keep=keep,
            gradients=gradients,
            task_names=task_names,
            writers=writers,
        )
        self.observers = [each for each in self.observers if each is not self.history] + [history]
        self.history = history
        return history

    def report(self) -> BalancerReport:
        """Tells how each task fares, to print: weight, risk, gradient, skips, and which task looks noisy or stuck.

        Gradient norm, noise share and cosine need ``record_history(gradients=True)``. Waits for the device.
        """
        return make_report(cast(Any, self))

    def memory_report(self, step: Callable[[], object] | None = None) -> MemoryReport:
        """Tells what the balancer holds and what a step adds, in bytes by kind, and a measured peak; to print.

        Args:
            step: One training step, called once and measured: the most it added to what was there, activations and
                all. None: the peak of the process so far, by torch's allocator on CUDA, else of its resident set.

        Raises:
            ValueError: the balancer was made without parameters and has seen no gradient.
        """
        return make_memory_report(cast(Any, self), step)
