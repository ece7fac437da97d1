"""Reads off the compiled CUDA kernels what can be known without a GPU, and fails when a figure gets worse.

usage: python bench/sass_gate.py [--update] [--archs 80,90,100]

Compiles the kernels with nvcc for each architecture and prints a table: registers, the blocks per
SM they allow, spills and stack, and for the main loop of the fused step the bytes moved per
element, the loads in flight before the first use, and the instructions per element. Compares with
bench/sass_gate.json; --update writes it.

Needs nvcc, and nvdisasm from the toolkit, from NVDISASM, or from a wheel: triton carries one, or
pip install nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from excessmtl_ext._build_facts import compile_flags

CSRC = Path(__file__).resolve().parents[1] / "csrc"
COMMITTED = Path(__file__).with_suffix(".json")
FLAGS = ["-O3", *compile_flags(CSRC)["nvcc"]]
REGISTERS_PER_SM = 65536
THREADS = 256
MAX_BLOCKS_PER_SM = 8  # 2,048 threads

# One instantiation of every kind of kernel; they differ in their table of pointers and their Fisher only.
SOURCE = """
#include "cuda/combine.cuh"
#include "cuda/fold.cuh"
#include "cuda/fused_step.cuh"
#include "cuda/fused_step_combine.cuh"
#include "cuda/update_task_weights.cuh"
namespace excessmtl::cuda {
#define STEP(grad_t, acc_t, kSqrt, kMomentum, kTable)                             \\
  template __global__ void fused_step_kernel<grad_t, acc_t, kSqrt, kMomentum, kTable>( \\
      const __grid_constant__ StepArgs<acc_t>, const __grid_constant__ PointerTable<kTable>);
STEP(float, float, true, false, kSmallTable)
STEP(float, float, true, true, kSmallTable)
STEP(float, float, false, false, kSmallTable)
STEP(float, float, true, false, kLargeTable)
STEP(float, float, true, true, kLargeTable)
STEP(__nv_bfloat16, float, true, false, kSmallTable)
STEP(__half, float, true, true, kSmallTable)
STEP(double, double, true, false, kSmallTable)
STEP(double, double, true, true, kSmallTable)
STEP(float, BFloat16Bits, true, false, kSmallTable)
STEP(float, BFloat16Bits, true, true, kSmallTable)
STEP(__nv_bfloat16, BFloat16Bits, true, false, kSmallTable)
#define STEP_COMBINE(grad_t, acc_t, kSqrt, kMomentum)                                \\
  template __global__ void                                                          \\
  fused_step_combine_kernel<grad_t, acc_t, kSqrt, kMomentum, kSmallTable>(          \\
      const __grid_constant__ StepCombineArgs<acc_t>, const __grid_constant__ PointerTable<kSmallTable>);
STEP_COMBINE(float, float, true, false)
STEP_COMBINE(float, float, true, true)
STEP_COMBINE(float, float, false, false)
STEP_COMBINE(__nv_bfloat16, float, true, false)
STEP_COMBINE(__half, float, true, true)
STEP_COMBINE(double, double, true, false)
STEP_COMBINE(double, double, true, true)
template __global__ void combine_kernel<float, float, kSmallTable>(
    const __grid_constant__ CombineArgs, const __grid_constant__ PointerTable<kSmallTable>);
template __global__ void combine_kernel<__nv_bfloat16, float, kSmallTable>(
    const __grid_constant__ CombineArgs, const __grid_constant__ PointerTable<kSmallTable>);
template __global__ void fold_kernel<float, float, kSmallTable>(
    const __grid_constant__ FoldArgs<float>, const __grid_constant__ PointerTable<kSmallTable>);
}
"""


@dataclass
class Figures:
    """What the gate holds a kernel to; the loop's figures only for the fused step."""

    registers: int
    blocks_per_sm: int
    spill_bytes: int
    stack_bytes: int
    loop_bytes_per_element: float | None = None
    loop_narrow_accesses: int | None = None
    loads_before_use: int | None = None
    loop_instructions_per_element: float | None = None


def find_nvdisasm() -> str:
    """The disassembler: NVDISASM, the PATH, beside nvcc, or inside an installed wheel."""
    candidates = [os.environ.get("NVDISASM"), shutil.which("nvdisasm")]
    for package, inside in (("triton", "backends/nvidia/bin"), ("nvidia", "cuda_nvdisasm/bin")):
        spec = importlib.util.find_spec(package)
        for root in spec.submodule_search_locations or [] if spec else []:
            candidates.append(str(Path(root) / inside / "nvdisasm"))
            candidates += map(str, Path(root).glob("cu*/bin/nvdisasm"))
    for candidate in candidates:
        if candidate and Path(candidate).is_file():
            return candidate
    raise SystemExit(
        "nvdisasm was not found. Run `pip install nvidia-cuda-nvdisasm`, or set NVDISASM."
    )


