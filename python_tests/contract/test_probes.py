"""Seeded probes of every mode, kind of graph and event, against the method by hand. ``--probes 1000`` draws so many."""

from __future__ import annotations

import pytest
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
    run = Run(probe)
    try:
        for number in range(len(probe.events)):
            print(number, probe.events[number])
            run.step(number)
    except Refused as error:
        print("refused:", error)
        assert probe.graph in (*REFUSABLE, "tied")
