"""Each import runs in a process of its own: what is loaded is decided once, at import."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _paths import ROOT

from excessmtl_ext import _build_facts, _extension, functional

# An editable install finds its package before any folder on sys.path does: its finder goes.
FROM_FOLDER = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
"""

BUILD_WITHOUT_CUDA = _extension.BuildInfo(
    has_cuda=False,
    cuda_version="",
    cuda_architectures="",
    torch_version="2.13.0",
    torch_target_version="2.13",
    compiler="GNU 12",
)

NOTHING_INSTALLED = """
import importlib.metadata
importlib.metadata.distributions = lambda **context: []
"""

REPORT = """
import json, sys, torch, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from excessmtl_ext import _extension
print(json.dumps({
    "available": _extension.ops_available,
    "reason": _extension.unavailable_reason,
    "cpu": _extension.has_op_for("cpu"),
    "cuda": _extension.has_op_for("cuda"),
    "capability": torch.ops.excessmtl_ext.cpu_capability() if _extension.ops_available else None,
    "libraries": [path for path in torch.ops.loaded_libraries if path.endswith("_ops.so")],
    "warnings": [[w.category.__name__, str(w.message)] for w in caught],
    "cuda_initialized": torch.cuda.is_initialized(),
}))
"""

# What the library of another build would say about itself.
FACTS = """
def build_facts():
    return dict(has_cuda=False, cuda_version="", cuda_architectures="", torch_version="",
                torch_target_version="{target}", compiler="")
"""


