"""Says what runs where and why, and whether it works: ``python -m excessmtl_ext.doctor``.

Ends with status 1 when something that should work does not: the ops are missing, lack code for a GPU that is there, or
differ from the reference. Switching them off (``EXCESSMTL_DISABLE_OPS=1``) is a choice and ends with 0.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from excessmtl_ext import _extension, functional, reference, self_test
from excessmtl_ext._extension import BuildInfo
from excessmtl_ext.excess_mtl import ExcessMTL
from excessmtl_ext.self_test import ABSOLUTE_TOLERANCE, NUM_TASKS, OPTIONS
from excessmtl_ext.state import ParamLayout

BENCHMARK_NUMEL = 2**20
BENCHMARK_SECONDS = 1.0

BUILD_HINT = (
    "To compile: `pip install --force-reinstall --no-deps .` in the source folder, or start with EXCESSMTL_JIT=1. "
    "Both need a C++20 compiler."
)


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        status: ``"problem"`` where something that should work does not.
        text: What was found, and the way out of a problem.
    """

    status: Literal["ok", "note", "problem"]
    text: str

    def __str__(self) -> str:
        return f"{self.status:>8}  {self.text}"


@dataclass(frozen=True)
class Gpu:
    """A CUDA device.

    Attributes:
        name: As its driver gives it.
        capability: Major and minor compute capability.
    """

    name: str
    capability: tuple[int, int]


def examine(benchmark_seconds: float = BENCHMARK_SECONDS) -> Iterator[Finding]:
    """Looks at versions, library, GPUs, every op and the speed, in this order.

    Args:
        benchmark_seconds: Time for the benchmark in all; 0 for none.
    """
    yield from examine_versions()
    yield from examine_library(_extension.build_info, _extension.unavailable_reason)
    gpus = find_gpus()
    yield from examine_gpus(gpus, _extension.build_info, _extension.unavailable_reason)
    devices = [torch.device("cpu"), *([torch.device("cuda")] if gpus else [])]
    for device in devices:
        yield from examine_ops(device)
    yield examine_balancer()
    if benchmark_seconds > 0:
        for device in devices:
            yield benchmark(device, benchmark_seconds / len(devices))


def examine_versions() -> Iterator[Finding]:
    """Versions, and the variables of ours that are set."""
    try:
        version = metadata.version("excessmtl-ext")
    except metadata.PackageNotFoundError:
        version = "(not installed)"
    yield Finding(
        "ok",
        f"excessmtl_ext {version} in {Path(__file__).parent}, Python {platform.python_version()}, "
        f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}), {platform.platform()}",
    )
    variables = {key: value for key, value in os.environ.items() if key.startswith("EXCESSMTL_")}
    if variables:
        shown = ", ".join(f"{key}={value}" for key, value in sorted(variables.items()))
        yield Finding("note", f"set: {shown}")


def examine_library(info: BuildInfo | None, reason: str | None) -> Iterator[Finding]:
    """Returns whether the ops are loaded, from where and built with what; else why not and what it takes to build them.

    Args:
        info: Of the loaded ops, or None.
        reason: Why there are none.
    """
    if info is not None:
        paths = sorted(path for path in torch.ops.loaded_libraries if "excessmtl" in path)
        yield Finding("ok", f"compiled ops loaded from {', '.join(paths) or 'an unknown place'}")
        cuda = (
            f"CUDA {info.cuda_version} for {info.cuda_architectures}"
            if info.has_cuda
            else f"without CUDA ({info.cuda_decision or 'no reason recorded'})"
        )
        yield Finding(
            "ok",
            f"built with {info.compiler} against torch {info.torch_version}, {cuda}; "
            f"loads in torch {info.torch_target_version} and later",
        )
        yield Finding("ok", f"CPU code path: {functional.cpu_capability()}")
        return
    if reason == "EXCESSMTL_DISABLE_OPS=1":
        yield Finding("note", f"compiled ops are switched off ({reason})")
        return
    hint = "" if "pip install" in (reason or "") else f" {BUILD_HINT}"
    yield Finding("problem", f"no compiled ops: {reason}.{hint}")
    names = (os.environ.get("CXX", "c++"), "ninja", "nvcc")
    found = ", ".join(f"{name}: {shutil.which(name) or 'not found'}" for name in names)
    yield Finding("note", f"for compiling, {found}")