def kernel_name(mangled: str) -> str:
    """A readable name for the instantiations above."""
    if "fused_step" not in mangled:
        kernel = re.search(r"cuda\d+(\w+?_kernel)", mangled)
        assert kernel is not None, mangled
        grad = "bfloat16" if "bfloat16" in mangled else "float32"
        grad += " rounded" if re.search(r"_kernelI\w*?tLi", mangled) else ""
        return kernel[1] + (f" {grad}" if "Table" in mangled and "write" not in mangled else "")
    match = re.search(r"fused_step(_combine)?_kernelI(.*?)Lb([01])ELb([01])ELi(\d+)E", mangled)
    assert match is not None, mangled
    types = {"ff": "float32", "dd": "float64", "ft": "float32"}
    grad = types.get(match[2], "bfloat16" if "bfloat16" in match[2] else "float16")
    choices = ("sqrt" if match[3] == "1" else "linear") + (" momentum" if match[4] == "1" else "")
    choices += " rounded" if match[2].endswith("t") else ""  # unsigned short: bfloat16 state
    table = "4 KiB" if int(match[5]) < 1000 else "32 KiB"
    return f"fused_step{match[1] or ''} {grad} {choices}, {table} table"


def disassemble(nvdisasm: str, cubin: Path) -> dict[str, list[str]]:
    text = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True)
    sections = re.split(r"^\s*\.section\s+\.text\.", text.stdout, flags=re.MULTILINE)[1:]
    return {section.split(",")[0]: section.splitlines() for section in sections}


