"""Runs the op tests on ops that are compiled with AddressSanitizer and UndefinedBehaviorSanitizer.

usage: sanitize.py [--build FOLDER] [--kernels | PYTEST ARGUMENTS]

Without arguments: every test file of the ops. The ops are compiled into FOLDER (a temporary one by
default) by the package's own EXCESSMTL_JIT=1, with the sanitizers added by a ``CXX`` of its own. Needs g++ with libasan
and libubsan; about five minutes on two cores for everything.

--kernels: the CUDA sources instead, compiled for the host over simt/simt.h, and every check of simt/check_ops.py; about
three minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from simt import build as simt_build
from simt import check_ops

TESTS = Path(__file__).resolve().parent
OP_TESTS = [
    "contract/test_fused_step.py",
    "contract/test_op_boundary.py",
    "contract/test_state_dtype.py",
    "contract/test_mixed_precision.py",
]

FLAGS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",  # a finding ends the process
    "-fno-omit-frame-pointer",
    "-g1",
    "-U_FORTIFY_SOURCE",  # its checked copies of memcpy and others are not those that AddressSanitizer intercepts
    "-O1",  # after the package's -O3: a third of its time to compile with checks everywhere
]


def runtime(name: str) -> Path | None:
    """Where g++ keeps this library of a sanitizer, or None."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    said = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False
    )
    path = Path(said.stdout.strip())
    return path.resolve() if path.is_absolute() and path.exists() else None


def missing_runtime() -> str | None:
    """Why the sanitizers cannot be used here, or None."""
    absent = [
        name for name in ("libasan.so", "libubsan.so", "libstdc++.so.6") if runtime(name) is None
    ]
    return f"g++ has no {' and no '.join(absent)}" if absent else None


def environment(build: Path) -> dict[str, str]:
    """What a Python process needs to compile and load sanitized ops."""
    compiler = build / "sanitizing_compiler"  # torch takes CXX for the name of one program
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" {" ".join(FLAGS)}\n')
    compiler.chmod(0o755)
    return {
        **os.environ,
        "CXX": str(compiler),
        "EXCESSMTL_JIT": "1",
        "EXCESSMTL_WITH_CUDA": "OFF",
        "TORCH_EXTENSIONS_DIR": str(build),
        # AddressSanitizer must come before what Python itself loads, and sees exceptions only where the C++
        # library is there as early.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}",
        # Python and torch keep memory until the process ends, and allocate what glibc may refuse.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def run(build: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A Python process on sanitized ops."""
    return subprocess.run(
        [sys.executable, *command],
        env=environment(build), cwd=build, capture_output=True, text=True, check=False,
    )  # fmt: skip


def compile_kernels(build: Path, *, only_float32: bool = False) -> Path:
    """The CUDA ops for the host, sanitized; ``only_float32``: a third of the time, for the checks of that type."""
    library = build / "sanitized_simt_ops.so"
    simt_build.compile_ops(library, *FLAGS, *(["-DONLY_FLOAT32"] if only_float32 else []))
    return library


def check_kernels(
    build: Path, library: Path, checks: Iterable[str] = check_ops.CHECKS
) -> subprocess.CompletedProcess[str]:
    """These checks of simt/check_ops.py, which prints its results as JSON."""
    return run(build, check_ops.__file__, str(library), *checks)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--build", type=Path)
    parser.add_argument("--kernels", action="store_true")
    args, rest = parser.parse_known_args()
    reason = missing_runtime()
    if reason is not None:
        print(f"{reason}: nothing to run.", file=sys.stderr)
        return 2
    build = args.build or Path(tempfile.mkdtemp(prefix="sanitized_ops_"))
    build.mkdir(parents=True, exist_ok=True)
    if args.kernels:
        result = check_kernels(build, compile_kernels(build))
        print(result.stdout, result.stderr, sep="")
        is_clean = result.returncode == 0 and not any(json.loads(result.stdout).values())
        return 0 if is_clean else 1
    tests = rest or ["-q", *[str(TESTS / name) for name in OP_TESTS]]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, env=environment(build), cwd=build, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
