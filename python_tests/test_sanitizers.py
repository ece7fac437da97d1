"""The CPU ops under AddressSanitizer and UndefinedBehaviorSanitizer: a bounded part of what sanitize.py runs."""

from __future__ import annotations

from pathlib import Path

import _hostile_arguments
import pytest
import sanitize

from excessmtl_ext import _extension

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _extension.ops_available, reason="no compiled ops: no compiler is taken for granted"),
]  # fmt: skip


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sanitized ops in it."""
    reason = sanitize.missing_runtime()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("sanitized_ops")
    # Warnings are errors: one says that the ops could not be compiled.
    result = sanitize.run(folder, "-W", "error", "-c", "import excessmtl_ext.functional")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_values_and_boundary_of_the_ops_are_clean_under_the_sanitizers(build: Path) -> None:
    tests = Path(sanitize.TESTS)
    result = sanitize.run(
        build, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests / "test_fused_step.py"),
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
