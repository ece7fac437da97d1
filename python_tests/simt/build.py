"""Compiles the CUDA sources for the host, over simt.h: as torch ops, or as the program that runs the kernels' cases."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SIMT = Path(__file__).resolve().parent
CSRC = SIMT.parents[1] / "csrc"

_NEWEST_TARGET = (2, 13)  # as CMakeLists.txt


def compiler() -> str:
    """g++ with C++20; skips the test where there is none."""
    found = os.environ.get("CXX") or shutil.which("g++")
    if found is None:
        pytest.skip("no g++ on this machine: the kernels cannot run on the host")
    return found


def compile_cases(
    output: Path,
    csrc: Path = CSRC,
    *,
    threads: bool = False,
    only_float32: bool = False,
    bfloat16_state: bool = True,
) -> None:
    """The program of kernel_cases.cpp; ``threads``: one OS thread per CUDA thread, under ThreadSanitizer."""
    flags = ["-DONLY_FLOAT32"] if only_float32 else []
    flags += [] if bfloat16_state else ["-DNO_BFLOAT16_STATE"]
    if threads:
        flags += ["-DSIMT_OS_THREADS", "-fsanitize=thread", "-g", "-pthread"]
    flags += [f"-I{SIMT}", f"-I{csrc}"]
    source = str(SIMT / "kernel_cases.cpp")
    warnings = ["-Wall", "-Wno-unknown-pragmas"]
    _run([compiler(), "-std=c++20", "-O1", *warnings, *flags, source, "-o", str(output)])


def compile_ops(output: Path, *extra_flags: str) -> None:
    """The CUDA ops, registered for CPU tensors, as a library for ``torch.ops.load_library``."""
    torch_dir = Path(torch.__file__).parent
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    target = min((major, minor), _NEWEST_TARGET)
    flags = ["-std=c++20", "-O1", "-fPIC", "-Wno-unknown-pragmas", f"-I{SIMT}", f"-I{CSRC}"]
    flags += ["-isystem", str(torch_dir / "include")]
    flags += [f"-DTORCH_TARGET_VERSION={(target[0] << 56) | (target[1] << 48):#x}ULL"]
    flags += extra_flags
    objects = []
    for name in ("simt_ops", "simt_kernels"):
        objects.append(output.with_name(f"{name}.o"))
        _run([compiler(), *flags, "-c", str(SIMT / f"{name}.cpp"), "-o", str(objects[-1])])
    libraries = ["-L", str(torch_dir / "lib"), "-ltorch_cpu", "-lc10"]
    _run([compiler(), "-shared", *extra_flags, *map(str, objects), "-o", str(output), *libraries])


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
