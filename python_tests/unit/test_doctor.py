"""The doctor tells a healthy installation from a broken one, and what was switched off from what fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import excessmtl_ext
from excessmtl_ext import _extension, doctor, reference, self_test
from excessmtl_ext._extension import BuildInfo
from excessmtl_ext.doctor import Gpu

CPU = torch.device("cpu")
H100 = Gpu("H100", (9, 0))

needs_ops = pytest.mark.skipif(
    not _extension.ops_available, reason=f"no compiled ops: {_extension.unavailable_reason}"
)


def run_doctor(folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m excessmtl_ext.doctor` in a new process, with the package taken from `folder`."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("EXCESSMTL_")}
    variables |= {"PYTHONPATH": str(folder)} if folder else {}
    return subprocess.run(
        [sys.executable, "-m", "excessmtl_ext.doctor", "--benchmark-seconds", "0.02"],
        cwd=sys.prefix,  # not the checkout, whose source folder would be imported
        env=variables | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def build_info(**facts: Any) -> BuildInfo:
    defaults = {
        "has_cuda": False,
        "cuda_version": "",
        "cuda_architectures": "",
        "torch_version": "2.13.0",
        "torch_target_version": "2.13",
        "compiler": "GNU 12",
    }
    return BuildInfo(**{**defaults, **facts})


@needs_ops
def test_a_working_installation_ends_with_0() -> None:
    run = run_doctor()
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    assert "compiled ops loaded from " in run.stdout
    assert torch.__version__ in run.stdout
    for name in self_test.CASES:
        assert re.search(rf"cpu: compiled and equal to the reference: .*\b{name}", run.stdout)
    assert re.search(r"compiled [\d.e-]+ ms, reference [\d.e-]+ ms", run.stdout)
    assert run.stdout.endswith("Everything that should work does.\n")


def test_ops_that_are_switched_off_are_no_problem() -> None:
    run = run_doctor(EXCESSMTL_DISABLE_OPS="1")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "note  compiled ops are switched off (EXCESSMTL_DISABLE_OPS=1)" in run.stdout
    assert "cpu: every op uses the reference (EXCESSMTL_DISABLE_OPS=1)" in run.stdout
    assert "compiled and equal" not in run.stdout


def test_a_broken_library_ends_with_1_and_the_fallback_names_the_doctor(tmp_path: Path) -> None:
    package = tmp_path / "excessmtl_ext"
    shutil.copytree(
        Path(excessmtl_ext.__file__).parent,
        package,
        ignore=shutil.ignore_patterns("*.so", "__pycache__", "csrc", "training"),
    )
    (package / "_ops.so").write_bytes(b"not a library")
    (package / "_C.py").write_text(
        "def build_facts():\n"
        "    return dict(has_cuda=False, cuda_version='', cuda_architectures='', torch_version='',\n"
        "                torch_target_version='2.10', compiler='')\n"
    )
    run = run_doctor(tmp_path)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "`python -m excessmtl_ext.doctor` looks closer." in run.stderr
    assert "problem  no compiled ops: " in run.stdout
    assert "_ops.so: file too short" in run.stdout
    assert "pip install --force-reinstall" in run.stdout
    assert "ExcessMTL gives the weights of two steps by hand" in run.stdout  # on the reference
    assert run.stdout.endswith("1 problem, see above.\n")


@needs_ops
def test_every_registered_op_is_examined() -> None:
    prefix = "excessmtl_ext::"
    registered = {
        name.removeprefix(prefix)
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(prefix)
        and not name.endswith(".sizes")  # in Python, of compiled graphs: they call the op itself
    }
    assert set(self_test.CASES) == registered - {
        "cpu_capability",
        "step_in_graph",  # in Python, of balancer.split in a compiled graph: no kernel to compare
    }


@pytest.mark.parametrize("name", self_test.CASES)
def test_an_op_that_errs_is_found(name: str) -> None:
    original = getattr(reference, name)

    def wrong(*args: Any, **keywords: Any) -> None:
        original(*args, **keywords)
        for arg in args:  # what it writes comes out 1 % too large
            tensors = arg if isinstance(arg, (list, tuple)) else [arg]
            for tensor in tensors:
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    tensor.mul_(1.01)

    good = {op: getattr(reference, op) for op in self_test.CASES}
    findings = list(doctor.examine_ops(CPU, SimpleNamespace(**{**good, name: wrong})))
    problems = [finding.text for finding in findings if finding.status == "problem"]
    assert len(problems) == 1
    assert problems[0].startswith(f"cpu: {name} differs from the reference by up to ")
    (rest,) = (finding.text for finding in findings if finding.status == "ok")
    assert not re.search(rf"\b{name}(,|$)", rest)


def test_an_op_that_raises_is_found() -> None:
    def broken(*args: Any, **keywords: Any) -> None:
        raise RuntimeError("no kernel image is available\nmore")

    ops = {op: getattr(reference, op) for op in self_test.CASES}
    ops["combine_"] = broken
    findings = list(doctor.examine_ops(CPU, SimpleNamespace(**ops)))
    problems = [finding.text for finding in findings if finding.status == "problem"]
    assert problems == ["cpu: combine_ fails: no kernel image is available"]


def test_a_gpu_that_the_ops_cannot_use_is_a_problem() -> None:
    (finding,) = doctor.examine_gpus([H100], build_info(), None)
    assert finding.status == "problem"
    assert "built without CUDA" in finding.text
    old = build_info(has_cuda=True, cuda_version="12.1", cuda_architectures="80-real")
    (finding,) = doctor.examine_gpus([H100], old, None)
    assert finding.status == "problem"
    assert "EXCESSMTL_CUDA_ARCHITECTURES=90-real" in finding.text


def test_a_gpu_that_the_ops_can_use_is_not() -> None:
    info = build_info(has_cuda=True, cuda_version="13.0", cuda_architectures="80-real 90-real")
    (finding,) = doctor.examine_gpus([H100], info, None)
    assert finding.status == "ok"
    (finding,) = doctor.examine_gpus([H100], None, "EXCESSMTL_DISABLE_OPS=1")
    assert finding.status == "note"


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((8, 0), "80-real 90-real 100-virtual", True),
        ((8, 6), "80-real 90-real", True),  # binaries run on later minor versions
        ((8, 0), "86-real", False),  # not on earlier ones
        ((9, 0), "80-real 100-virtual", False),
        ((9, 0), "80-virtual", True),
        ((12, 0), "80-real 90-real 100-real 100-virtual", True),
        ((12, 0), "80;90", True),  # without a suffix CMake builds both
        ((7, 5), "80-real 90-real 100-virtual", False),
        ((9, 0), "90a-real", True),
        ((10, 0), "90a", False),
        ((9, 0), "8.0;9.0;10.0+PTX", True),
        ((8, 9), "8.0;9.0", True),
        ((10, 0), "8.0;9.0", False),
        ((10, 0), "8.0;9.0+PTX", True),
        ((10, 0), "native", True),  # the self-test decides
        ((9, 0), "", False),
    ],
)
def test_architectures_are_read_as_cmake_and_torch_write_them(
    capability: tuple[int, int], architectures: str, expected: bool
) -> None:
    assert doctor.has_code_for(capability, architectures) == expected


def test_a_wrong_weight_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.examine_balancer().status == "ok"
    monkeypatch.setattr(doctor.ExcessMTL, "update_weights", lambda self, grads: None)
    finding = doctor.examine_balancer()
    assert finding.status == "problem"
    assert "by hand give the weight 0.534943, ExcessMTL gives 0.500000" in finding.text


def test_no_gpu_is_touched_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.find_gpus() == []
