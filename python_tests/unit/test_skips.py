"""Ten skipped steps in a row are told once; fewer, or with a good one between them, are not."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from excessmtl_ext.skips import SKIPS_IN_A_ROW, SkipGuard, SkippedStepsWarning
from excessmtl_ext.step import Step


@dataclass
class Rule:
    num_calls: int = 0
    num_skipped_steps: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    found_nonfinite: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.bool))


def take(guard: SkipGuard, rule: Rule, skips: list[bool], *, moves_weights: bool = True) -> None:
    step = Step(roots=[], tasks=[0], shared=[], moves_weights=moves_weights)
    for is_skipped in skips:
        rule.num_calls += 1
        rule.num_skipped_steps += is_skipped
        guard.on_end(rule, step, [0])


def test_the_warning_comes_at_the_tenth_in_a_row_and_once() -> None:
    guard, rule = SkipGuard(), Rule()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(guard, rule, [True] * (SKIPS_IN_A_ROW - 1) + [False] + [True] * (SKIPS_IN_A_ROW - 1))
    with pytest.warns(SkippedStepsWarning, match=r"10 steps in a row .* \(19 in all\)"):
        take(guard, rule, [True])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(guard, rule, [True] * 30)
    guard.restart()
    assert not guard.has_warned


def test_steps_that_only_apply_the_weights_are_not_counted() -> None:
    guard, rule = SkipGuard(), Rule()
    take(guard, rule, [True] * 5)
    take(guard, rule, [False] * 5, moves_weights=False)
    with pytest.warns(SkippedStepsWarning):
        take(guard, rule, [True] * 5)


def test_a_copy_remembers_the_count() -> None:
    guard, rule = SkipGuard(), Rule()
    take(guard, rule, [True] * (SKIPS_IN_A_ROW - 1))
    with pytest.warns(SkippedStepsWarning):
        take(copy.deepcopy(guard), rule, [True])
