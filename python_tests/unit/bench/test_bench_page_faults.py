"""bench_page_faults.py runs, each row in a process of its own, and writes what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from _paths import ROOT

BENCH = ROOT / "bench"


@pytest.mark.slow
def test_the_bench_writes_every_row_with_its_times_and_faults(tmp_path):
    output = tmp_path / "out"
    command = [
        sys.executable,
        str(BENCH / "bench_page_faults.py"),
        "--quick",
        "--output",
        str(output),
    ]
    command += ["--workloads", "parameters", "--rows", "uniform", "exact", "exact_unpinned"]
    command += ["--rounds", "1", "--steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=tmp_path)
    measured = json.loads((output / "measurements.json").read_text())["parameters"]
    assert list(measured) == ["uniform", "exact", "exact_unpinned"]
    for (sample,) in measured.values():
        assert sample["wall_ms"] > 0
        assert sample["user_ms"] + sample["kernel_ms"] > 0
        assert sample["faults"] >= 0
    readme = (output / "README.md").read_text()
    for label in ("plain summed loss", "ExcessMTL", "ExcessMTL, no gradient kept"):
        assert f"| {label} |" in readme
