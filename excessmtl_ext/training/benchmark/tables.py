"""The tables of a benchmark, from the results of its trials: per data set and dose, and ranks over data sets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from excessmtl_ext.training.benchmark.plan import Plan, mean_score
from excessmtl_ext.training.benchmark.statistics import Comparison, Estimate, compare, estimate

Epoch = Literal["last two", "selected"]
EPOCHS: tuple[Epoch, ...] = ("selected", "last two")
"""What a run is judged by: the epoch that did best on the validation labels a user would have, or the last two."""

Group = Literal["clean", "noisy", "all"]
GROUPS: tuple[Group, ...] = ("clean", "noisy", "all")


@dataclass(frozen=True)
class Line:
    """A method on a data set at a dose.

    Attributes:
        method: Its key.
        label: Its label.
        is_ours: Of the method.
        scores: (epoch, group) -> mean test score over the group's tasks, with its interval over seeds; None where a run
            diverged or a score was no number, and for a group without tasks.
        task_scores: Task -> mean test score of the selected epoch over the seeds; empty where a run diverged.
        cost: Processor time of a step, over that of the first method; None where that is missing.
        setting: The chosen one.
        num_seeds: Seeds that are finished.
    """

    method: str
    label: str
    is_ours: bool
    scores: Mapping[tuple[Epoch, Group], Estimate | None]
    task_scores: Mapping[str, float]
    cost: float | None
    setting: Mapping[str, Any]
    num_seeds: int


@dataclass(frozen=True)
class DatasetTable:
    """All methods on a data set at a dose.

    Attributes:
        dataset: Key of the data set.
        title: Of the data set.
        dose: Its name.
        is_ranked: Whether methods are ranked at this dose.
        tasks: Task -> whether its labels are noisy.
        noise_shares: Task -> how noisy its labels are, where it is known.
        lines: One per method with a result.
    """

    dataset: str
    title: str
    dose: str
    is_ranked: bool
    tasks: Mapping[str, bool]
    noise_shares: Mapping[str, float]
    lines: Sequence[Line]


@dataclass(frozen=True)
class Ranking:
    """Methods ranked over data sets by one group of tasks.

    Attributes:
        group: Which tasks.
        epoch: Which epoch.
        methods: Keys, best mean rank first.
        labels: Of the methods.
        is_ours: Of the methods.
        datasets: Titles of the data sets.
        comparison: With mean ranks in the order of ``methods``.
    """

    group: Group
    epoch: Epoch
    methods: Sequence[str]
    labels: Sequence[str]
    is_ours: Sequence[bool]
    datasets: Sequence[str]
    comparison: Comparison


def make_tables(plan: Plan) -> list[DatasetTable]:
    """Makes the table of every data set and dose that has a finished trial."""
    tables: list[DatasetTable] = []
    for key, dataset in plan.config.found_datasets.items():
        for dose in dataset.doses:
            results: dict[str, list[dict[str, Any]]] = {}
            for method in plan.config.found_methods:
                setting = plan.choice(key, method)
                if setting is None:
                    continue
                trials = plan.reported_trials(key, method, setting)
                found = [plan.result(trial) for trial in trials if trial.dose == dose]
                finished = [result for result in found if result is not None]
                if finished:
                    results[method] = finished
            whole = [r for each in results.values() for r in each if "diverged" not in r]
            if not whole:
                continue
            tasks = {task["name"]: bool(task["is_noisy"]) for task in whole[0]["tasks"]}
            base = _mean_cost(next(iter(results.values())))
            tables.append(
                DatasetTable(
                    key,
                    dataset.title,
                    dose,
                    dose == dataset.ranked_dose,
                    tasks,
                    whole[0]["noise_shares"],
                    [_line(plan, name, each, tasks, base) for name, each in results.items()],
                )
            )
    return tables


def _line(
    plan: Plan,
    method: str,
    results: Sequence[Mapping[str, Any]],
    tasks: Mapping[str, bool],
    base: float | None,
) -> Line:
    known = plan.config.found_methods[method]
    members = {
        "clean": [name for name, is_noisy in tasks.items() if not is_noisy],
        "noisy": [name for name, is_noisy in tasks.items() if is_noisy],
        "all": list(tasks),
    }
    cost = _mean_cost(results)
    selected = [selected_epoch(result) for result in results if "diverged" not in result]
    return Line(
        method,
        known.label,
        known.is_ours,
        {
            (epoch, group): _score(results, epoch, members[group])
            for epoch in EPOCHS
            for group in GROUPS
        },
        {
            name: statistics.fmean(mean_score(row, "test", [name]) for row in selected)
            for name in (tasks if len(selected) == len(results) else ())
        },
        None if cost is None or base is None else cost / base,
        known.settings[results[0]["trial"]["setting"]],
        len(results),
    )


def selected_epoch(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the epoch of a result that did best on the validation labels a user would have, the first of equals."""
    return max(result["epochs"], key=lambda row: mean_score(row, "observed"))


