"""The benchmarks run to their end on tiny sizes and leave a complete results folder; the numbers mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _paths import ROOT

from excessmtl_ext import _extension

BENCH = ROOT / "bench"


def run_bench(*arguments, script="bench_fused_step.py"):
    # A process of its own: the bench owns its threads and its warnings. It must find the package this test found.
    package = str(Path(_extension.__file__).parents[1])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(BENCH / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ, PYTHONPATH=path),
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not _extension.ops_available, reason=f"no compiled ops: {_extension.unavailable_reason}"
)
def test_bench_fused_step_writes_a_complete_results_folder(tmp_path):
    sections = ["headline", "in_cache", "linear", "overhead", "capabilities"]
    done = run_bench(
        "--quick", "--no-compile", "--output", str(tmp_path / "out"), "--sections", *sections
    )
    assert done.returncode == 0, done.stderr
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        "config.json",
        "environment.json",
        "measurements.json",
        "fused_step.png",
        "README.md",
    }
    found = json.loads((tmp_path / "out" / "measurements.json").read_text())
    measurements = found["measurements"]
    # A machine with the default path only has nothing narrower to show.
    assert {m["section"] for m in measurements} >= set(sections) - {"capabilities"}
    for m in measurements:
        assert m["bytes_moved"] == 12 * m["numel"]
        assert {"fused"} <= set(m["calls"])
        assert all(call["median_us"] >= call["min_us"] > 0 for call in m["calls"].values())
    environment = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert environment["num_threads"] >= 1
    assert set(environment["load_averages"]) == {"before", "after"}


def test_bench_fused_step_says_that_a_device_is_missing(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run_bench("--device", "cuda")
    assert done.returncode != 0
    assert "torch sees no CUDA device" in done.stderr


@pytest.mark.slow
def test_bench_malloc_writes_a_complete_results_folder(tmp_path):
    arguments = ["--numel", "80000", "--rounds", "1", "--output", str(tmp_path / "out")]
    done = run_bench(*arguments, script="bench_malloc.py")
    assert done.returncode == 0, done.stderr
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"README.md", "config.json", "environment.json", "measurements.json"}
    measured = json.loads((tmp_path / "out" / "measurements.json").read_text())
    assert {len(rows) for rows in measured.values()} == {3}
    assert (tmp_path / "out" / "README.md").read_text().count("the usual loop |") == 2
