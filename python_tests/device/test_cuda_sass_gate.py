"""What the compiled kernels look like, held to the figures committed in bench/sass_gate.json."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from _paths import ROOT

GATE = ROOT / "bench" / "sass_gate.py"


@pytest.mark.slow
def test_compiled_kernels_are_as_good_as_the_committed_figures() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on this machine")
    result = subprocess.run([sys.executable, GATE], capture_output=True, text=True, check=False)
    if "nvdisasm was not found" in result.stderr:
        pytest.skip(result.stderr.strip())
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
