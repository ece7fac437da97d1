"""Records of a history, and writers that take them: a CSV file, TensorBoard."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

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
        """Returns the name and [N] values of every curve, named like the columns of a run's metrics.csv."""
        yield "balancer/skipped", self.is_skipped.double()
        for task, name in enumerate(self.task_names):
            yield f"balancer/{name}_present", self.is_present[:, task].double()
            for quantity, values in self.values.items():
                yield f"balancer/{name}_{_COLUMN_NAMES.get(quantity, quantity)}", values[:, task]


class HistoryWriter(Protocol):
    """Takes the records of a history, in order, once per flush."""

    def write(self, records: HistoryRecords) -> None:
        """Takes at least one record; records that it raises at are handed to it again at the next flush."""
        ...

    def close(self) -> None:
        """Closes the writer: called once, after the last records."""
        ...


class CSVWriter:
    """Writes one row per record, with a header; a quantity that a step does not have is ``nan``.

    A row is there as a whole or not at all: half a row, which a killed process or a full disk has left, is cut off
    before the next one is written.

    Args:
        path: The file; its folder is made.
        append: Go on with a file that is there, after resuming the training that wrote it. Rows at its end from the
            first new step on are replaced: the resumed training makes them again.

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
        self._end: int | None = None  # of what has been written as a whole

    def write(self, records: HistoryRecords) -> None:
        """Appends the records: all of them or, where this fails, none.

        Raises:
            ValueError: the file was begun with other columns.
        """
        names, columns = zip(*records.columns(), strict=True)
        header = ["step", *names]
        steps = records.steps.tolist()
        with self.path.open("r+b") as file:
            if self._end is None:
                self._end = self._find_end(file, header, steps[0])
            file.truncate(self._end)
            file.seek(self._end)
            rows: list[list[Any]] = [header] if self._end == 0 else []
            values = torch.stack(columns, dim=1).tolist()
            for step, row in zip(steps, values, strict=True):
                rows.append([step, *(format(value, ".9g") for value in row)])
            file.write(_as_csv(rows))
            file.flush()
            self._end = file.tell()

    def close(self) -> None:
        """Does nothing: the file is closed after every flush, so that a killed run has all that was flushed."""

    def _find_end(self, file: BinaryIO, header: list[str], first_step: int) -> int:
        """Returns where to go on: behind the last whole row of a step before ``first_step``; 0 for a new file."""
        expected = _as_csv([header])
        begin = file.readline()
        if begin != expected and (begin.endswith(b"\n") or not expected.startswith(begin)):
            raise ValueError(
                f"Expected {self.path} to have the columns of this history, but it was begun by a balancer with "
                "other tasks or quantities. Name another file."
            )
        if begin != expected:
            return 0  # nothing, or half a header
        position = end = len(begin)
        for row in file:
            position += len(row)
            if not row.endswith(b"\n"):
                break
            step = row.partition(b",")[0]
            # Of rows of several trainings only those at the end are made again.
            if not step.isdigit() or int(step) < first_step:
                end = position
        return end


def _as_csv(rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


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
