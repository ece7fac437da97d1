"""Reports of the benchmarks: verdicts by hand, files, and the committed tables made again from their measurements."""

from __future__ import annotations

import importlib
import json
import sys
from types import ModuleType

import pytest
import torch
from _paths import ROOT

pytest.importorskip("rich", reason="the benchmarks need rich")

BENCH = ROOT / "bench"
RESULTS = BENCH / "results"


def module(name: str) -> ModuleType:
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


reporting = module("reporting")
timing = module("timing")


@pytest.mark.parametrize(
    "folder", sorted(RESULTS.glob("fused_step_*")), ids=lambda folder: folder.name
)
def test_the_committed_tables_of_the_step_follow_from_its_measurements(folder):
    measurement, report = module("fused_step.measurement"), module("fused_step.report")
    content = json.loads((folder / "measurements.json").read_text())
    found = [measurement.Measurement.from_json(facts) for facts in content["measurements"]]
    facts = json.loads((folder / "environment.json").read_text())
    readme = "\n".join(report.make_readme(facts, found)).rstrip() + "\n"
    assert readme == (folder / "README.md").read_text()
    fits = measurement.linear_fits(found, report.cache_bytes(facts))
    assert list(fits) == list(content["linear_fits"])
    for name, fit in fits.items():
        assert fit.s_per_element == pytest.approx(content["linear_fits"][name]["s_per_element"])


@pytest.mark.parametrize(
    "folder", sorted(RESULTS.glob("training_step_*")), ids=lambda folder: folder.name
)
def test_the_committed_tables_of_training_steps_follow_from_their_measurements(folder):
    report, run = module("training_step.report"), module("training_step.run")
    _, found = run.read_measurements(folder)
    facts = json.loads((folder / "environment.json").read_text())
    readme = "\n".join(report.make_readme(facts, list(found.values()))).rstrip() + "\n"
    assert readme == (folder / "README.md").read_text()


RATIO = timing.Ratio(median=1.2, low=1.1, high=1.3)


@pytest.mark.parametrize(
    ("best", "limit", "is_upper", "outcome"),
    [
        (1.1, 1.25, True, "goal at most 1.25: met"),
        (1.3, 1.25, True, "goal at most 1.25: undecided"),
        (1.3, 1.1, True, "goal at most 1.1: missed"),
        (1.3, 1.2, False, "goal at least 1.2: met"),
        (1.1, 1.15, False, "goal at least 1.15: undecided"),
        (1.1, None, True, "no goal"),
    ],
)
def test_a_verdict_needs_median_and_fastest_samples_to_agree(best, limit, is_upper, outcome):
    line = reporting.verdict("a / b", RATIO, best, limit, is_upper=is_upper)
    assert line == f"a / b: 1.2 (1.1-1.3), fastest samples {best:g}, {outcome}"


def test_times_are_shown_in_milliseconds_from_one_on_and_in_microseconds_below():
    assert reporting.format_time(timing.Timing((1e-3, 2e-3, 3e-3))) == "2 ms (1.5-2.5)"
    assert reporting.format_time(timing.Timing((5e-4,))) == "500 us (500-500)"
    assert reporting.format_ms(timing.Timing((5e-4,))) == "0.5 (0.5-0.5)"


def test_a_results_folder_holds_the_readme_and_a_json_file_per_content(tmp_path):
    reporting.write_folder(tmp_path / "out", ["# Title", "", ""], config={"a": [1, 2.5]}, rows=[])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("README.md", "config.json", "rows.json"),
    }
    assert (tmp_path / "out" / "README.md").read_text() == "# Title\n"
    text = (tmp_path / "out" / "config.json").read_text()
    assert "[1, 2.5]" in text  # a list of numbers stays on one line
    assert json.loads(text) == {"a": [1, 2.5]}


def test_a_folder_is_named_after_hardware_threads_and_month(monkeypatch):
    monkeypatch.setattr(reporting, "cpu_name", lambda: "Some CPU @ 3.00GHz (64 cores)")
    monkeypatch.setattr(reporting.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(reporting.torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(reporting.time, "strftime", lambda form: "202611")
    output = reporting.default_output("memory", torch.device("cpu"))
    assert output == RESULTS / "memory_some_cpu_3_00ghz_64_cores_8_cores_1_thread_202611"
