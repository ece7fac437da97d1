"""The compiled files carry what distributions ask for, and both builds read one list of flags."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from excessmtl_ext import _build_facts, _extension

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"

OVERRUN = """
#include <cstdlib>
#include <cstring>
int main(int, char** arguments) {
  char buffer[8];
  std::memcpy(buffer, "0123456789abcdef", std::atoi(arguments[1]));
  return buffer[0] - '0';
}
"""


def compiled_files() -> list[Path]:
    paths = [Path(path) for path in torch.ops.loaded_libraries if "excessmtl" in path]
    return [*paths, *(found for path in paths for found in path.parent.glob("_C.*.so"))]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files")
@pytest.mark.skipif(not _extension.ops_available, reason="no compiled ops")
def test_compiled_files_are_bound_at_once_read_only_and_watch_their_stack() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf on PATH")
    assert compiled_files()
    for path in compiled_files():
        said = subprocess.run(
            ["readelf", "--wide", "--dynamic", "--segments", "--dyn-syms", path],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        rows = [line.split() for line in said.splitlines() if line.strip()]
        assert "BIND_NOW" in said, path
        assert any(row[0] == "GNU_RELRO" for row in rows), path
        (stack,) = [row for row in rows if row[0] == "GNU_STACK"]
        assert "E" not in "".join(stack[6:-1]), path
        assert "__stack_chk_fail" in said, path


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc checks the calls")
def test_the_flags_end_a_program_that_writes_past_a_buffer(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None or not CSRC.is_dir():
        pytest.skip("no C++ compiler on PATH, or no checkout")
    flags = _build_facts.compile_flags(CSRC)
    (tmp_path / "overrun.cpp").write_text(OVERRUN)
    program = tmp_path / "overrun"
    command = [compiler, "-O3", *flags["cxx"], *flags["link"], tmp_path / "overrun.cpp"]
    subprocess.run([*command, "-o", program], check=True)
    assert subprocess.run([program, "8"], check=False).returncode == 0
    stopped = subprocess.run([program, "9"], capture_output=True, text=True, check=False)
    assert stopped.returncode < 0
    assert "buffer overflow detected" in stopped.stderr


@pytest.mark.slow
def test_cmake_compiles_and_links_every_file_with_the_list(tmp_path: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("ninja") is None or not CSRC.is_dir():
        pytest.skip("no cmake or no ninja on PATH, or no checkout")
    pytest.importorskip("pybind11")
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
         "-DEXCESSMTL_WITH_CUDA=OFF", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"],
        capture_output=True, check=True,
    )  # fmt: skip
    flags = _build_facts.compile_flags(CSRC)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    names = {Path(command["file"]).name for command in commands}
    assert {"ops.cpp", "fused_step.cpp", "bindings.cpp"} <= names
    for command in commands:
        assert set(flags["cxx"]) <= set(command["command"].split()), command["file"]
    rules = [line.split() for line in (tmp_path / "build.ninja").read_text().splitlines()]
    links = [rule for rule in rules if rule[:2] == ["LINK_FLAGS", "="]]
    assert len(links) == 2
    assert all(set(flags["link"]) <= set(rule) for rule in links)


@pytest.mark.skipif(not CSRC.is_dir(), reason="no checkout")
def test_the_jit_build_compiles_and_links_with_the_list(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("EXCESSMTL_WITH_CUDA", "OFF")
    monkeypatch.setattr(_extension, "_compile", lambda *_, **build: asked.update(build))
    _extension._load_compiled_here()
    flags = _build_facts.compile_flags(CSRC)
    assert set(flags["cxx"]) <= set(asked["extra_cflags"])
    assert set(flags["nvcc"]) <= set(asked["extra_cuda_cflags"])
    if sys.platform.startswith("linux"):
        assert asked["extra_ldflags"] == flags["link"]
