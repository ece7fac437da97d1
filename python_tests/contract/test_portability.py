"""The CPU loops under other compilers and processors, judged by a driver that knows scalars only.

Where the cross compiler and the emulator are missing the ARM part skips, with the reason shown
(Debian, Ubuntu: ``apt install g++-aarch64-linux-gnu qemu-user``).
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from _paths import ROOT

from excessmtl_ext import _build_facts

DRIVER = Path(__file__).with_name("element_loops_driver.cpp")
CSRC = ROOT / "csrc"
LOOPS = sorted((CSRC / "cpu").glob("element_loops_*.cpp"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LOOPS, reason="the tests run outside a checkout"),
]


def tool(*names):
    """The first of these programs on PATH; without one, the test skips."""
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip(f"none of {', '.join(names)} is on PATH")
    return found


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


def compiled(compiler, folder, *flags):
    """The objects of the loops, with the flags they ship with, by the name of their source."""
    objects = {}
    for source in LOOPS:
        objects[source.stem] = str(folder / f"{source.stem}.o")
        command = (
            compiler,
            "-O3",
            *_build_facts.compile_flags(CSRC)["cxx"],
            *flags,
            "-c",
            str(source),
        )
        run(*command, "-o", objects[source.stem])
    return objects


def link_and_run(compiler, objects, folder, flags=(), emulator=()):
    program = str(folder / "driver")
    command = (compiler, "-O1", "-std=c++20", *flags, f"-I{CSRC}", str(DRIVER))
    run(*command, *objects.values(), "-o", program)
    return run(*emulator, program)


def assert_loops_agree(output, expected_names):
    """Every line says that values were compared, or that this processor lacks the instruction set."""
    lines = dict(line.split(": ", 1) for line in output.splitlines())
    assert set(lines) == expected_names
    for name, said in lines.items():
        assert re.fullmatch(r"0 of [1-9]\d{6,} values off|not on this processor", said), (
            name,
            said,
        )
    assert "values off" in lines["default"]


@pytest.fixture(scope="module", params=["c++", "clang++"])
def native(request, tmp_path_factory):
    """A compiler of this machine, a folder, and what it made of the loops there."""
    compiler = tool(request.param)
    folder = tmp_path_factory.mktemp("native")
    return compiler, folder, compiled(compiler, folder)


def test_loops_match_scalar_sums_with_every_instruction_set(native):
    compiler, folder, objects = native
    is_x86 = "__x86_64__ 1" in run(compiler, "-dM", "-E", "-x", "c++", "/dev/null")
    names = {"default", "avx2", "avx512"} if is_x86 else {"default"}
    assert_loops_agree(link_and_run(compiler, objects, folder), names)


def test_wide_instructions_stay_in_functions_of_their_own_file(native):
    """A weak function compiled for AVX-512 could be the one the linker keeps for every machine."""
    symbols = tool("nm")
    for name, path in native[2].items():
        defined = [line.split() for line in run(symbols, "--defined-only", path).splitlines()]
        shared = [symbol for _, kind, symbol in defined if kind in "WwVvu"]
        assert shared == [], name


def test_loops_match_scalar_sums_on_arm(tmp_path):
    compiler = tool("aarch64-linux-gnu-g++")
    emulator = tool("qemu-aarch64", "qemu-aarch64-static")
    objects = compiled(compiler, tmp_path)
    output = link_and_run(compiler, objects, tmp_path, flags=("-static",), emulator=(emulator,))
    assert_loops_agree(output, {"default"})


def test_driver_and_loops_know_the_types_in_the_order_of_the_ops():
    def enumerators(path, declaration):
        body = re.search(declaration + r" \{([^}]*)\}", path.read_text())
        assert body, path
        return [name.strip() for name in body[1].split(",")]

    types = enumerators(CSRC / "param_layout.h", "enum GradType : uint8_t")
    assert types[-1] == "kNumGradTypes"
    assert enumerators(DRIVER, "enum Type") == types[:-1]
    header = (CSRC / "cpu" / "element_loops.h").read_text()
    assert f"kNumElementTypes = {len(types) - 1};" in header