def inner_loops(lines: list[str]) -> list[list[str]]:
    """Bodies of the loops that contain no other loop."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in lines:
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1].strip())
    spans = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?(\.L_\w+)", instruction)
        if target and labels.get(target[1], end + 1) <= end:
            spans.append((labels[target[1]], end))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [instructions[begin : end + 1] for begin, end in inner]


def access_bytes(instruction: str) -> int:
    width = re.search(r"\b(?:LDG|STG)\S*?\.(128|64|U16|U8)\b", instruction)
    return {"128": 16, "64": 8, "U16": 2, "U8": 1}[width[1]] if width else 4


def loads_before_use(body: list[str]) -> int:
    """Loads issued before the first instruction that needs one of them."""
    loaded: set[int] = set()
    count = 0
    for instruction in body:
        registers = [int(number) for number in re.findall(r"\bR(\d+)\b", instruction)]
        if "LDG" in instruction:
            count += 1
            width = max(access_bytes(instruction) // 4, 1)
            loaded |= set(range(registers[0], registers[0] + width))
        elif any(register in loaded for register in registers[1:]):
            break
    return count


def loop_figures(
    body: list[str], element_bytes: int, has_momentum: bool
) -> tuple[float, int, int, float]:
    """The figures of one loop; element_bytes: of the state."""
    loads = [i for i in body if "LDG" in i]
    stores = [i for i in body if "STG" in i]
    elements = sum(map(access_bytes, stores)) / element_bytes / (2 if has_momentum else 1)
    moved = sum(map(access_bytes, loads + stores))
    vector_bytes = 4 * element_bytes if element_bytes < 8 else 16
    narrow = sum(access_bytes(i) < 8 for i in loads)
    narrow += sum(access_bytes(i) < vector_bytes for i in stores)
    return moved / elements, narrow, loads_before_use(body), len(body) / elements


def main_loop(
    lines: list[str], element_bytes: int, has_momentum: bool
) -> tuple[float, int, int, float]:
    """The worst figures over the loops that take several vectors per turn: one for a whole block, one for a warp."""
    streams = 2 if has_momentum else 1
    # Evict first, as the state is stored: the [T] vectors of float64 are stored in 64 bits too.
    width = ".EF.64" if element_bytes == 2 else ".128"
    bodies = [
        b for b in inner_loops(lines) if sum("STG" in i and width in i for i in b) >= 2 * streams
    ]
    assert bodies, "no vector loop found"
    figures = [loop_figures(body, element_bytes, has_momentum) for body in bodies]
    return (
        max(f[0] for f in figures),
        max(f[1] for f in figures),
        min(f[2] for f in figures),
        max(f[3] for f in figures),
    )


def measure(arch: str, nvdisasm: str) -> dict[str, Figures]:
    """Compiles for one architecture and reads the figures of every kernel."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        source.write_text(SOURCE)
        command = ["nvcc", *FLAGS, f"-arch=sm_{arch}", f"-I{CSRC}", "-cubin", "-Xptxas", "-v"]
        result = subprocess.run(
            [*command, str(source), "-o", str(cubin)], capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            raise SystemExit(result.stderr)
        code = disassemble(nvdisasm, cubin)
    figures = {}
    report = re.split(r"Compiling entry function '", result.stderr)[1:]
    for entry in report:
        mangled = entry.split("'")[0]
        name = kernel_name(mangled)
        stack, stores, loads = map(
            int,
            re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry).groups(),
        )  # fmt: skip
        registers = int(re.search(r"Used (\d+) registers", entry)[1])
        allocated = -(-registers // 8) * 8
        blocks = min(MAX_BLOCKS_PER_SM, REGISTERS_PER_SM // (allocated * THREADS))
        local = sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in code[mangled])
        figures[name] = Figures(registers, blocks, stores + loads, stack + local)
        if name.startswith("fused_step"):
            loop = main_loop(code[mangled], state_bytes(name), "momentum" in name)
            figures[name].loop_bytes_per_element = loop[0]
            figures[name].loop_narrow_accesses = loop[1]
            figures[name].loads_before_use = loop[2]
            figures[name].loop_instructions_per_element = round(loop[3], 2)
    return figures


def state_bytes(name: str) -> int:
    """Of one element of the state; ``rounded``: bfloat16."""
    return 2 if "rounded" in name else 8 if "float64" in name else 4


def violations(name: str, new: Figures, old: dict[str, float | None] | None) -> list[str]:
    """What is wrong in itself, and what is worse than the committed figure."""
    found = []
    if new.spill_bytes or new.stack_bytes:
        found.append("spills or uses local memory")
    if new.loop_bytes_per_element is not None:
        grad_bytes = 8 if "float64" in name else 4 if "float32" in name else 2
        expected = grad_bytes + state_bytes(name) * (4 if "momentum" in name else 2)
        if new.loop_bytes_per_element != expected:
            found.append(f"moves {new.loop_bytes_per_element} bytes per element, not {expected}")
        if new.loop_narrow_accesses:
            found.append("has accesses narrower than a vector in its main loop")
        if new.loads_before_use < 4:
            found.append(f"has only {new.loads_before_use} loads in flight before the first use")
    if old is None:
        return [*found, "has no committed figures: run with --update"]
    for field in ("registers", "loop_instructions_per_element"):
        value = getattr(new, field)
        if value is not None and (old[field] is None or value > old[field]):
            found.append(f"{field}: {value}, committed {old[field]}")
    for field in ("blocks_per_sm", "loads_before_use"):
        value = getattr(new, field)
        if value is not None and (old[field] is None or value < old[field]):
            found.append(f"{field}: {value}, committed {old[field]}")
    return found


def main() -> int:
    """Measures, prints, compares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="write the committed figures")
    parser.add_argument("--archs", default="80,90,100")
    options = parser.parse_args()
    if shutil.which("nvcc") is None:
        raise SystemExit("nvcc was not found: the gate compiles the kernels.")
    nvdisasm = find_nvdisasm()
    banner = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    version = re.search(r"release (\S+),", banner.stdout)[1]
    committed = json.loads(COMMITTED.read_text()) if COMMITTED.is_file() else {"archs": {}}
    if committed.get("nvcc", version) != version and not options.update:
        # Another compiler allocates other registers; the rules that stand by themselves hold all the same.
        print(
            f"nvcc {version}; the committed figures are of nvcc {committed['nvcc']}: only the fixed rules are checked"
        )
    measured = {arch: measure(arch, nvdisasm) for arch in options.archs.split(",")}

    print(
        f"{'arch':7}{'kernel':52}{'regs':>5}{'blk/SM':>7}{'spill':>6}{'stack':>6}{'B/elem':>7}{'loads':>6}{'instr/el':>9}"
    )
    problems = []
    for arch, kernels in measured.items():
        for name, f in sorted(kernels.items()):
            loop = ["", "", ""]
            if f.loop_bytes_per_element is not None:
                loop = [
                    f"{f.loop_bytes_per_element:g}",
                    str(f.loads_before_use),
                    f"{f.loop_instructions_per_element:.1f}",
                ]
            print(
                f"sm_{arch:4}{name:52}{f.registers:>5}{f.blocks_per_sm:>7}{f.spill_bytes:>6}{f.stack_bytes:>6}"
                f"{loop[0]:>7}{loop[1]:>6}{loop[2]:>9}"
            )
            old = committed["archs"].get(arch, {}).get(name)
            if options.update or committed.get("nvcc") != version:
                old = asdict(f)
            problems += [f"sm_{arch} {name}: {text}" for text in violations(name, f, old)]
    for problem in problems:
        print(f"WORSE  {problem}")
    if options.update and not problems:
        archs = {a: {n: asdict(f) for n, f in sorted(k.items())} for a, k in measured.items()}
        COMMITTED.write_text(json.dumps({"nvcc": version, "archs": archs}, indent=1) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
