"""What one workload of the training step's benchmark gave, to and from JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from timing import Ratio, Timing, best_ratio
from timing import ratio as ratio_of

from training_step.workloads import Section


@dataclass(frozen=True)
class RowResult:
    """One row's timing and peak, or the reason why there are none.

    Attributes:
        timing: Seconds per step.
        peak_bytes: Most bytes of torch's allocator at one time.
        difference: From the row it must agree with.
        reason: Why it did not run.
    """

    timing: Timing | None = None
    peak_bytes: int | None = None
    difference: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Measurement:
    """All rows of one workload.

    Attributes:
        key: Of the workload.
        title: Of the workload.
        section: Of the workload.
        num_tasks: T.
        num_shared: P.
        num_params: P and the heads.
        rows: By key, in the order of ``ROWS``.
        labels: Of the rows, by key.
        load_averages: Before and after.
    """

    key: str
    title: str
    section: Section
    num_tasks: int
    num_shared: int
    num_params: int
    rows: dict[str, RowResult]
    labels: dict[str, str]
    load_averages: dict[str, list[float]] = field(default_factory=dict)

    def timing(self, key: str) -> Timing | None:
        return self.rows[key].timing if key in self.rows else None

    def ratio(self, key: str, other: str) -> Ratio | None:
        mine, theirs = self.timing(key), self.timing(other)
        return None if mine is None or theirs is None else ratio_of(mine, theirs)

    def best_ratio(self, key: str, other: str) -> float | None:
        mine, theirs = self.timing(key), self.timing(other)
        return None if mine is None or theirs is None else best_ratio(mine, theirs)

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "title": self.title,
            "section": self.section,
            "num_tasks": self.num_tasks,
            "num_shared": self.num_shared,
            "num_params": self.num_params,
            "load_averages": self.load_averages,
            "rows": {key: self._row_to_json(key, result) for key, result in self.rows.items()},
        }

    def _row_to_json(self, key: str, result: RowResult) -> dict[str, Any]:
        facts: dict[str, Any] = {"label": self.labels[key]}
        if result.reason is not None:
            facts["reason"] = result.reason
        if result.difference is not None:
            facts["difference"] = result.difference
        if result.peak_bytes is not None:
            facts["peak_bytes"] = result.peak_bytes
        if result.timing is not None:
            facts["median_ms"] = result.timing.median_s * 1e3
            facts["min_ms"] = result.timing.min_s * 1e3
            facts["quartiles_ms"] = [value * 1e3 for value in result.timing.quartiles_s()]
            for other in ("uniform", "lower_bound"):
                found = self.ratio(key, other)
                if found is not None:
                    facts[f"ratio_to_{other}"] = found.median
                    facts[f"ratio_to_{other}_quartiles"] = [found.low, found.high]
            facts["rounds"] = len(result.timing.samples)
            facts["samples_ms"] = [value * 1e3 for value in result.timing.samples]
        return facts

    @staticmethod
    def from_json(facts: dict[str, Any]) -> Measurement:
        """Rebuilds what :meth:`to_json` gave."""
        rows = {
            key: RowResult(
                Timing(tuple(value * 1e-3 for value in row["samples_ms"]))
                if "samples_ms" in row
                else None,
                row.get("peak_bytes"),
                row.get("difference"),
                row.get("reason"),
            )
            for key, row in facts["rows"].items()
        }
        labels = {key: row["label"] for key, row in facts["rows"].items()}
        plain = {
            name: facts[name]
            for name in (
                *("key", "title", "section", "num_tasks", "num_shared", "num_params"),
                "load_averages",
            )
        }
        return Measurement(rows=rows, labels=labels, **plain)
