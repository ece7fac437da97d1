"""What methods give and take, by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("scipy", reason="the statistics need scipy")
pytest.importorskip("matplotlib", reason="the pictures need matplotlib")

from excessmtl_ext.training.benchmark.gains import Gain, draw_gains, method_gains
from excessmtl_ext.training.benchmark.statistics import estimate
from excessmtl_ext.training.benchmark.tables import (
    EPOCHS,
    GROUPS,
    DatasetTable,
    Line,
    make_rankings,
)


def table(name: str, scores: dict[str, tuple[float, float]]) -> DatasetTable:
    lines = [
        Line(
            method,
            method.title(),
            method == "ours",
            {
                (epoch, group): estimate([noisy if group == "noisy" else clean])
                for epoch in EPOCHS
                for group in GROUPS
            },
            {},
            None,
            {},
            1,
        )
        for method, (clean, noisy) in scores.items()
    ]
    return DatasetTable(name, name, "dose", True, {}, {}, lines)


TABLES = [
    table("first", {"base": (0.5, 0.2), "ours": (0.6, 0.1), "other": (0.5, 0.5)}),
    table("second", {"base": (0.9, 0.4), "ours": (0.9, 0.6), "other": (0.8, 0.4)}),
]


def test_gains_are_mean_differences_from_the_first_method():
    gains = {gain.label: gain for gain in method_gains(TABLES, make_rankings(TABLES)[0])}
    assert gains["Base"] == Gain("Base", False, 0.0, 0.0)
    assert gains["Ours"].is_ours
    assert gains["Ours"][2:] == pytest.approx((0.05, 0.05))
    assert gains["Other"][2:] == pytest.approx((-0.05, 0.15))


def test_the_picture_is_a_png_and_the_same_each_time():
    gains = method_gains(TABLES, make_rankings(TABLES)[0])
    drawn = draw_gains(gains, 2, "Base")
    assert drawn.startswith(b"\x89PNG")
    assert drawn == draw_gains(gains[::-1], 2, "Base")