def import_report(*folders, prelude="", **environment):
    """What importing `_extension` in a new process did, with the package taken from the first of `folders`."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("EXCESSMTL_")}
    if folders:
        variables["PYTHONPATH"] = os.pathsep.join(map(str, folders))
        prelude += FROM_FOLDER
    run = subprocess.run(
        [sys.executable, "-c", prelude + REPORT],
        cwd=sys.prefix,  # not the checkout: `python -c` would import its source folder
        env=variables | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture
def package_without_ops(tmp_path):
    """A folder to import from, whose excessmtl_ext has `_extension` and nothing compiled."""
    package = tmp_path / "site" / "excessmtl_ext"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for module in (_extension, _build_facts):
        shutil.copy(module.__file__, package)
    return package


def assert_falls_back(report, reason):
    assert not report["available"]
    assert not report["cpu"]
    assert not report["cuda"]
    ((category, message),) = report["warnings"]
    assert category == "RuntimeWarning"
    assert message.startswith("No compiled extension (")
    assert "). Using excessmtl_ext.reference, which is slower. " in message
    assert message.endswith("`python -m excessmtl_ext.doctor` looks closer.")
    assert reason in message
    assert reason in report["reason"]


needs_ops = pytest.mark.skipif(
    not _extension.ops_available, reason=f"no compiled ops: {_extension.unavailable_reason}"
)


@needs_ops
def test_installed_ops_load_without_a_warning():
    report = import_report()
    assert report["available"]
    assert report["reason"] is None
    assert report["cpu"]
    assert report["capability"] in ("avx512", "avx2", "default")
    assert report["warnings"] == []


def test_import_touches_no_gpu():
    assert not import_report()["cuda_initialized"]


@needs_ops
def test_build_facts_agree_with_the_registered_kernels():
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for device_type, key in (("cpu", "CPU"), ("cuda", "CUDA"), ("mps", "MPS")):
        expected = has_kernel("excessmtl_ext::fused_step_", key)
        assert _extension.has_op_for(device_type) == expected, device_type


@needs_ops
def test_target_version_is_not_newer_than_the_torch_built_against():
    info = _extension.build_info
    target = _extension._version_pair(info.torch_target_version)
    assert (2, 10) <= target <= (2, 13)
    assert target <= _extension._version_pair(info.torch_version)


def test_missing_library_warns_once_and_names_the_reason(package_without_ops):
    assert_falls_back(import_report(package_without_ops.parent), "it was not built")


def test_source_folder_is_named_as_the_reason(package_without_ops):
    (package_without_ops.parent / "CMakeLists.txt").touch()
    report = import_report(package_without_ops.parent, prelude=NOTHING_INSTALLED)
    assert_falls_back(report, "this is the source folder")
    assert sys.executable in report["reason"]


@pytest.fixture
def checkout_and_site(package_without_ops, tmp_path):
    """A checkout of these sources, in which nothing is compiled, and a folder where pip has installed them."""
    checkout = package_without_ops.parent
    shutil.copytree(_extension._csrc_dir(), checkout / "csrc")
    (checkout / "CMakeLists.txt").touch()
    site = tmp_path / "site-packages"
    (site / "excessmtl_ext").mkdir(parents=True)
    for name in ("_ops", "_C"):
        shutil.copy(_extension._find_compiled(name).origin, site / "excessmtl_ext")
    (site / "excessmtl_ext-1.0.dist-info").mkdir()
    metadata = site / "excessmtl_ext-1.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: excessmtl-ext\nVersion: 1.0\n")
    return checkout, site


@needs_ops
def test_a_checkout_loads_the_installed_ops_of_its_sources(checkout_and_site):
    report = import_report(*checkout_and_site)
    assert report["available"], report["reason"]
    assert report["warnings"] == []
    assert report["libraries"] == [str(checkout_and_site[1] / "excessmtl_ext" / "_ops.so")]


@needs_ops
@pytest.mark.parametrize("change", ["edited", "added", "removed"])
def test_ops_of_other_sources_are_stale_and_not_loaded(checkout_and_site, change):
    csrc = checkout_and_site[0] / "csrc"
    if change == "edited":
        with (csrc / "ops.cpp").open("a") as source:
            source.write("// another line\n")
    elif change == "added":
        (csrc / "new.h").touch()
    else:
        (csrc / "checks.h").unlink()
    report = import_report(*checkout_and_site)
    assert_falls_back(report, f"was built from other C++ sources than those in {csrc}")
    assert "pip install --force-reinstall --no-deps ." in report["reason"]
    assert report["libraries"] == []


@needs_ops
def test_a_build_that_names_no_sources_is_stale_in_a_checkout(checkout_and_site):
    compiled = checkout_and_site[1] / "excessmtl_ext"
    for path in compiled.glob("_C.*"):
        path.unlink()
    (compiled / "_C.py").write_text(FACTS.format(target="2.10"))
    assert_falls_back(import_report(*checkout_and_site), "was built from other C++ sources")


def test_damaged_library_warns_once_and_names_the_reason(package_without_ops):
    (package_without_ops / "_C.py").write_text(FACTS.format(target="2.10"))
    (package_without_ops / "_ops.so").write_bytes(b"not a library")
    assert_falls_back(import_report(package_without_ops.parent), "_ops.so: file too short")


def test_library_without_build_facts_warns_once(package_without_ops):
    (package_without_ops / "_ops.so").write_bytes(b"never opened")
    assert_falls_back(import_report(package_without_ops.parent), "_C")


def test_library_for_a_newer_torch_is_not_loaded(package_without_ops):
    (package_without_ops / "_C.py").write_text(FACTS.format(target="99.0"))
    (package_without_ops / "_ops.so").write_bytes(b"never opened")
    assert_falls_back(import_report(package_without_ops.parent), "built for torch >= 99.0")


def test_disabled_ops_are_silent(package_without_ops):
    report = import_report(package_without_ops.parent, EXCESSMTL_DISABLE_OPS="1")
    assert not report["available"]
    assert report["reason"] == "EXCESSMTL_DISABLE_OPS=1"
    assert report["warnings"] == []


def test_jit_without_sources_warns_once(package_without_ops):
    report = import_report(package_without_ops.parent, EXCESSMTL_JIT="1")
    assert_falls_back(report, "the C++ sources are not in")


def test_jit_with_a_broken_compiler_warns_once(package_without_ops, tmp_path):
    shutil.copytree(_extension._csrc_dir(), package_without_ops / "csrc")
    report = import_report(
        package_without_ops.parent,
        EXCESSMTL_JIT="1",
        EXCESSMTL_WITH_CUDA="OFF",
        TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"),
        CXX=shutil.which("false"),
    )
    assert_falls_back(report, "EXCESSMTL_JIT=1")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on PATH")
def test_jit_compiles_once_and_loads_from_the_cache(package_without_ops, tmp_path):
    shutil.copytree(_extension._csrc_dir(), package_without_ops / "csrc")
    environment = {
        "EXCESSMTL_JIT": "1",
        "EXCESSMTL_WITH_CUDA": "OFF",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"),
    }
    first = import_report(package_without_ops.parent, **environment)
    assert first["available"], first["reason"]
    assert not first["cuda"]
    assert not first["cuda_initialized"]
    (library,) = (tmp_path / "cache").rglob("*.so")
    compiled_at = library.stat().st_mtime_ns

    # Only the cache can answer without a compiler.
    second = import_report(package_without_ops.parent, **environment, CXX="/nonexistent/c++")
    assert second == first
    assert library.stat().st_mtime_ns == compiled_at


def test_toolkit_is_found_behind_a_script(tmp_path, monkeypatch):
    toolkit = tmp_path / "cuda-99.0"
    (toolkit / "include" / "crt").mkdir(parents=True)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}/bin/..' >&2\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(nvcc.parent), prepend=os.pathsep)
    assert _extension._toolkit_dir() == toolkit


# --- the build backend's look at the machine ---


@pytest.fixture(scope="module")
def toolchain():
    path = ROOT / "_build_backend" / "toolchain.py"
    if not path.is_file():
        pytest.skip("the tests run outside a checkout")
    spec = importlib.util.spec_from_file_location("toolchain", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_backend_finds_torch_and_its_version(toolchain):
    assert toolchain.find_torch() == Path(torch.__file__).parent
    facts = toolchain.torch_facts(toolchain.find_torch())
    assert facts["version"] == torch.__version__
    assert facts["cuda"] == (torch.version.cuda or "")
    assert toolchain.has_usable_torch()


def test_backend_finds_torch_from_pips_isolated_environment(toolchain, monkeypatch):
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    assert toolchain.find_torch() == Path(torch.__file__).parent


@pytest.mark.parametrize(
    ("cxx", "reason"),
    [
        ("/nonexistent/c++", "does not start"),
        ("false", "cannot build a C++20 shared library"),
    ],
)
def test_backend_says_why_no_compiler_works(toolchain, monkeypatch, cxx, reason):
    monkeypatch.setenv("CXX", cxx)
    assert reason in toolchain.why_no_compiler()


def test_backend_says_that_no_compiler_is_there(toolchain, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler was found" in toolchain.why_no_compiler()


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on PATH")
def test_backend_accepts_a_working_compiler(toolchain, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    assert toolchain.why_no_compiler() is None


def test_steps_on_a_gpu_without_cuda_ops_are_told_once(monkeypatch):
    """On a machine without a GPU too: the step itself is a stand-in."""
    info = dataclasses.replace(BUILD_WITHOUT_CUDA, cuda_decision="no GPU was found")
    monkeypatch.setattr(_extension, "build_info", info)
    _extension.warn_of_missing_cuda_ops.cache_clear()
    steps = []

    def twin(layout):
        steps.append(layout)

    with pytest.warns(
        RuntimeWarning, match=r"without CUDA \(no GPU was found\).*EXCESSMTL_WITH_CUDA=ON"
    ):
        functional._call(twin, torch.device("cuda"), {"layout": "first"})
    functional._call(
        twin, torch.device("cuda"), {"layout": "second"}
    )  # a second warning would be an error
    assert steps == ["first", "second"]
    _extension.warn_of_missing_cuda_ops.cache_clear()
    monkeypatch.setattr(_extension, "build_info", None)  # that was told at import
    functional._call(twin, torch.device("cuda"), {"layout": "third"})
    _extension.warn_of_missing_cuda_ops.cache_clear()


def test_jit_and_cmake_use_the_same_target():
    path = ROOT / "CMakeLists.txt"
    if not path.is_file():
        pytest.skip("the tests run outside a checkout")
    text = path.read_text()
    assert "set(torch_target {}.{})".format(*_extension._NEWEST_TARGET) in text
