"""What CMake and the loader both decide: which sources a build is made from, and whether it has CUDA ops.

Needs the standard library alone. As a script, ``python -I _build_facts.py digest CSRC`` and
``python -I _build_facts.py cuda CHOICE ARCHITECTURES NVCC`` print JSON.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

Capability = tuple[int, int]

SUPPORTED_CAPABILITIES: tuple[Capability, ...] = ((8, 0), (9, 0), (10, 0))
"""A100, H100 and B200: what ``EXCESSMTL_WITH_CUDA=ON`` compiles for, with PTX of the newest for what comes after."""

_TORCH_NAMES = {  # torch.utils.cpp_extension knows them too
    "Volta": "7.0",
    "Turing": "7.5",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # of the driver's enum CUdevice_attribute


def source_digest(csrc: Path) -> str:
    """Returns the SHA-256 over names and bytes of the sources.

    Args:
        csrc: Their folder.
    """
    names = sorted(
        path.relative_to(csrc).as_posix()
        for path in csrc.rglob("*")
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith("~")
    )
    lines = [
        f"{hashlib.sha256((csrc / name).read_bytes()).hexdigest()}  {name}\n" for name in names
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def compile_flags(csrc: Path) -> dict[str, list[str]]:
    """Returns the flags of every build, for the programs ``"cxx"``, ``"nvcc"`` and ``"link"``.

    Args:
        csrc: The folder of the sources, which has them in ``compile_flags.txt``.
    """
    flags: dict[str, list[str]] = {"cxx": [], "nvcc": [], "link": []}
    for line in (csrc / "compile_flags.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            program, flag = line.split(" ", 1)
            flags[program].append(flag)
    return flags


class CudaPlan(NamedTuple):
    """Whether to compile CUDA ops.

    Attributes:
        wanted: The answer.
        reason: Why, for people.
        architectures: As CMake spells them: ``"80-real;90-real;90-virtual"``. Empty where none are wanted, and as
            long as no nvcc is known.
    """

    wanted: bool
    reason: str
    architectures: str


def plan_cuda(choice: str, named: str, nvcc: str) -> CudaPlan:
    """Decides by what was asked for, what the environment names and which GPUs are there, in this order.

    Args:
        choice: ``"AUTO"``, ``"ON"`` or ``"OFF"``.
        named: Architectures as CMake spells them, or none.
        nvcc: The compiler, or empty while it is not known.

    Raises:
        ValueError: ``choice`` is none of the three, or ``TORCH_CUDA_ARCH_LIST`` lists no compute capabilities.
    """
    if choice not in ("AUTO", "ON", "OFF"):
        raise ValueError(f"Expected EXCESSMTL_WITH_CUDA to be AUTO, ON or OFF, but got {choice!r}.")
    if choice == "OFF":
        return CudaPlan(False, "EXCESSMTL_WITH_CUDA=OFF", "")
    if named:
        return CudaPlan(True, "EXCESSMTL_CUDA_ARCHITECTURES is set", named)
    if os.environ.get("CUDAARCHS"):
        return CudaPlan(True, "CUDAARCHS is set", os.environ["CUDAARCHS"])
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,")
    if listed:
        return CudaPlan(True, "TORCH_CUDA_ARCH_LIST is set", cmake_architectures(listed))
    known = known_capabilities(nvcc) if nvcc else []
    if choice == "ON":
        wanted = [each for each in SUPPORTED_CAPABILITIES if each in known]
        return CudaPlan(True, "EXCESSMTL_WITH_CUDA=ON", _code_and_ptx(wanted, known))
    gpus = find_gpus()
    shown = ", ".join(f"{major}.{minor}" for major, minor in gpus)
    if not gpus:
        reason = (
            "no GPU was found, and neither TORCH_CUDA_ARCH_LIST nor CUDAARCHS names an architecture "
            "(EXCESSMTL_WITH_CUDA=ON compiles for all that are supported)"
        )
        return CudaPlan(False, reason, "")
    recent = [gpu for gpu in gpus if gpu >= SUPPORTED_CAPABILITIES[0]]
    if not recent:
        return CudaPlan(
            False, f"the GPUs found (compute capability {shown}) are older than 8.0", ""
        )
    return CudaPlan(
        True, f"GPUs of compute capability {shown} were found", _code_and_ptx(recent, known)
    )


def _code_and_ptx(wanted: list[Capability], known: list[Capability]) -> str:
    """Returns code for each capability that nvcc knows, and PTX of the newest of them or before, for later ones."""
    spelled = [f"{each[0]}{each[1]}-real" for each in wanted if each in known]
    ptx = max((each for each in known if wanted and each <= wanted[-1]), default=None)
    return ";".join(spelled + ([f"{ptx[0]}{ptx[1]}-virtual"] if ptx else []))


def cmake_architectures(listed: str) -> str:
    """Returns CMake's spelling of torch's: ``"80-real;90-real;90-virtual"`` for ``"7.5;8.0;9.0+PTX"``.

    Args:
        listed: As in ``TORCH_CUDA_ARCH_LIST``: capabilities or torch's names for them, separated by semicolons, commas
            or spaces. Those before 8.0 are left out.

    Raises:
        ValueError: one of them is no compute capability, or all are before 8.0.
    """
    numbers = listed
    for name, capabilities in _TORCH_NAMES.items():
        numbers = numbers.replace(name, capabilities)
    spelled: list[str] = []
    for number in re.split(r"[\s;,]+", numbers):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", number)
        if match is None:
            raise ValueError(
                f"Expected TORCH_CUDA_ARCH_LIST to list compute capabilities, as in 8.0;9.0+PTX, but got {number!r}. "
                "EXCESSMTL_WITH_CUDA=OFF compiles the CPU ops alone."
            )
        if (int(match[1]), int(match[2])) < SUPPORTED_CAPABILITIES[0]:
            continue
        code = match[1] + match[2] + match[3]
        spelled += [f"{code}-real"] + [f"{code}-virtual"] * bool(match[4])
    if not spelled:
        raise ValueError(
            f"Expected a compute capability of at least 8.0 in TORCH_CUDA_ARCH_LIST, but got {listed!r}. "
            "EXCESSMTL_WITH_CUDA=OFF compiles the CPU ops alone."
        )
    return ";".join(spelled)


def torch_architectures(spelled: str) -> str:
    """Returns torch's spelling of CMake's: ``"8.0;9.0+PTX"`` for ``"80-real;90-real;90-virtual"``.

    Args:
        spelled: As in ``CUDAARCHS``. Torch has no PTX without code: ``"90-virtual"`` brings both.

    Raises:
        ValueError: one of them is no number, such as ``native``.
    """
    has_ptx: dict[str, bool] = {}
    for word in spelled.split(";"):
        match = re.fullmatch(r"(\d+)(\d[af]?)(-real|-virtual)?", word)
        if match is None:
            raise ValueError(f"Expected numbers such as 90-real in CUDAARCHS, but got {word!r}.")
        capability = f"{match[1]}.{match[2]}"
        has_ptx[capability] = has_ptx.get(capability, False) or match[3] != "-real"
    return ";".join(f"{capability}{'+PTX' * ptx}" for capability, ptx in has_ptx.items())


def find_gpus() -> list[Capability]:
    """Returns the compute capabilities of the GPUs that the CUDA driver shows to this process; none without a driver.

    Starts CUDA in this process, where a later fork could not use it any more.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found: set[Capability] = set()
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        attributes = ((major, _CAPABILITY_MAJOR), (minor, _CAPABILITY_MINOR))
        if driver.cuDeviceGet(ctypes.byref(device), index) == 0 and all(
            driver.cuDeviceGetAttribute(ctypes.byref(value), which, device) == 0
            for value, which in attributes
        ):
            found.add((major.value, minor.value))
    return sorted(found)


def known_capabilities(nvcc: str) -> list[Capability]:
    """Returns the compute capabilities that an nvcc compiles for; none where it does not start.

    Args:
        nvcc: The compiler.
    """
    try:
        answer = subprocess.run(
            [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False
        )
    except OSError:
        return []
    found = re.findall(r"^compute_(\d+)(\d)$", answer.stdout, re.MULTILINE)
    return sorted((int(major), int(minor)) for major, minor in found)


def main() -> None:
    """Prints what CMake asks for."""
    if sys.argv[1] == "digest":
        print(json.dumps({"source_digest": source_digest(Path(sys.argv[2]))}))
        return
    try:
        print(json.dumps(plan_cuda(*sys.argv[2:])._asdict()))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
