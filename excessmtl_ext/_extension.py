"""Loads the compiled ops into ``torch.ops.excessmtl_ext``, or says why they are missing.

Read once, when the package is imported:

- ``EXCESSMTL_DISABLE_OPS=1``: run on :mod:`excessmtl_ext.reference` and say nothing.
- ``EXCESSMTL_JIT=1``: compile the sources in the package with ninja and the C++ compiler found,
  once per version of torch and of the sources, into ``TORCH_EXTENSIONS_DIR`` or torch's cache.
- ``EXCESSMTL_WITH_CUDA=AUTO|ON|OFF``: CUDA kernels in that build. AUTO: where nvcc, a CUDA build of torch, and a GPU
  or a stated architecture list (``TORCH_CUDA_ARCH_LIST``, ``CUDAARCHS``) are found.

A package imported from a source checkout, as ``python -m`` does it there, has nothing compiled beside it: it loads the
ops that pip installed, if they were built from the checkout's sources.

A missing, unloadable or stale library is a warning, never an error: the reference does the same, slower.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import torch

from excessmtl_ext import _build_facts

# As in CMakeLists.txt: the newest torch whose features the ops use.
_NEWEST_TARGET = (2, 13)

OP_NAMES = (
    "fused_step_",
    "fused_step_combine_",
    "accumulate_excess_risk_",
    "update_task_risks_",
    "update_task_weights_",
    "commit_step_",
    "combine_",
    "fold_",
)
"""The ops that change what they are given."""


@dataclasses.dataclass(frozen=True)
class BuildInfo:
    """What the loaded ops were built with, and from.

    ``cuda_decision`` says why the build has CUDA ops or has none, ``source_digest`` which sources it was made from.
    """

    has_cuda: bool
    cuda_version: str
    cuda_architectures: str
    torch_version: str
    torch_target_version: str
    compiler: str
    cuda_decision: str = ""
    source_digest: str = ""


class _OpsUnavailable(Exception):
    """Carries the reason shown to the user."""


def _version_pair(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _find_compiled(name: str) -> ModuleSpec | None:
    """Finds a compiled file: beside the package, where an editable install put it, or where pip did."""
    spec = importlib.util.find_spec(f"{__package__}.{name}")
    if spec is None and _is_source_folder():
        for installed in metadata.distributions(name="excessmtl-ext"):
            folder = str(installed.locate_file(str(__package__)))
            spec = spec or PathFinder.find_spec(f"{__package__}.{name}", [folder])
    return spec if spec is not None and spec.origin is not None else None


def _is_source_folder() -> bool:
    return (Path(__file__).parents[1] / "CMakeLists.txt").is_file()


def _build_facts_of(spec: ModuleSpec) -> dict[str, Any]:
    """Returns what the build says about itself, from the module ``_C`` that was compiled with it."""
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module.build_facts()


def _load_installed() -> BuildInfo:
    """Loads the compiled library, unless it fits neither this torch nor the sources at hand."""
    library, facts_module = _find_compiled("_ops"), _find_compiled("_C")
    if library is None:
        if _is_source_folder():
            raise _OpsUnavailable(
                "this is the source folder, where nothing is compiled, and no excessmtl-ext with compiled ops is "
                f"installed for {sys.executable}; run `pip install .`"
            )
        raise _OpsUnavailable(
            "it was not built; `pip install --force-reinstall --no-deps .` needs a C++20 compiler"
        )
    if facts_module is None:
        raise _OpsUnavailable(f"{library.origin} lies there without its module _C: reinstall")
    facts = _build_facts_of(facts_module)
    target = facts["torch_target_version"]
    if _version_pair(torch.__version__) < _version_pair(target):
        raise _OpsUnavailable(
            f"it was built for torch >= {target} and this is torch {torch.__version__}: "
            "reinstall with --no-build-isolation --force-reinstall --no-deps"
        )
    if _is_source_folder() and facts.get("source_digest") != _build_facts.source_digest(
        _csrc_dir()
    ):
        raise _OpsUnavailable(
            f"{library.origin} was built from other C++ sources than those in {_csrc_dir()}; "
            "build them again: `pip install --force-reinstall --no-deps .`, with -e if it is an editable install"
        )
    torch.ops.load_library(str(library.origin))
    missing = [name for name in OP_NAMES if not hasattr(torch.ops.excessmtl_ext, name)]
    if missing:
        raise _OpsUnavailable(
            f"it lacks {', '.join(missing)}, so it is of another version than the Python files; "
            "`pip install --force-reinstall --no-deps .` builds it anew"
        )
    return BuildInfo(**facts)


def _csrc_dir() -> Path:
    package = Path(__file__).resolve().parent
    candidates = (package / "csrc", package.parent / "csrc")  # installed; source folder
    for candidate in candidates:
        if (candidate / "sources.txt").is_file():
            return candidate
    raise _OpsUnavailable(f"the C++ sources are not in {candidates[0]}")


def _toolkit_dir() -> Path | None:
    """Returns the toolkit of the nvcc found: the folder with nvcc's own headers (``crt/``), or None."""
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