def find_gpus() -> list[Gpu]:
    """Returns the CUDA devices that torch sees."""
    if not torch.cuda.is_available():
        return []
    return [
        Gpu(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
        for index in range(torch.cuda.device_count())
    ]


def examine_gpus(
    gpus: Sequence[Gpu], info: BuildInfo | None, reason: str | None
) -> Iterator[Finding]:
    """Returns whether the ops have code for each GPU.

    Args:
        gpus: The devices present.
        info: Of the loaded ops, or None.
        reason: Why there are none.
    """
    if not gpus:
        yield Finding("ok", "torch sees no CUDA device: nothing to check there")
    for gpu in gpus:
        capability = f"{gpu.capability[0]}.{gpu.capability[1]}"
        place = f"{gpu.name} (compute capability {capability})"
        if info is None:
            status = "note"  # the library's problem has been told, or it is switched off
            yield Finding(status, f"{place}: reference in use ({reason})")
        elif not info.has_cuda:
            yield Finding(
                "problem",
                f"{place}: reference in use, the ops were built without CUDA. Reinstall with nvcc on PATH and "
                "EXCESSMTL_WITH_CUDA=ON, which says what is missing.",
            )
        elif not has_code_for(gpu.capability, info.cuda_architectures):
            wanted = f"{gpu.capability[0]}{gpu.capability[1]}-real"
            yield Finding(
                "problem",
                f"{place}: the ops have no code for it, only for {info.cuda_architectures}. Reinstall with "
                f"`-C cmake.define.EXCESSMTL_CUDA_ARCHITECTURES={wanted}`.",
            )
        else:
            yield Finding("ok", f"{place}: among {info.cuda_architectures}")


def has_code_for(capability: tuple[int, int], architectures: str) -> bool:
    """Returns whether a build runs on a GPU: binaries run on later minor versions, PTX on whatever is later.

    Args:
        capability: Major and minor compute capability of the GPU.
        architectures: As CMake ("90-real 100-virtual") or as torch ("8.0;9.0+PTX") spells them. Words that name no
            number ("native", "all") count as fitting: the self-test decides.
    """
    for word in re.split(r"[\s;,]+", architectures.strip()):
        cmake = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", word)
        torch_style = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        match = cmake or torch_style
        if match is None:
            if word:
                return True
            continue
        built = int(match[1]), int(match[2])
        has_binary = match[4] != "-virtual"
        has_ptx = match[4] in (("-virtual", None) if cmake else ("+PTX",))
        if match[3]:  # code for one architecture, or one family, runs nowhere later
            has_ptx = False
            fits = built == capability
        else:
            fits = built[0] == capability[0] and built <= capability
        if (has_binary and fits) or (has_ptx and built <= capability):
            return True
    return False


# ---- every op against the reference


def examine_ops(device: torch.device, compiled: Any = functional) -> Iterator[Finding]:
    """Returns which backend each function uses on a device, and whether it agrees with the reference on a small case.

    Args:
        device: Where to run.
        compiled: What is compared with :mod:`excessmtl_ext.reference`.
    """
    if compiled is functional and not _extension.has_op_for(device.type):
        why = _extension.unavailable_reason or f"the ops were built without {device.type}"
        yield Finding("note", f"{device.type}: every op uses the reference ({why})")
        return
    agreeing = []
    for name in self_test.CASES:
        problem = self_test.problem_with(name, device, compiled)
        if problem is None:
            agreeing.append(name)
        else:
            yield Finding("problem", f"{device.type}: {name} {problem}")
    if agreeing:
        yield Finding(
            "ok", f"{device.type}: compiled and equal to the reference: {', '.join(agreeing)}"
        )


def examine_balancer() -> Finding:
    """Takes two steps of ExcessMTL that can be done by hand (He et al. 2024, Eqs. 6, 7 and 9), on the CPU."""
    balancer = ExcessMTL(num_tasks=2, robust_step_size=1.0, gradient_momentum=0.0, combine="sum")
    for first in (3.0, 4.0):
        balancer.update_weights([[torch.tensor([first])], [torch.tensor([1.0])]])
    # Relative risks 16 / 25 and 1 / 2, so the first weight is 1 / (1 + exp(0.5 - 0.64)).
    weight, expected = float(balancer.task_weights[0]), 1.0 / (1.0 + math.exp(0.5 - 0.64))
    if abs(weight - expected) > ABSOLUTE_TOLERANCE:
        return Finding(
            "problem",
            f"two steps by hand give the weight {expected:.6f}, ExcessMTL gives {weight:.6f}. Please report it.",
        )
    return Finding("ok", f"ExcessMTL gives the weights of two steps by hand ({weight:.4f})")


# ---- speed


def benchmark(device: torch.device, seconds: float) -> Finding:
    """Times the fused step, compiled and as reference.

    Args:
        device: Where to run.
        seconds: For both together.
    """
    layout, options = ParamLayout([BENCHMARK_NUMEL]), OPTIONS._replace(gradient_momentum=0.0)
    grads = [torch.randn(BENCHMARK_NUMEL, device=device) for _ in range(NUM_TASKS)]
    backends = {"reference": reference.fused_step_}
    if _extension.has_op_for(device.type):
        backends = {"compiled": functional.fused_step_, **backends}
    medians = {}
    for name, step in backends.items():
        state = functional.init_state(NUM_TASKS, layout, device=device)
        try:
            medians[name] = _median_seconds(
                lambda step=step, state=state: step(grads, layout, state, options),
                device,
                seconds / len(backends),
            )
        except Exception as error:  # as in the self-test
            return Finding(
                "problem", f"{device.type}: the benchmark of the {name} op fails: {error}"
            )
    shown = ", ".join(f"{name} {1e3 * median:.3g} ms" for name, median in medians.items())
    text = (
        f"{device.type}: fused step of {NUM_TASKS} tasks with {BENCHMARK_NUMEL:,} parameters: {shown} (median, "
        f"{torch.get_num_threads()} threads)"
    )
    if medians["reference"] < medians.get("compiled", 0.0):
        return Finding("note", f"{text}; the compiled op is the slower one: is the machine busy?")
    return Finding("ok", text)


def _median_seconds(call: Callable[[], None], device: torch.device, seconds: float) -> float:
    times: list[float] = []
    call()  # not timed: allocates, and loads the kernel
    stop = time.perf_counter() + seconds
    while not times or time.perf_counter() < stop:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the findings as they come; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m excessmtl_ext.doctor",
        description="Says which code runs where and why, and whether it works.",
    )
    parser.add_argument(
        "--benchmark-seconds",
        type=float,
        default=BENCHMARK_SECONDS,
        metavar="S",
        help="time for the benchmark, 0 for none (default: %(default)g)",
    )
    chosen = parser.parse_args(arguments)
    num_problems = 0
    for finding in examine(chosen.benchmark_seconds):
        num_problems += finding.status == "problem"
        print(finding, flush=True)
    if num_problems == 0:
        print("Everything that should work does.")
        return 0
    print(f"{num_problems} {'problem' if num_problems == 1 else 'problems'}, see above.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
