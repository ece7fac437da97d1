"""A step stays readable: how often it changes file within the package is counted and may not grow."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from excessmtl_ext import arguments

_PATH = Path(__file__).parents[2] / "bench" / "step_trace.py"
_SPEC = importlib.util.spec_from_file_location("step_trace", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
step_trace = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(step_trace)

MOST_CHANGES = {"plain": 16, "features": 24, "tasks_per_step": 28, "streaming": 60}


@pytest.mark.parametrize("mode", step_trace.MODES)
def test_a_step_changes_file_no_more_often_than_a_reader_follows(mode: str) -> None:
    assert step_trace.num_changes(mode) <= MOST_CHANGES[mode]


def test_a_trace_names_the_file_of_a_call_and_ends_with_it() -> None:
    assert step_trace.trace(lambda: arguments.check_count("number", 1, 1)) == ["arguments.py"]
    assert step_trace.trace(lambda: None) == []
