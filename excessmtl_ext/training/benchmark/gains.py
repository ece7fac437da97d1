"""What each method gives or takes from clean and from noisy tasks, against the first method, over all data sets."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from excessmtl_ext.training.benchmark.tables import DatasetTable, Epoch, Group, Ranking
from excessmtl_ext.training.pictures.style import TEXT_COLOUR, new_figure, plain

OURS_COLOUR = "#0072B2"

_SIDES: tuple[Group, Group] = ("clean", "noisy")


class Gain(NamedTuple):
    """A method's mean difference in score from the first method, over data sets at their noisy doses."""

    label: str
    is_ours: bool
    clean: float
    noisy: float


def method_gains(tables: Sequence[DatasetTable], ranking: Ranking) -> list[Gain]:
    """Returns the gains of the methods of a ranking, on its data sets; empty where a score is missing.

    Args:
        tables: The data sets; the first line of each is what the others are compared with.
        ranking: Names methods, data sets and the epoch.
    """
    chosen = [table for table in tables if table.is_ranked and table.title in ranking.datasets]
    gains: list[Gain] = []
    for method, label, is_ours in zip(
        ranking.methods, ranking.labels, ranking.is_ours, strict=True
    ):
        sides = [_mean_gain(chosen, method, ranking.epoch, group) for group in _SIDES]
        if sides[0] is None or sides[1] is None:
            continue
        gains.append(Gain(label, is_ours, sides[0], sides[1]))
    return gains


def _mean_gain(
    tables: Sequence[DatasetTable], method: str, epoch: Epoch, group: Group
) -> float | None:
    differences: list[float] = []
    for table in tables:
        by_method = {line.method: line.scores[epoch, group] for line in table.lines}
        score, base = by_method.get(method), table.lines[0].scores[epoch, group]
        if score is None or base is None:
            return None
        differences.append(score.mean - base.mean)
    return statistics.fmean(differences) if differences else None


def draw_gains(gains: Sequence[Gain], num_datasets: int, base: str) -> bytes:
    """Draws a bar for the clean and one for the noisy tasks of each method, best sum first, as PNG.

    Args:
        gains: At least one.
        num_datasets: Over which they are means.
        base: The label of the method that they are compared with.
    """
    ordered = sorted(gains, key=lambda gain: (gain.clean + gain.noisy, gain.label))
    figure = new_figure(7.6, 1.1 + 0.3 * len(ordered))
    axes = figure.add_subplot()
    for row, gain in enumerate(ordered):
        axes.barh(
            row + 0.18, 100 * gain.clean, 0.34, color="#0072B2" if gain.is_ours else "#56B4E9"
        )
        axes.barh(
            row - 0.18, 100 * gain.noisy, 0.34, color="#D55E00" if gain.is_ours else "#E8A87C"
        )
    axes.axvline(0, color=TEXT_COLOUR, linewidth=0.8)
    axes.set_yticks(range(len(ordered)), [plain(gain.label) for gain in ordered], fontsize=8)
    for label, gain in zip(axes.get_yticklabels(), ordered, strict=True):
        label.set_fontweight("bold" if gain.is_ours else "normal")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(
        f"score gained (right) or paid (left) against {base}, in points, mean over {num_datasets} data sets",
        fontsize=8.5,
    )
    axes.set_title("clean tasks (blue) and noisy tasks (orange)", fontsize=9.5, color=TEXT_COLOUR)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=160, metadata={"Software": "excessmtl benchmark"})
    return content.getvalue()
