"""Which sources a build is made from, and when it has CUDA ops."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from _paths import ROOT

from excessmtl_ext import _build_facts
from excessmtl_ext._build_facts import (
    CudaPlan,
    cmake_architectures,
    known_capabilities,
    plan_cuda,
    source_digest,
    torch_architectures,
)

# A CUDA driver with GPUs of the given compute capabilities.
DRIVER = """
static const int major[] = {{ {majors} }}, minor[] = {{ {minors} }};
extern "C" int cuInit(unsigned) {{ return {init}; }}
extern "C" int cuDeviceGetCount(int* count) {{ *count = sizeof major / sizeof *major; return 0; }}
extern "C" int cuDeviceGet(int* device, int index) {{ *device = index + 40; return 0; }}
extern "C" int cuDeviceGetAttribute(int* value, int which, int device) {{
  if (which != 75 && which != 76) return 1;
  *value = which == 75 ? major[device - 40] : minor[device - 40];
  return 0;
}}
"""


@pytest.fixture(autouse=True)
def _no_architectures_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDAARCHS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def nvcc(tmp_path: Path) -> str:
    """A compiler that knows what nvcc 12.9 knows of, in its words."""
    path = tmp_path / "nvcc"
    known = (70, 75, 80, 86, 89, 90, 100, 101, 120)
    listed = "".join(f"compute_{number}\\n" for number in known)
    path.write_text(f"#!/bin/sh\n[ \"$1\" = --list-gpu-arch ] && printf '{listed}'\n")
    path.chmod(0o755)
    return str(path)


def plan_on_machine(
    folder: Path, gpus: list[tuple[int, int]], nvcc: str, init: int = 0, choice: str = "AUTO"
) -> CudaPlan:
    """What is decided in a process that finds a driver with these GPUs."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine to compile a driver with")
    source = folder / "driver.cpp"
    majors, minors = (", ".join(str(gpu[index]) for gpu in gpus) for index in (0, 1))
    source.write_text(DRIVER.format(majors=majors, minors=minors, init=init))
    library = folder / "libcuda.so.1"
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", library], check=True)
    answer = subprocess.run(
        [sys.executable, "-I", _build_facts.__file__, "cuda", choice, "", nvcc],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return CudaPlan(**json.loads(answer.stdout))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the driver's name is Linux's")
@pytest.mark.parametrize(
    ("gpus", "architectures"),
    [
        ([(9, 0)], "90-real;90-virtual"),
        ([(9, 0), (8, 0), (9, 0)], "80-real;90-real;90-virtual"),
        ([(7, 5), (8, 6)], "86-real;86-virtual"),
        ([(12, 1)], "120-virtual"),  # newer than this nvcc
    ],
)
def test_auto_compiles_for_the_gpus_that_are_there(
    tmp_path: Path, nvcc: str, gpus: list[tuple[int, int]], architectures: str
) -> None:
    plan = plan_on_machine(tmp_path, gpus, nvcc)
    assert plan.wanted
    assert plan.architectures == architectures
    assert f"{max(gpus)[0]}.{max(gpus)[1]}" in plan.reason


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the driver's name is Linux's")
@pytest.mark.parametrize(
    ("gpus", "init", "reason"),
    [
        ([(7, 5)], 0, "the GPUs found (compute capability 7.5) are older than 8.0"),
        ([(9, 0)], 100, "no GPU was found"),  # CUDA_ERROR_NO_DEVICE
    ],
)
def test_auto_compiles_no_cuda_ops_without_a_gpu_for_them(
    tmp_path: Path, nvcc: str, gpus: list[tuple[int, int]], init: int, reason: str
) -> None:
    plan = plan_on_machine(tmp_path, gpus, nvcc, init)
    assert not plan.wanted
    assert plan.architectures == ""
    assert plan.reason.startswith(reason)


def test_a_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(_build_facts.ctypes, "CDLL", missing)
    plan = plan_cuda("AUTO", "", "")
    assert not plan.wanted
    for way_out in ("TORCH_CUDA_ARCH_LIST", "CUDAARCHS", "EXCESSMTL_WITH_CUDA=ON"):
        assert way_out in plan.reason


def test_on_compiles_for_what_is_supported_and_off_for_nothing(nvcc: str, tmp_path: Path) -> None:
    assert plan_cuda("ON", "", nvcc) == (
        True,
        "EXCESSMTL_WITH_CUDA=ON",
        "80-real;90-real;100-real;100-virtual",
    )
    older = tmp_path / "older"
    older.write_text("#!/bin/sh\nprintf 'compute_80\\ncompute_90\\n'\n")
    older.chmod(0o755)
    assert plan_cuda("ON", "", str(older)).architectures == "80-real;90-real;90-virtual"
    assert plan_cuda("OFF", "90-real", nvcc) == (False, "EXCESSMTL_WITH_CUDA=OFF", "")


def test_an_architecture_that_is_named_is_compiled_for(
    nvcc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0 9.0+PTX")
    expected = (True, "TORCH_CUDA_ARCH_LIST is set", "80-real;90-real;90-virtual")
    assert plan_cuda("AUTO", "", nvcc) == plan_cuda("ON", "", nvcc) == expected
    monkeypatch.setenv("CUDAARCHS", "native")
    assert plan_cuda("AUTO", "", nvcc) == (True, "CUDAARCHS is set", "native")
    assert plan_cuda("AUTO", "90", nvcc).architectures == "90"


def test_a_wrong_choice_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="Expected EXCESSMTL_WITH_CUDA to be AUTO, ON or OFF, but got 'yes'"
    ):
        plan_cuda("yes", "", "")


@pytest.mark.parametrize(
    ("listed", "spelled"),
    [
        ("8.0", "80-real"),
        ("8.0;9.0a, 10.0+PTX", "80-real;90a-real;100-real;100-virtual"),
        ("Turing;Ampere Hopper", "80-real;86-real;86-virtual;90-real;90-virtual"),
    ],
)
def test_torchs_spelling_becomes_cmakes(listed: str, spelled: str) -> None:
    assert cmake_architectures(listed) == spelled


@pytest.mark.parametrize("listed", ["7.0;7.5", "sm_90", "9.0+PTY", "90"])
def test_a_list_without_a_usable_capability_is_an_error_with_the_way_out(listed: str) -> None:
    with pytest.raises(
        ValueError, match=r"Expected .*TORCH_CUDA_ARCH_LIST.*EXCESSMTL_WITH_CUDA=OFF"
    ):
        cmake_architectures(listed)


def test_cmakes_spelling_becomes_torchs() -> None:
    assert torch_architectures("80-real;90-real;90-virtual") == "8.0;9.0+PTX"
    assert torch_architectures("100a") == "10.0a+PTX"
    with pytest.raises(ValueError, match="native"):
        torch_architectures("native")


def test_an_nvcc_that_does_not_start_knows_nothing(tmp_path: Path) -> None:
    assert known_capabilities(str(tmp_path / "nvcc")) == []


def test_the_digest_follows_names_and_bytes_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "ops.cpp").write_bytes(b"int a;\n")
    (tmp_path / "cpu" / "step.cpp").write_bytes(b"int b;\n")
    digest = source_digest(tmp_path)
    lines = [(b"int b;\n", "cpu/step.cpp"), (b"int a;\n", "ops.cpp")]
    text = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for data, name in lines)
    assert digest == hashlib.sha256(text.encode()).hexdigest()

    (tmp_path / ".ops.cpp.swp").write_bytes(b"an editor's")
    (tmp_path / "ops.cpp~").write_bytes(b"an editor's")
    assert source_digest(tmp_path) == digest
    (tmp_path / "ops.cpp").write_bytes(b"int c;\n")
    changed = source_digest(tmp_path)
    assert changed != digest
    (tmp_path / "ops.cpp").rename(tmp_path / "op.cpp")
    assert source_digest(tmp_path) not in (digest, changed)


def test_cmake_asks_for_the_digest_that_the_loader_compares() -> None:
    if not (ROOT / "CMakeLists.txt").is_file():
        pytest.skip("the tests run outside a checkout")
    csrc = ROOT / "csrc"
    answer = subprocess.run(
        [sys.executable, "-I", _build_facts.__file__, "digest", csrc],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(answer.stdout) == {"source_digest": source_digest(csrc)}
