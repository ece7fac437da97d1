"""Loads the compiled ops into ``torch.ops.excessmtl_ext``, or says why they are missing.

Read once, when the package is imported:

- ``EXCESSMTL_DISABLE_OPS=1``: run on :mod:`excessmtl_ext.reference` and say nothing.
- ``EXCESSMTL_JIT=1``: compile the sources in the package with ninja and the C++ compiler found,
  once per version of torch and of the sources, into ``TORCH_EXTENSIONS_DIR`` or torch's cache.
- ``EXCESSMTL_WITH_CUDA=AUTO|ON|OFF``: CUDA kernels in that build. AUTO: where nvcc is found.

A missing or unloadable library is a warning, never an error: the reference does the same, slower.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

# As in CMakeLists.txt, where the reasons are. The newest torch whose features the ops use; flags.
_NEWEST_TARGET = (2, 13)
_CUDA_FLAGS = ["-prec-div=false", "-prec-sqrt=false", "-ftz=true"]
_CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"
_CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden"]


@dataclasses.dataclass(frozen=True)
class BuildInfo:
    """What the loaded ops were built with."""

    has_cuda: bool
    cuda_version: str
    cuda_architectures: str
    torch_version: str
    torch_target_version: str
    compiler: str


class _OpsUnavailable(Exception):
    """Carries the reason shown to the user."""


def _version_pair(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _load_installed() -> BuildInfo:
    """Loads the library that lies beside the package, or where an editable install put it."""
    spec = importlib.util.find_spec(f"{__package__}._ops")
    if spec is None or spec.origin is None:
        if (Path(__file__).parents[1] / "CMakeLists.txt").is_file():
            raise _OpsUnavailable(
                "this is the source folder, where nothing is compiled; "
                "start Python elsewhere, or `pip install -e .`"
            )
        raise _OpsUnavailable(
            "it was not built; `pip install --force-reinstall --no-deps .` needs a C++20 compiler"
        )
    facts = importlib.import_module(f"{__package__}._C").build_facts()
    target = facts["torch_target_version"]
    if _version_pair(torch.__version__) < _version_pair(target):
        raise _OpsUnavailable(
            f"it was built for torch >= {target} and this is torch {torch.__version__}: "
            "reinstall with --no-build-isolation --force-reinstall --no-deps"
        )
    torch.ops.load_library(spec.origin)
    return BuildInfo(**facts)


def _csrc_dir() -> Path:
    package = Path(__file__).resolve().parent
    candidates = (package / "csrc", package.parent / "csrc")  # installed; source folder
    for candidate in candidates:
        if (candidate / "sources.txt").is_file():
            return candidate
    raise _OpsUnavailable(f"the C++ sources are not in {candidates[0]}")


def _toolkit_dir() -> Path | None:
    """The toolkit of the nvcc found: the folder with nvcc's own headers (``crt/``), or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if nvcc is None:
        return None
    try:
        # nvcc on PATH may be a link or a script elsewhere; nvcc tells where its toolkit is: TOP=...
        plan = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "-"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    top = re.search(r"^#\$ TOP=(.*)$", plan.stderr, re.MULTILINE)
    candidates = [Path(nvcc).resolve().parents[1]]
    if top is not None:
        candidates.insert(0, Path(top.group(1)).resolve())
    return next((path for path in candidates if (path / "include" / "crt").is_dir()), None)


def _toolkit_version(toolkit: Path) -> str:
    header = (toolkit / "include" / "cuda.h").read_text()
    match = re.search(r"^#define CUDA_VERSION (\d+)(\d\d)\d$", header, re.MULTILINE)
    return f"{match[1]}.{int(match[2])}" if match else ""


def _cuda_toolkit_for_jit() -> Path | None:
    choice = os.environ.get("EXCESSMTL_WITH_CUDA", "AUTO")
    if choice == "OFF":
        return None
    toolkit = _toolkit_dir() if torch.version.cuda else None
    if toolkit is None and choice == "ON":
        raise _OpsUnavailable("EXCESSMTL_WITH_CUDA=ON, but nvcc is missing or torch is a CPU build")
    return toolkit


