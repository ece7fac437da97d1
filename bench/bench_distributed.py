"""Weak scaling of one training step: the same batch per process, more processes.

    python bench/bench_distributed.py --output bench/results/distributed_CPU_YYYYMM

starts 1, 2 and 4 processes with torchrun, one number after the other, and leaves measurements.json and README.md in the
folder. Variants, timed in turn round after round: training without a balancer, under the balancer with
``reduce="risks"`` and ``"grads"``, all with DistributedDataParallel; and with ``fully_shard`` without and with it.
A step is as slow as its slowest process. Bytes are the kernel's count for rank 0 (Linux), of one step.
``--rounds 0`` measures bytes alone. With more processes than cores the times show the machine, not the method.

``--on-paper`` prints what the bytes promise for 8 to 1,024 GPUs; nothing is measured then.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from reporting import environment, write_folder
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from excessmtl_ext import ExcessMTL

DDP_VARIANTS = {"DDP, no balancer": None, "DDP, risks": "risks", "DDP, grads": "grads"}
FSDP_VARIANTS = {"fully_shard, no balancer": False, "fully_shard, balanced": True}
VARIANTS = (*DDP_VARIANTS, *FSDP_VARIANTS)
SIZES = ("width", "num_tasks", "batch_size", "rounds")

PAPER_GPUS = (8, 64, 256, 1024)
PAPER_TASKS, PAPER_PARAMS = 3, 25_000_000
PAPER_BYTES_PER_S = 50e9
"""One 400 Gb/s network card per GPU."""
PAPER_HOP_S = 5e-6
"""From one GPU to the next in a ring: a launch and a message. Assumed, as the bandwidth is."""


class Net(nn.Module):
    """An encoder of two layers and one linear head per task."""

    def __init__(self, width: int, num_tasks: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.heads = nn.ModuleList([nn.Linear(width, 1) for _ in range(num_tasks)])

    def forward(self, inputs: Tensor) -> list[Tensor]:
        features = self.encoder(inputs)
        return [head(features) for head in self.heads]


def make_step(variant: str, args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """One training step of ``variant`` on data of this process."""
    torch.manual_seed(0)
    net = Net(args.width, args.num_tasks).to(device)
    options: dict[str, Any] | None = None
    if variant in DDP_VARIANTS:
        model: nn.Module = DistributedDataParallel(net)
        if DDP_VARIANTS[variant] is not None:
            options = {"reduce": DDP_VARIANTS[variant], "model": model}
    else:
        fully_shard(net.encoder)
        model = fully_shard(net)
        if FSDP_VARIANTS[variant]:
            options = {}
    balancer = None
    if options is not None:
        balancer = ExcessMTL(net.encoder.parameters(), num_tasks=args.num_tasks, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(dist.get_rank())
    inputs = torch.randn(args.batch_size, args.width, generator=generator).to(device)
    targets = torch.randn(args.num_tasks, args.batch_size, 1, generator=generator).to(device)

    def step() -> None:
        optimizer.zero_grad()
        outputs = model(inputs)
        losses = [
            (out - target).square().mean() for out, target in zip(outputs, targets, strict=True)
        ]
        if balancer is None:
            torch.stack(losses).sum().backward()
        else:
            balancer.backward(losses)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def bytes_written() -> int:
    """What this process has written to files and sockets so far; 0 where the kernel does not say."""
    path = Path("/proc/self/io")
    if not path.is_file():
        return 0
    return int(dict(line.split(": ") for line in path.read_text().splitlines())["wchar"])


def run_rank(args: argparse.Namespace) -> None:
    """Measures every variant as one process of torchrun; rank 0 writes the rows."""
    torch.set_num_threads(1)
    has_cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_cuda else torch.device("cpu")
    )
    if has_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_cuda else "gloo")
    steps = {variant: make_step(variant, args, device) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    sent: dict[str, int] = {}
    for variant, step in steps.items():
        step()
        step()  # the reducer rebuilds its buckets after the first
        dist.barrier()
        before = bytes_written()
        step()
        sent[variant] = bytes_written() - before
    for _ in range(args.rounds):
        for variant, step in steps.items():
            dist.barrier()
            begin = time.perf_counter()
            step()
            elapsed = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
            seconds[variant].append(float(elapsed))
    if dist.get_rank() == 0:
        rows = [
            {
                "processes": dist.get_world_size(),
                "variant": variant,
                "bytes_sent": sent[variant],
                "seconds": seconds[variant],
            }
            for variant in VARIANTS
        ]
        args.rows.write_text(json.dumps(rows))
    dist.destroy_process_group()


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Starts each number of processes and collects their rows."""
    rows: list[dict[str, Any]] = []
    args.output.mkdir(parents=True, exist_ok=True)
    part = args.output / "rows.json"
    for processes in args.processes:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words += ["--nproc-per-node", str(processes), __file__, "--rows", str(part)]
        for name in SIZES:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        subprocess.run(words, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
        rows += json.loads(part.read_text())
    part.unlink()
    return rows


def scaling_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown; efficiency is the one-process median over this one's."""
    alone = {
        row["variant"]: statistics.median(row["seconds"])
        for row in rows
        if row["processes"] == 1 and row["seconds"]
    }
    lines = [
        "| processes | variant | MB sent by rank 0 | ms per step, median (quartiles) | efficiency |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        time_cell = efficiency = "-"
        if len(row["seconds"]) > 1:
            low, median, high = (1e3 * q for q in statistics.quantiles(row["seconds"], n=4))
            time_cell = f"{median:.2f} ({low:.2f}-{high:.2f})"
            if row["variant"] in alone:
                efficiency = f"{1e3 * alone[row['variant']] / median:.2f}"
        sent = row["bytes_sent"] / 1e6
        lines.append(
            f"| {row['processes']} | {row['variant']} | {sent:.2f} | {time_cell} | {efficiency} |"
        )
    return "\n".join(lines)


def paper_table() -> str:
    """Bytes and time of the exchanges on W GPUs, if the measured bytes hold and nothing is hidden behind a pass."""
    lines = [
        '| GPUs | MB sent per step, no balancer | `reduce="grads"` | ms at least, no balancer | `reduce="grads"` '
        "| of it latency |",
        "|---|---|---|---|---|---|",
    ]
    for size in PAPER_GPUS:
        cells = []
        for gradients in (2, PAPER_TASKS + 1):
            sent = (size - 1) / size * gradients * PAPER_PARAMS * 4
            latency = gradients * (size - 1) * PAPER_HOP_S
            cells.append((sent / 1e6, 1e3 * (sent / PAPER_BYTES_PER_S + latency), 1e3 * latency))
        (plain_mb, plain_ms, _), (mb, ms, latency_ms) = cells
        lines.append(
            f"| {size:,} | {plain_mb:.0f} | {mb:.0f} | {plain_ms:.1f} | {ms:.1f} | {latency_ms:.1f} |"
        )
    return "\n".join(lines)


def write_report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Leaves measurements.json and README.md in the output folder."""
    facts = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    num_params = 2 * (args.width**2 + args.width)
    config = {"num_params": num_params, **{name: getattr(args, name) for name in SIZES}}
    content = {"environment": facts, "config": config, "rows": rows}
    timed = (
        f"{args.rounds} rounds, load average before the end {facts['load_average'][0]:.1f}"
        if args.rounds
        else "bytes only, no step was timed"
    )
    machine = f"{facts['cpu']}, {facts['cpu_count']} cores, one thread per process"
    versions = f"torch {facts['torch']}, commit {facts['commit'][:10]}, {facts['date']}"
    sizes = f"T = {args.num_tasks}, P = {num_params:,} shared parameters, batch {args.batch_size} per process"
    readme = (
        f"# Weak scaling\n\n{machine}, {versions}; {sizes}; {timed}. `{facts['command']}`\n\n"
        f"{scaling_table(rows)}\n"
    )
    write_folder(args.output, readme, measurements=content)


def main() -> None:
    """Runs as asked for: all numbers of processes, or one process of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1024, help="of every layer")
    parser.add_argument("--num-tasks", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64, help="per process")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--output", type=Path, default=Path("build/distributed"))
    parser.add_argument("--on-paper", action="store_true")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # one process of torchrun
    args = parser.parse_args()
    if args.on_paper:
        print(paper_table())
    elif args.rows is not None:
        run_rank(args)
    else:
        rows = run_all(args)
        write_report(args, rows)
        print(scaling_table(rows))


if __name__ == "__main__":
    main()
