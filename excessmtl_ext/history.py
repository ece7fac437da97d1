"""What a balancer did, step by step: kept on the device, brought to the host every n steps, written where one likes."""

from __future__ import annotations

import csv
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from excessmtl_ext.arguments import check_count
from excessmtl_ext.gradient_statistics import (
    GRADIENT_QUANTITIES,
    GradientStatistics,
    RunningMean,
)

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from excessmtl_ext.balancer import Balancer

STATE_QUANTITIES = (
    "task_weights",
    "excess_risk",
    "relative_excess_risk",
    "baseline_excess_risk",
    "found_nonfinite",
)
"""Attributes of a balancer, [T] each, that are kept where the method has them."""

_COLUMN_NAMES = {"task_weights": "weight", "found_nonfinite": "nonfinite"}


@dataclass(frozen=True)
class HistoryRecords:
    """N recorded steps of T tasks, on the CPU.

    Attributes:
        task_names: T names.
        steps: [N] int64: which call of the balancer, from 1.
        is_present: [N, T] bool: whether the task had a loss or a gradient.
        values: [N, T] float64 by quantity (``STATE_QUANTITIES``, ``GRADIENT_QUANTITIES``); only those that the method
            has. NaN where a step has none, as the gradient norm of an absent task.
    """

    task_names: tuple[str, ...]
    steps: Tensor
    is_present: Tensor
    values: dict[str, Tensor]

    @property
    def is_skipped(self) -> Tensor:
        """[N] bool: whether a gradient was not finite, so that the step changed no state."""
        return self.values["found_nonfinite"].any(1)

    def columns(self) -> Iterator[tuple[str, Tensor]]:
        """Name and [N] values of every curve, named like the columns of a run's metrics.csv."""
        yield "balancer/skipped", self.is_skipped.double()
        for task, name in enumerate(self.task_names):
            yield f"balancer/{name}_present", self.is_present[:, task].double()
            for quantity, values in self.values.items():
                yield f"balancer/{name}_{_COLUMN_NAMES.get(quantity, quantity)}", values[:, task]


class HistoryWriter(Protocol):
    """Takes the records of a history, in order, once per flush."""

    def write(self, records: HistoryRecords) -> None:
        """Takes at least one record."""
        ...

    def close(self) -> None:
        """Called once, after the last records."""
        ...


