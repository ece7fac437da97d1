"""What every benchmark of this project reports and how: conditions, tables, verdicts, JSON, the results folder."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from timing import Ratio, Timing

from excessmtl_ext import _extension, functional

BENCH = Path(__file__).parent

# ---- conditions ---------------------------------------------------------------------------------


def _output_of(*command: str) -> str:
    """Returns what a command prints, run in this folder; nothing where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=BENCH)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def cpu_name() -> str:
    """Returns the processor's model as the operating system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def last_level_cache_bytes() -> int:
    """Returns the size of CPU 0's largest cache as Linux gives it; 32 MiB on other systems."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes) or 32 << 20


def load_average() -> list[float]:
    """Returns the runnable processes over the last 1, 5 and 15 minutes, this one included; empty where unknown."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []


def read_rows(table: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV file by column; none where there is no file."""
    if not table.is_file():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def append_rows(table: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Appends rows to a CSV file, which begins with the names of its columns."""
    is_new = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(columns)
        writer.writerows(rows)


def environment(device: torch.device) -> dict[str, Any]:
    """Returns what a reader needs to judge a number: hardware, versions, commit, threads, load."""
    facts: dict[str, Any] = {
        "device": str(device),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": functional.cpu_capability(),
        "last_level_cache_mib": last_level_cache_bytes() / (1 << 20),
        "num_threads": torch.get_num_threads(),
        "load_average": load_average(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "ops": asdict(_extension.build_info) if _extension.build_info is not None else None,
        "commit": _output_of("git", "rev-parse", "HEAD") or "unknown",
        "is_dirty": bool(_output_of("git", "status", "--porcelain", "--untracked-files=no")),
        "command": " ".join(["python", *(Path(part).name for part in sys.argv)]),
        "date": time.strftime("%Y-%m-%d"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_mib": properties.total_memory >> 20,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return facts


def conditions(facts: Mapping[str, Any]) -> str:
    """Formats hardware, versions, commit and load as one paragraph."""
    load = ", ".join(f"{moment} {values}" for moment, values in facts["load_averages"].items())
    cores = f"{facts['cpu_count']} cores, {facts['num_threads']} threads"
    if gpu := facts.get("gpu"):
        hardware = (
            f"{gpu['name']} (compute capability {gpu['capability']}, {gpu['multiprocessors']} SMs), "
            f"ops compiled for {facts['ops']['cuda_architectures']}, host {facts['cpu']}, {cores}"
        )
    else:
        hardware = (
            f"{facts['cpu']}, {cores}, last-level cache {facts['last_level_cache_mib']:.0f} MiB, "
            f"path {facts['cpu_capability']}"
        )
    return (
        f"{hardware}, torch {facts['torch']}, Python {facts['python']}, commit {facts['commit'][:10]}"
        f"{' with local changes' if facts['is_dirty'] else ''}, {facts['date']}. "
        f"Load average (1, 5, 15 minutes): {load}."
    )


def short_conditions(facts: Mapping[str, Any]) -> str:
    """Formats processor, threads, versions, commit and date as one sentence."""
    return (
        f"{facts['cpu']}, {facts['num_threads']} thread(s), torch {facts['torch']}, Python {facts['python']}, commit "
        f"{facts['commit'][:10]}, {facts['date']}."
    )


def open_device(name: str) -> torch.device:
    """Returns the device named, or ends the program with the reason why nothing can be measured on it."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "Expected `--device` cuda to be there, but torch sees no CUDA device. Nothing measured."
        )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if not _extension.has_op_for(device.type):
        sys.exit(
            f"Expected compiled ops for {device.type}, but there are none "
            f"({_extension.unavailable_reason or 'built without CUDA'}). Nothing measured."
        )
    return device


# ---- tables and verdicts ------------------------------------------------------------------------


@dataclass(frozen=True)
class TableText:
    """A table for the console and for the README."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def to_markdown(self) -> str:
        lines = [f"### {self.title}", "", "| " + " | ".join(self.header) + " |"]
        lines.append("|" + "---|" * len(self.header))
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def to_rich(self) -> Table:
        table = Table(*self.header, title=self.title)
        for row in self.rows:
            table.add_row(*row)
        return table


def format_time(timing: Timing) -> str:
    """Formats a median and its quartiles in milliseconds, or in microseconds below one."""
    scale, unit = (1e3, "ms") if timing.median_s >= 1e-3 else (1e6, "us")
    low, high = timing.quartiles_s()
    return f"{timing.median_s * scale:.3g} {unit} ({low * scale:.3g}-{high * scale:.3g})"


def format_ms(timing: Timing) -> str:
    """Formats a median and its quartiles in milliseconds, without the unit."""
    low, high = timing.quartiles_s()
    return f"{timing.median_s * 1e3:.3g} ({low * 1e3:.3g}-{high * 1e3:.3g})"


def format_ratio(value: Ratio | None) -> str:
    """Formats a ratio and its quartiles; a dash for None."""
    return "-" if value is None else f"{value.median:.3g} ({value.low:.3g}-{value.high:.3g})"


def verdict(
    what: str, value: Ratio, best: float, limit: float | None, *, is_upper: bool = True
) -> str:
    """Formats a ratio with its goal: met, missed, or undecided where medians and fastest samples disagree.

    They do on a busy machine: two threads that wait for one another then lose a time slice, in the
    numerator and in the denominator alike, and the ratio of two such samples is 1 whatever was measured.

    Args:
        what: Names numerator and denominator.
        value: Of the medians.
        best: Ratio of the fastest samples.
        limit: The goal; None where there is none.
        is_upper: Whether the goal is a largest value, not a smallest.
    """
    measured = f"{what}: {format_ratio(value)}, fastest samples {best:.3g}"
    if limit is None:
        return f"{measured}, no goal"
    are_met = {(v <= limit if is_upper else v >= limit) for v in (value.median, best)}
    outcome = "undecided" if len(are_met) == 2 else "met" if True in are_met else "missed"
    return f"{measured}, goal {'at most' if is_upper else 'at least'} {limit:g}: {outcome}"


# ---- files --------------------------------------------------------------------------------------


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file atomically, each list of numbers on one line."""
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[\s+((?:-?[\d.e+-]+,?\s+)+)\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    part = path.with_suffix(".part")
    part.write_text(text + "\n")
    part.replace(path)


def write_folder(output: Path, readme: str | Sequence[str], **contents: Any) -> None:
    """Writes README.md and one JSON file per keyword into a results folder.

    Args:
        output: The folder; made where it is missing.
        readme: The text, or its lines.
        contents: File name without suffix to content.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_json(output / f"{name}.json", content)
    text = readme if isinstance(readme, str) else "\n".join(readme)
    (output / "README.md").write_text(text.rstrip() + "\n")


def default_output(bench: str, device: torch.device) -> Path:
    """Returns the results folder of a benchmark, named after hardware, threads and month."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    hardware = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    cores = "" if device.type == "cuda" else f"_{os.cpu_count()}_cores"
    threads = torch.get_num_threads()
    limited = "" if cores == "" or threads == os.cpu_count() else f"_{threads}_thread"
    return BENCH / "results" / f"{bench}_{hardware}{cores}{limited}_{time.strftime('%Y%m')}"
