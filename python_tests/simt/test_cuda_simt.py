"""The CUDA sources, kernels and host code, run on the CPU over a SIMT shim (simt/simt.h).

What is shown here without a GPU: values, equal bits under any schedule, alignment and bounds of
accesses, divergence, data races. What only a GPU can show is in test_cuda_device.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from simt import build, check_ops

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def op_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    library = tmp_path_factory.mktemp("simt_ops") / "simt_ops.so"
    build.compile_ops(library)
    script = Path(check_ops.__file__)
    result = subprocess.run(
        [sys.executable, str(script), str(library)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", list(check_ops.CHECKS))
def test_cuda_op_on_the_host_equals_the_reference(op_results: dict[str, str], name: str) -> None:
    assert op_results[name] == ""


def test_kernels_equal_a_float64_reference_under_every_schedule(tmp_path: Path) -> None:
    program = tmp_path / "kernel_cases"
    build.compile_cases(program)
    result = subprocess.run([program, "2"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "PASS" in result.stdout


def test_kernels_have_no_data_race(tmp_path: Path) -> None:
    program = tmp_path / "kernel_cases_threads"
    try:
        build.compile_cases(program, threads=True, only_float32=True)
    except RuntimeError as error:
        if "-ltsan" in str(error) or "libtsan" in str(error):
            pytest.skip("this compiler has no ThreadSanitizer")
        raise
    result = subprocess.run([program, "1"], capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel's address layout")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "PASS" in result.stdout
