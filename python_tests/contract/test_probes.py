"""Seeded probes of every mode, kind of graph and event, against the method by hand. ``--probes 1000`` draws so many."""

from __future__ import annotations

import pytest
from _probe_baselines import BaselineRun, drawn_baseline
from _probe_draw import drawn
from _probe_world import REFUSABLE
from _probes import Refused, Run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    first, num = (int(metafunc.config.getoption(name) or 0) for name in ("first_probe", "probes"))
    metafunc.parametrize("seed", range(first, first + num))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_probe_is_right_or_refused_before_anything_moves(seed: int) -> None:
    probe = drawn(seed)
    print(probe)
    go_through(Run(probe))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_probe_of_another_method_is_right_or_refused(seed: int) -> None:
    method, probe = drawn_baseline(seed)
    print(method, probe)
    go_through(BaselineRun(method, probe))


def go_through(run: Run) -> None:
    try:
        for number, events in enumerate(run.probe.events):
            print(number, events)
            run.step(number)
    except Refused as error:
        print("refused:", error)
        assert run.probe.graph in (*REFUSABLE, "tied")