class CSVWriter:
    """Writes one row per record, with a header; a quantity that a step does not have is ``nan``.

    Args:
        path: The file; its folder is made.
        append: Go on with a file that is there, as after resuming a run.

    Raises:
        FileExistsError: the file is there and ``append`` is False.
    """

    def __init__(self, path: str | Path, *, append: bool = False) -> None:
        self.path = Path(path)
        if self.path.exists() and not append:
            raise FileExistsError(
                f"Expected `path` of a new file, but {self.path} is there. Pass append=True to go on with it."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()

    def write(self, records: HistoryRecords) -> None:
        """Appends the records.

        Raises:
            ValueError: the file was begun with other columns.
        """
        names, columns = zip(*records.columns(), strict=True)
        header = ["step", *names]
        with self.path.open("r+", newline="") as file:
            begun = next(csv.reader(file), None)
            if begun not in (None, header):
                raise ValueError(
                    f"Expected {self.path} to have the columns of this history, but it was begun by a balancer with "
                    "other tasks or quantities. Name another file."
                )
            file.seek(0, 2)
            writer = csv.writer(file, lineterminator="\n")
            if begun is None:
                writer.writerow(header)
            rows = torch.stack(columns, dim=1).tolist()
            for step, row in zip(records.steps.tolist(), rows, strict=True):
                writer.writerow([step, *(format(value, ".9g") for value in row)])

    def close(self) -> None:
        """Does nothing: the file is closed after every flush, so that a killed run has all that was flushed."""


class TensorBoardWriter:
    """Writes every quantity of every task as a scalar ``balancer/TASK_QUANTITY``.

    Args:
        destination: Folder of the event files, or a ``SummaryWriter``, which its owner closes.

    Raises:
        ModuleNotFoundError: ``destination`` is a folder and tensorboard is not installed.
    """

    def __init__(self, destination: str | Path | SummaryWriter) -> None:
        self._is_owner = isinstance(destination, (str, Path))
        self._writer: Any = destination
        if self._is_owner:
            try:
                from torch.utils.tensorboard.writer import SummaryWriter
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    "TensorBoardWriter needs tensorboard, which is not installed: pip install tensorboard.",
                    name=error.name,
                ) from error
            self._writer = SummaryWriter(str(destination))

    def write(self, records: HistoryRecords) -> None:
        """Adds the records; NaN is left out."""
        steps = records.steps.tolist()
        for name, values in records.columns():
            for step, value in zip(steps, values.tolist(), strict=True):
                if not math.isnan(value):
                    self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        if self._is_owner:
            self._writer.close()


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
    """

    def __init__(
        self,
        balancer: Balancer,
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
        num_tasks = balancer.num_tasks
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
        self.has_gradients = gradients
        self._gradients = GradientStatistics(num_tasks) if gradients else None
        self._is_closed = False
        self._quantities = tuple(name for name in STATE_QUANTITIES if hasattr(balancer, name))
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
        return type(
            None
        ), ()  # open files and a device's ring stay with the balancer that is recorded

    @property
    def is_closed(self) -> bool:
        """Whether recording has ended."""
        return self._is_closed

    def records(self) -> HistoryRecords:
        """The latest ``keep`` recorded steps. Flushes, so it waits for the device."""
        self.flush()
        if not self._kept:
            num_tasks = len(self.task_names)
            return HistoryRecords(
                self.task_names,
                torch.empty(0, dtype=torch.int64),
                torch.empty(0, num_tasks, dtype=torch.bool),
                {name: torch.empty(0, num_tasks, dtype=torch.float64) for name in self._quantities},
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
        """Brings what is on the device to the host in one copy and hands it to the writers."""
        if not self._pending:
            return
        assert self._ring is not None
        values = self._ring[: len(self._pending)].to("cpu", copy=True)  # the ring is written again
        steps, present = zip(*self._pending, strict=True)
        self._pending = []
        records = HistoryRecords(
            self.task_names,
            torch.tensor(steps, dtype=torch.int64),
            torch.tensor(present, dtype=torch.bool),
            {name: values[:, index] for index, name in enumerate(self._quantities)},
        )
        self._kept.append(records)
        self._num_kept += len(steps)
        while self._num_kept - len(self._kept[0].steps) >= self._keep:
            self._num_kept -= len(self._kept.popleft().steps)
        for writer in self._writers:
            writer.write(records)

    def close(self) -> None:
        """Flushes, closes the writers and ends the recording; what was kept can still be read."""
        if self._is_closed:
            return
        self._is_closed = True
        self.flush()
        for writer in self._writers:
            writer.close()
        self._ring = self._gradients = None

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

    # ---- what the balancer calls

    def take_gradients(
        self,
        balancer: Balancer,
        num_calls: int,
        task_grads: Sequence[Tensor],
        tasks: Sequence[int],
        numels: Sequence[int],
        scale: Tensor | None,
    ) -> None:
        """Looks at task gradients of the step under way, before anything overwrites them.

        Args:
            balancer: Whose step it is.
            num_calls: Calls before this one.
            task_grads: Gradients of ``tasks``, task-major; without elements where there is none.
            tasks: All tasks, or the one that streams in.
            numels: Sizes of the shared parameters.
            scale: What the gradients are multiplied by, or None.
        """
        if (
            self._gradients is None
            or num_calls % self.every != 0
            or _is_capturing(task_grads[0] if task_grads else None)
        ):
            return
        self._gradients.take(task_grads, tasks, numels, scale, keep_mean=not _keeps_mean(balancer))

    def end_step(self, balancer: Balancer, num_calls: int, tasks: Sequence[int]) -> None:
        """Records a step whose state is written.

        Args:
            balancer: Whose step it was.
            num_calls: Calls so far, this one counted.
            tasks: Those that were present.
        """
        if self._is_closed or _is_capturing(balancer.task_weights):
            return
        present = [False] * len(self.task_names)
        for task in tasks:
            present[task] = True
        self.num_steps += 1
        for task, was in enumerate(present):
            self.num_absent_steps[task] += not was
        flags = balancer.found_nonfinite
        if self._num_nonfinite_steps is None:
            self._num_nonfinite_steps = torch.zeros(
                len(present), dtype=torch.int64, device=flags.device
            )
        elif self._num_nonfinite_steps.device != flags.device:
            self._num_nonfinite_steps = self._num_nonfinite_steps.to(flags.device)
        self._num_nonfinite_steps += flags
        if (num_calls - 1) % self.every != 0:
            return
        ring = self._prepared_ring(balancer)
        vectors = [
            getattr(balancer, name).to(torch.float64)
            for name in STATE_QUANTITIES
            if hasattr(balancer, name)
        ]
        if self._gradients is not None:
            assert self._missing is not None
            if self._gradients.has_step:
                mean = _running_mean(balancer) if _keeps_mean(balancer) else None
                vectors += self._gradients.end_step(balancer.task_weights, mean)
            else:
                vectors += [self._missing] * len(GRADIENT_QUANTITIES)
        torch.stack(vectors, out=ring[len(self._pending)])
        self._pending.append((num_calls, present))
        if len(self._pending) == self._flush_every:
            self.flush()

    def _prepared_ring(self, balancer: Balancer) -> Tensor:
        device = balancer.task_weights.device
        if self._ring is None or self._ring.device != device:
            self.flush()  # from where the balancer was
            shape = (self._flush_every, len(self._quantities), len(self.task_names))
            self._ring = torch.empty(shape, dtype=torch.float64, device=device)
            self._missing = torch.full(shape[2:], float("nan"), dtype=torch.float64, device=device)
        return self._ring


def _keeps_mean(balancer: Balancer) -> bool:
    """Whether the balancer's own state has a running mean of the gradients (``gradient_momentum`` of ExcessMTL)."""
    return getattr(balancer, "gradient_momentum", 0.0) > 0.0 and hasattr(balancer, "grad_mean")


def _running_mean(balancer: Any) -> RunningMean:
    return RunningMean(
        torch.linalg.vector_norm(balancer.grad_mean, dim=1, dtype=torch.float64).square(),
        balancer.num_task_steps,
        balancer.gradient_momentum,
    )


def _is_capturing(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_cuda and torch.cuda.is_current_stream_capturing()
