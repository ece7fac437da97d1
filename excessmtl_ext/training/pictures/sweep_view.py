"""The runs of one sweep as figures ask for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from excessmtl_ext.training.run.methods import METHODS
from excessmtl_ext.training.run.workloads import WORKLOADS
from excessmtl_ext.training.sweep.results import Row, SweepResults, common_metric

# The noise level of the figures that show one: the paper's Figs. 2, 3 and 4.
SHOWN_NOISE = 0.8

SINGLE_TASK = "single-task"


class SweepView:
    """The runs of one sweep as figures ask for them."""

    def __init__(self, results: SweepResults) -> None:
        self.results = results
        settings = results.settings
        self.dataset: str = settings["dataset"]
        self.title = WORKLOADS[self.dataset].title
        self.tasks: list[str] = [task["name"] for task in settings["tasks"]]
        self.noisy = [task["name"] for task in settings["tasks"] if task["is_noisy"]]
        self.clean = [task for task in self.tasks if task not in self.noisy]
        self.metric = common_metric(settings["tasks"])
        present = {row["method"] for row in results.runs}
        self.methods = [name for name in METHODS if name in present]
        self.noise = sorted({row["noise"] for row in results.runs if not row["task"]})
        self._epochs: dict[tuple[Any, ...], list[Row]] = {}
        for row in results.epochs:
            key = (row["method"], row["task"], row["noise"], row["seed"])
            self._epochs.setdefault(key, []).append(row)

    @property
    def shown_noise(self) -> float:
        """The level nearest to 80 %."""
        return min(self.noise, key=lambda noise: abs(noise - SHOWN_NOISE))

    def runs(self, method: str, noise: float, task: str = "") -> list[Row]:
        """Returns one row of results.csv per seed."""
        if task in self.clean:
            noise = 0.0  # that of the run which serves all levels
        return [
            row
            for row in self.results.runs
            if (row["method"], row["task"], row["noise"]) == (method, task, noise)
        ]

    def epochs(self, run: Row) -> list[Row]:
        """Returns the rows of epochs.csv of a run."""
        return self._epochs.get((run["method"], run["task"], run["noise"], run["seed"]), [])

    def alone(self, task: str, noise: float, column: str) -> list[float]:
        """Returns a column of the runs that train a task alone, one value per seed."""
        return [row[column] for row in self.runs(SINGLE_TASK, noise, task)]

    def describe(self, methods: Iterable[str]) -> str:
        """Says on what the numbers stand: images, epochs, seeds."""
        chosen = set(methods)
        rows = [row for row in self.results.runs if row["method"] in chosen]
        counts = _spanned(row["num_train"] for row in rows)
        epochs = _spanned(row["epochs"] for row in rows)
        cells: dict[tuple[Any, ...], int] = {}
        for row in rows:
            key = (row["method"], row["task"], row["noise"])
            cells[key] = cells.get(key, 0) + 1
        seeds = _spanned(cells.values())
        return f"{counts} training samples, {epochs} epochs, {seeds} seed{'s' * (seeds != '1')}"


def _spanned(values: Iterable[float]) -> str:
    """Returns the number that all have in common, or the range."""
    present = sorted({int(value) for value in values})
    if not present:
        return "0"
    low, high = present[0], present[-1]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