def _compile(toolkit: Path | None, architectures: str, **build: Any) -> None:
    """Runs torch's ninja build and loads the result; `toolkit` is None for a build without CUDA."""
    from torch.utils import cpp_extension  # slow, and needs setuptools: only when compiling

    saved = cpp_extension.CUDA_HOME, os.environ.get("TORCH_CUDA_ARCH_LIST")
    try:
        if toolkit is not None:
            # torch guesses the toolkit from where nvcc lies, and asks the GPU for its architecture,
            # which would start CUDA at import.
            cpp_extension.CUDA_HOME = str(toolkit)
            os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
        cpp_extension.load(with_cuda=toolkit is not None, is_python_module=False, **build)
    finally:
        cpp_extension.CUDA_HOME = saved[0]
        if saved[1] is None:
            os.environ.pop("TORCH_CUDA_ARCH_LIST", None)


def _load_compiled_here() -> BuildInfo:
    """Compiles the sources with ninja, or finds them compiled, and loads the library."""
    csrc = _csrc_dir()
    toolkit = _cuda_toolkit_for_jit()
    names = re.findall(r"^[^#\n].*$", (csrc / "sources.txt").read_text(), re.MULTILINE)
    sources = [name for name in names if toolkit is not None or not name.endswith(".cu")]
    has_cuda = any(name.endswith(".cu") for name in sources)

    target = min(_version_pair(torch.__version__), _NEWEST_TARGET)
    define = f"-DTORCH_TARGET_VERSION={(target[0] << 56) | (target[1] << 48):#x}ULL"
    use_cuda = ["-DUSE_CUDA"] if target < (2, 13) else []  # as in CMakeLists.txt
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", _CUDA_ARCHITECTURES)

    flags = (sources, _CXX_FLAGS, _CUDA_FLAGS, has_cuda and architectures)
    digest = hashlib.sha256(repr(flags).encode())
    for path in sorted(path for path in csrc.rglob("*") if path.is_file()):
        digest.update(path.read_bytes())
    name = re.sub(r"\W", "_", f"excessmtl_ext_torch{torch.__version__}_{digest.hexdigest()[:16]}")

    root = os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
    folder = Path(root).expanduser() / name
    is_complete = folder / "complete"  # another process may be writing the library just now
    if is_complete.exists():
        torch.ops.load_library(str(folder / f"{name}.so"))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"excessmtl_ext: compiling the ops into {folder} (EXCESSMTL_JIT=1)", file=sys.stderr)
        _compile(
            toolkit if has_cuda else None,
            architectures,
            name=name,
            build_directory=str(folder),
            sources=[str(csrc / source) for source in sources],
            extra_cflags=[*_CXX_FLAGS, define],
            extra_cuda_cflags=["-O3", "-std=c++20", *_CUDA_FLAGS, define, *use_cuda],
            extra_include_paths=[str(csrc)],
        )
        is_complete.touch()
    return BuildInfo(
        has_cuda=has_cuda,
        cuda_version=_toolkit_version(toolkit) if toolkit is not None and has_cuda else "",
        cuda_architectures=architectures if has_cuda else "",
        torch_version=str(torch.__version__),
        torch_target_version=f"{target[0]}.{target[1]}",
        compiler=os.environ.get("CXX", "c++"),
    )


def _first_error(error: Exception) -> str:
    """One line for the warning: the compiler's first error, else the exception's first line."""
    if isinstance(
        error.__cause__, OSError
    ):  # load_library names the file; its cause names the fault
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if "error:" in line), lines[0])


def _load() -> tuple[BuildInfo | None, str | None]:
    if os.environ.get("EXCESSMTL_DISABLE_OPS") == "1":
        return None, "EXCESSMTL_DISABLE_OPS=1"
    use_jit = os.environ.get("EXCESSMTL_JIT") == "1"
    try:
        return (_load_compiled_here() if use_jit else _load_installed()), None
    except Exception as error:  # whatever a compiler or a damaged file raises, the reference works
        reason = ("EXCESSMTL_JIT=1: " if use_jit else "") + _first_error(error)
    warnings.warn(
        f"No compiled extension ({reason}). Using excessmtl_ext.reference, which is slower. "
        "`python -m excessmtl_ext.doctor` looks closer.",
        RuntimeWarning,
        stacklevel=2,
    )
    return None, reason


build_info, unavailable_reason = _load()
ops_available: bool = build_info is not None


def has_op_for(device_type: str) -> bool:
    """Whether ops are there for tensors of this device type ("cpu", "cuda")."""
    if build_info is None:
        return False
    return device_type == "cpu" or (device_type == "cuda" and build_info.has_cuda)
