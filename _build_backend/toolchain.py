"""What the build machine offers: where torch lies, found without importing it, and a C++ compiler.

As a script it prints the facts about torch as JSON; CMakeLists.txt reads them from there.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

# The first release whose stable ABI has what the ops use: Tensor[] arguments, parallel_for.
OLDEST_TORCH = (2, 10)

# What CMake tries, in its order, when CXX is not set.
_CXX_NAMES = ("c++", "g++", "clang++", "icpx")

_PROBE = """
#include <cmath>
#include <concepts>
template <std::floating_point T> T root(T x) { return std::sqrt(x); }
template float root(float);
"""


def find_torch() -> Path | None:
    """The folder of the torch to build against: the build's own, else the outer environment's."""
    spec = find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    # pip's isolated build hides the environment it was started from by a sitecustomize on
    # PYTHONPATH. Without PYTHONPATH (-E) the same interpreter sees it again, and with it the torch
    # that will run the ops.
    ask = "from importlib.util import find_spec as f; s = f('torch'); print(s and s.origin or '')"
    answer = subprocess.run(
        [sys.executable, "-E", "-c", ask],
        cwd=Path(sys.executable).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    origin = answer.stdout.strip()
    return Path(origin).parent if origin else None


def torch_facts(torch_dir: Path) -> dict[str, str]:
    """Version and CUDA version ("" for a CPU build), read from torch/version.py."""
    text = (torch_dir / "version.py").read_text()

    def value(name: str) -> str:
        match = re.search(rf"^{name}\b[^=\n]*= *['\"]([^'\"]*)['\"]", text, re.MULTILINE)
        return match.group(1) if match else ""

    return {"dir": str(torch_dir), "version": value("__version__"), "cuda": value("cuda")}


def has_usable_torch() -> bool:
    """Whether a torch is there whose headers the ops can be built against."""
    torch_dir = find_torch()
    if torch_dir is None:
        return False
    version = re.match(r"(\d+)\.(\d+)", torch_facts(torch_dir)["version"])
    return version is not None and tuple(map(int, version.groups())) >= OLDEST_TORCH


def why_no_compiler() -> str | None:
    """Why the ops cannot be compiled here, or None when a C++20 compiler works."""
    if os.name == "nt":
        return None  # Visual Studio is found by CMake, not on PATH: let CMake speak.
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        origin = f"CXX={os.environ['CXX']}"
    else:
        command = next(([name] for name in _CXX_NAMES if shutil.which(name)), [])
        origin = " ".join(command)
    if not command:
        return (
            f"no C++ compiler was found (CXX is not set; PATH has none of {', '.join(_CXX_NAMES)})"
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(_PROBE)
        command += ["-std=c++20", "-fPIC", "-shared", str(source), "-o", f"{folder}/probe.so"]
        try:
            compiled = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"the C++ compiler does not start ({origin}: {error.strerror})"
    if compiled.returncode != 0:
        said = (compiled.stderr.strip() or f"exit status {compiled.returncode}").splitlines()[0]
        return f"the C++ compiler cannot build a C++20 shared library ({origin}: {said})"
    return None


if __name__ == "__main__":
    found = find_torch()
    if found is None:
        sys.exit("No torch in this environment.")
    print(json.dumps(torch_facts(found)))
