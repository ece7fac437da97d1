"""clang-tidy over csrc/: the CPU ops as they are, the kernels through the tests' host shim, which clang can parse.

    python .ci/clang_tidy.py [FILE ...]     all of them without a file; exit status 1 when one has a finding

Not read: bindings.cpp, which only names macros that CMake defines, and the launches that the shim replaces.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "_build_backend"))
from toolchain import find_torch  # noqa: E402

SIMT = ROOT / "python_tests" / "simt"
NEWEST_TARGET = "0x020d000000000000ULL"  # as CMakeLists.txt


def sources() -> list[Path]:
    """What has a main text for clang: every C++ file of the ops, and the shim's two, which include the kernels."""
    names = (ROOT / "csrc" / "sources.txt").read_text(encoding="utf-8").split("\n")
    cpu = [ROOT / "csrc" / name for name in names if name.endswith(".cpp")]
    return [*cpu, SIMT / "simt_ops.cpp", SIMT / "simt_kernels.cpp"]


def findings(source: Path, torch_include: Path) -> str:
    """What clang-tidy says of one file, or nothing."""
    flags = ["-std=c++20", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={NEWEST_TARGET}"]
    flags += ["-isystem", str(torch_include), f"-I{ROOT / 'csrc'}", "-Wno-unknown-pragmas"]
    if SIMT in source.parents:
        flags += ["-isystem", str(SIMT)]
    result = subprocess.run(
        ["clang-tidy", "--quiet", str(source), "--", *flags],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.stdout + result.stderr if result.returncode else ""


def main() -> int:
    """Judges the files named on the command line that it knows, or all."""
    torch_dir = find_torch()
    if torch_dir is None:
        sys.exit("clang-tidy needs torch's headers: pip install torch")
    asked = {Path(name).resolve() for name in sys.argv[1:]}
    chosen = [source for source in sources() if not asked or source in asked]
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda source: findings(source, torch_dir / "include"), chosen))
    print("".join(said), end="")
    return int(any(said))


if __name__ == "__main__":
    sys.exit(main())