def _plan_cuda_for_jit() -> tuple[Path | None, str, str]:
    """Returns the toolkit or None, torch's names of the architectures, and why a build here has CUDA ops or none."""
    choice = os.environ.get("EXCESSMTL_WITH_CUDA", "AUTO")
    if torch.version.cuda is None:
        toolkit, obstacle = None, "torch is a build without CUDA"
    else:
        toolkit, obstacle = (None if choice == "OFF" else _toolkit_dir()), "nvcc was not found"
    # In a process of its own, because looking for GPUs starts CUDA.
    nvcc = str(toolkit / "bin" / "nvcc") if toolkit else ""
    asked = subprocess.run(
        [sys.executable, "-I", _build_facts.__file__, "cuda", choice, "", nvcc],
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode != 0:
        raise _OpsUnavailable(asked.stderr.strip())
    plan = _build_facts.CudaPlan(**json.loads(asked.stdout))
    if plan.wanted and toolkit is None:
        if choice == "ON":
            raise _OpsUnavailable(f"EXCESSMTL_WITH_CUDA=ON, but {obstacle}")
        return None, "", obstacle
    if not plan.wanted:
        return None, "", plan.reason
    return toolkit, _build_facts.torch_architectures(plan.architectures), plan.reason


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
    toolkit, architectures, cuda_decision = _plan_cuda_for_jit()
    names = re.findall(r"^[^#\n].*$", (csrc / "sources.txt").read_text(), re.MULTILINE)
    sources = [name for name in names if toolkit is not None or not name.endswith(".cu")]
    has_cuda = any(name.endswith(".cu") for name in sources)

    target = min(_version_pair(torch.__version__), _NEWEST_TARGET)
    define = f"-DTORCH_TARGET_VERSION={(target[0] << 56) | (target[1] << 48):#x}ULL"
    use_cuda = ["-DUSE_CUDA"] if target < (2, 13) else []  # as in CMakeLists.txt
    source_digest = _build_facts.source_digest(csrc)
    flags = _build_facts.compile_flags(csrc)
    digest = hashlib.sha256(repr((source_digest, sources, architectures)).encode()).hexdigest()[:16]
    name = re.sub(r"\W", "_", f"excessmtl_ext_torch{torch.__version__}_{digest}")

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
            extra_cflags=["-O3", *flags["cxx"], define],
            extra_cuda_cflags=["-O3", *flags["nvcc"], define, *use_cuda],
            extra_ldflags=flags["link"] if sys.platform == "linux" else [],
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
        cuda_decision=cuda_decision,
        source_digest=source_digest,
    )


def _first_error(error: Exception) -> str:
    """Finds the one line for the warning: the compiler's first error, else the exception's first line."""
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
    """Returns whether ops are there for tensors of this device type ("cpu", "cuda")."""
    if build_info is None:
        return False
    return device_type == "cpu" or (device_type == "cuda" and build_info.has_cuda)


@functools.cache
def warn_of_missing_cuda_ops() -> None:
    """Warns, once, of a step on a GPU that runs on the reference because the build has CPU ops alone."""
    if build_info is not None and not build_info.has_cuda:
        warnings.warn(
            f"The ops were built without CUDA ({build_info.cuda_decision or 'no reason recorded'}). Steps on a GPU use "
            "excessmtl_ext.reference, which is slower. Reinstall where the GPU is, or with EXCESSMTL_WITH_CUDA=ON: "
            "`pip install --force-reinstall --no-deps .`",
            RuntimeWarning,
            stacklevel=2,
        )
