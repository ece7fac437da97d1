"""The CPU ops, and the CUDA kernels on the host, under AddressSanitizer and UndefinedBehaviorSanitizer.

A bounded part of what sanitize.py runs: of the kernels, those for float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import _hostile_arguments
import pytest
import sanitize
from simt import check_ops

from excessmtl_ext import _extension

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _extension.ops_available, reason="no compiled ops: no compiler is taken for granted"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where sanitized ops are compiled; skips where that is impossible."""
    reason = sanitize.missing_runtime()
    if reason is not None:
        pytest.skip(reason)
    return tmp_path_factory.mktemp("sanitized_ops")


@pytest.fixture(scope="module")
def build(folder: Path) -> Path:
    """A folder with the sanitized ops in it."""
    # Warnings are errors: one says that the ops could not be compiled.
    result = sanitize.run(folder, "-W", "error", "-c", "import excessmtl_ext.functional")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def kernels(folder: Path) -> Path:
    """The library of the sanitized kernels."""
    return sanitize.compile_kernels(folder, only_float32=True)


def test_values_and_boundary_of_the_ops_are_clean_under_the_sanitizers(build: Path) -> None:
    tests = Path(sanitize.TESTS)
    result = sanitize.run(
        build, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests / "contract" / "test_fused_step.py"),
        "-k", "unusual or mixed or missing or nonfinite or folding or three_parts or one_op or combine_adds",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "passed" in result.stdout
    script = _hostile_arguments.__file__
    result = sanitize.run(build, script, "--examples", "350", "--seed", "7")
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]


def test_an_access_out_of_bounds_is_found(build: Path) -> None:
    """A planted one: sizes that promise more than the allocation holds, past the checks of the ops."""
    code = (
        "import ctypes, torch, excessmtl_ext.functional as F\n"
        "layout = F.ParamLayout([1024])\n"
        "state = F.init_state(1, layout)\n"
        "small = (ctypes.c_float * 256)()\n"
        "import numpy as np\n"
        "lie = np.lib.stride_tricks.as_strided(np.frombuffer(small, dtype=np.float32), (1024,), (4,))\n"
        "F.fused_step_([torch.from_numpy(lie)], layout, state, F.StepOptions())\n"
    )
    result = sanitize.run(build, "-c", code)
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
    assert "accumulate" in result.stderr


def test_cuda_kernels_on_the_host_are_clean_under_the_sanitizers(
    folder: Path, kernels: Path
) -> None:
    checks = [name for name in check_ops.CHECKS if name not in check_ops.NEED_OTHER_DTYPES]
    result = sanitize.check_kernels(folder, kernels, checks)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout) == dict.fromkeys(checks, "")


@pytest.mark.parametrize(
    ("name", "kernel"), [("sq_grad_sum", "fused_step_kernel"), ("outputs", "combine_kernel")]
)
def test_a_kernel_that_goes_one_element_past_an_allocation_is_found(
    folder: Path, kernels: Path, name: str, kernel: str
) -> None:
    result = sanitize.run(folder, str(sanitize.TESTS / "simt" / "overrun.py"), str(kernels), name)
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
    assert kernel in result.stderr
