"""Ranks and their confidence: values of Demšar (2006) and of scipy, and cases by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("scipy", reason="the statistics need scipy")

from scipy.stats import friedmanchisquare

from excessmtl_ext.training.benchmark.statistics import (
    compare,
    critical_difference,
    estimate,
    groups_within,
    ranks,
)
from excessmtl_ext.training.benchmark.tables import (
    EPOCHS,
    GROUPS,
    DatasetTable,
    Line,
    make_rankings,
)


def test_an_interval_by_hand() -> None:
    found = estimate([1.0, 2.0, 3.0])
    # t of 2 degrees of freedom at 0.975 is 4.303; the deviation is 1.
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert str(found) == "2.000 ± 2.484"
    single = estimate([0.5])
    assert math.isnan(single.half_width)
    assert str(single) == "0.500"
    with pytest.raises(ValueError, match="at least one of `values`"):
        estimate([])


def test_the_highest_score_has_rank_one_and_equal_scores_share() -> None:
    assert ranks(np.array([[0.1, 0.9, 0.5], [0.7, 0.7, 0.1]])).tolist() == [
        [3, 1, 2],
        [1.5, 1.5, 3],
    ]


@pytest.mark.parametrize(
    ("methods", "datasets", "expected"),
    # Demsar 2006: q is 2.569 for 4 methods and 2.728 for 5, hence 1.25 over 14 data sets and 1.11 over 30.
    [(4, 14, 1.25), (5, 30, 2.728 * math.sqrt(30 / 180)), (2, 10, 1.960 * math.sqrt(6 / 60))],
)
def test_the_critical_difference_is_the_published_one(
    methods: int, datasets: int, expected: float
) -> None:
    assert critical_difference(methods, datasets) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("has_ties", [False, True])
def test_friedmans_p_is_that_of_scipy(has_ties: bool) -> None:
    scores = np.random.default_rng(0).normal(size=(9, 5)) + np.linspace(0, 1, 5)
    scores = scores.round(0) if has_ties else scores
    found = compare(scores)
    assert found.friedman_p == pytest.approx(friedmanchisquare(*scores.T).pvalue)
    assert found.mean_ranks.sum() == pytest.approx(15)


def test_iman_and_davenports_f_is_demsars() -> None:
    # Demsar 2006, Sec. 3.2.2: 14 data sets, 4 methods, chi square 9.28, F 3.69 with 3 and 39 degrees of freedom.
    from scipy.stats import f

    chi = 9.28
    assert (13 * chi) / (14 * 3 - chi) == pytest.approx(3.69, abs=0.01)
    scores = np.random.default_rng(1).normal([0.0, 0.5, 0.0, 0.7], size=(14, 4))
    chi = friedmanchisquare(*scores.T).statistic
    expected = f.sf((13 * chi) / (14 * 3 - chi), 3, 39)
    assert compare(scores).iman_davenport_p == pytest.approx(expected)


def test_one_order_everywhere_is_as_uneven_as_can_be_and_equal_scores_are_not() -> None:
    order = compare(np.tile(np.arange(4.0), (6, 1)))
    assert order.mean_ranks.tolist() == [4, 3, 2, 1]
    assert order.iman_davenport_p == 0.0
    assert order.friedman_p < 0.001
    equal = compare(np.ones((6, 4)))
    assert equal.mean_ranks.tolist() == [2.5] * 4
    assert equal.friedman_p == 1.0


@pytest.mark.parametrize("scores", [np.ones((1, 3)), np.ones((3, 1)), np.full((3, 3), np.nan)])
def test_too_few_or_missing_scores_are_an_error(scores: np.ndarray) -> None:
    with pytest.raises(ValueError, match="at least two data sets and two methods, all finite"):
        compare(scores)


def test_groups_are_the_longest_runs_within_the_difference() -> None:
    assert groups_within([1.0, 1.5, 3.0, 3.2, 6.0], 2.0) == [(0, 2), (1, 3)]
    assert groups_within([1.0, 4.0, 7.0], 1.0) == []
    assert groups_within([1.0, 1.0, 1.0], 0.5) == [(0, 2)]


def _table(name: str, scores: dict[str, float]) -> DatasetTable:
    lines = [
        Line(
            method,
            method,
            False,
            {(epoch, group): estimate([score]) for epoch in EPOCHS for group in GROUPS},
            {},
            None,
            {},
            1,
        )
        for method, score in scores.items()
    ]
    return DatasetTable(name, name, "dose", True, {}, {}, lines)


def test_a_data_set_with_few_methods_does_not_keep_the_others_from_being_ranked() -> None:
    """Two data sets times three methods are six pairs, three times one are three."""
    full = [
        _table("first", {"a": 0.9, "b": 0.5, "c": 0.1}),
        _table("second", {"a": 3, "b": 2, "c": 1}),
    ]
    (ranking, *_) = make_rankings([*full, _table("third", {"a": 0.0})])
    assert list(ranking.datasets) == ["first", "second"]
    assert list(ranking.methods) == ["a", "b", "c"]
    assert ranking.comparison.mean_ranks.tolist() == [1, 2, 3]
    whole = make_rankings([*full, _table("third", {"a": 1, "b": 2, "c": 3})])[0]
    assert list(whole.datasets) == ["first", "second", "third"]
    assert make_rankings([_table("alone", {"a": 1, "b": 2})]) == []