def _score(
    results: Sequence[Mapping[str, Any]], epoch: Epoch, tasks: Sequence[str]
) -> Estimate | None:
    """Returns the mean test score over tasks, with its interval over the results."""
    values: list[float] = []
    for result in results:
        if not tasks or "diverged" in result:
            return None
        rows = [selected_epoch(result)] if epoch == "selected" else result["epochs"][-2:]
        values.append(statistics.fmean(mean_score(row, "test", tasks) for row in rows))
    return estimate(values) if all(map(math.isfinite, values)) else None


def _mean_cost(results: Iterable[Mapping[str, Any]]) -> float | None:
    costs = [result["cpu_ms"] for result in results if "diverged" not in result]
    return statistics.fmean(costs) if costs else None


def _largest_block(tables: list[DatasetTable]) -> tuple[list[DatasetTable], list[str]]:
    """Returns data sets and the methods that all of them have: as many pairs of the two as there can be."""
    largest: tuple[list[DatasetTable], list[str]] = ([], [])
    for count in sorted({len(table.lines) for table in tables}):
        block = [table for table in tables if len(table.lines) >= count]
        methods = [[line.method for line in table.lines] for table in block]
        common = [name for name in methods[0] if all(name in each for each in methods)]
        if len(block) * len(common) > len(largest[0]) * len(largest[1]):
            largest = block, common
    return largest


def make_rankings(tables: Sequence[DatasetTable]) -> list[Ranking]:
    """Ranks methods over data sets, at their noisy doses, by clean tasks, by noisy ones and by all.

    Only methods that all of these data sets have can be ranked, so data sets with few methods are left out where that
    leaves more pairs of a data set and a method. A method that diverged is the last on that data set. No ranking is
    made over fewer than two data sets or methods.
    """
    ranked = [table for table in tables if table.is_ranked]
    rankings: list[Ranking] = []
    for group in GROUPS:
        for epoch in EPOCHS:
            with_group = [
                table
                for table in ranked
                if any(line.scores[epoch, group] is not None for line in table.lines)
            ]
            with_group, common = _largest_block(with_group)
            by_method = [{line.method: line for line in table.lines} for table in with_group]
            if len(with_group) < 2 or len(common) < 2:
                continue
            scores = np.array(
                [
                    [_for_ranking(each[method].scores[epoch, group]) for method in common]
                    for each in by_method
                ]
            )
            comparison = compare(scores)
            order = np.argsort(comparison.mean_ranks, kind="stable")
            lines = [by_method[0][common[index]] for index in order]
            rankings.append(
                Ranking(
                    group,
                    epoch,
                    [line.method for line in lines],
                    [line.label for line in lines],
                    [line.is_ours for line in lines],
                    [table.title for table in with_group],
                    Comparison(
                        comparison.mean_ranks[order],
                        comparison.friedman_p,
                        comparison.iman_davenport_p,
                        comparison.critical_difference,
                        comparison.num_datasets,
                    ),
                )
            )
    return rankings


def _for_ranking(score: Estimate | None) -> float:
    """Returns a mean that can be ranked: below every score where there is none."""
    return -1e300 if score is None else score.mean


def to_markdown(table: DatasetTable) -> str:
    """Returns a table of one data set and dose as Markdown."""
    noisy = ", ".join(
        f"{name} ({table.noise_shares[name]:.2f})" if name in table.noise_shares else name
        for name, is_noisy in table.tasks.items()
        if is_noisy
    )
    header = [
        "method",
        *(f"{group}, {epoch}" for epoch in EPOCHS for group in GROUPS),
        "cost",
        "setting",
    ]
    lines = [
        f"## {table.title}, {table.dose}",
        "",
        f"Noisy tasks: {noisy or 'none'}.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    for line in table.lines:
        cells = [
            f"**{line.label}**" if line.is_ours else line.label,
            *(str(line.scores[epoch, group] or "-") for epoch in EPOCHS for group in GROUPS),
            "-" if line.cost is None else f"{line.cost:.2f}",
            ", ".join(f"{name}={value}" for name, value in line.setting.items()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def ranking_to_markdown(ranking: Ranking) -> str:
    """Returns a ranking as Markdown."""
    comparison = ranking.comparison
    lines = [
        f"## Ranks by {ranking.group} tasks, {ranking.epoch}",
        "",
        f"{comparison.num_datasets} data sets: {', '.join(ranking.datasets)}. "
        f"Friedman p = {comparison.friedman_p:.2g}, Iman-Davenport p = {comparison.iman_davenport_p:.2g}; ranks that "
        f"differ by less than {comparison.critical_difference:.2f} cannot be told apart (Nemenyi, 5 %).",
        "",
        "| method | mean rank |",
        "|---|---|",
    ]
    for label, is_ours, rank in zip(
        ranking.labels, ranking.is_ours, comparison.mean_ranks, strict=True
    ):
        lines.append(f"| {f'**{label}**' if is_ours else label} | {rank:.2f} |")
    return "\n".join(lines) + "\n"
