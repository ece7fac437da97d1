"""Weak scaling of one training step: the same batch per rank, more ranks.

    torchrun --nproc-per-node 1 bench/bench_distributed.py
    torchrun --nproc-per-node 2 bench/bench_distributed.py
    torchrun --nproc-per-node 4 bench/bench_distributed.py

Each prints a row per variant: DistributedDataParallel on the plain sum of the losses, and under the
balancer with ``reduce="risks"`` and ``"grads"``. Variants are timed in turn, round after round; a
step is as slow as its slowest rank. Bytes are the kernel's count for rank 0 (Linux); ``efficiency``
needs the one-rank row of the same machine and is left to the reader. With more ranks than cores
the table shows the machine, not the method.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from excessmtl_ext import ExcessMTL

VARIANTS = ("sum of losses", "risks", "grads")


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
        return [head(features).sum(1) for head in self.heads]


def make_step(variant: str, args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """One training step of ``variant`` on data of this rank."""
    torch.manual_seed(0)
    net = Net(args.width, args.num_tasks).to(device)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(dist.get_rank())
    inputs = torch.randn(args.batch_size, args.width, generator=generator).to(device)
    targets = torch.randn(args.num_tasks, args.batch_size, generator=generator).to(device)
    balancer = None
    if variant != "sum of losses":
        balancer = ExcessMTL(
            net.encoder.parameters(), num_tasks=args.num_tasks, reduce=variant, model=model
        )

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


def main() -> None:
    """Times every variant and prints the table's rows on rank 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1024, help="of every layer")
    parser.add_argument("--num-tasks", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64, help="per rank")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
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
    for step in steps.values():
        step()
        step()  # the reducer rebuilds its buckets after the first
    for _ in range(args.rounds):
        for variant, step in steps.items():
            dist.barrier()
            before, begin = bytes_written(), time.perf_counter()
            step()
            elapsed = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
            sent[variant] = bytes_written() - before
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
            seconds[variant].append(float(elapsed))
    if dist.get_rank() == 0:
        num_params = 2 * (args.width**2 + args.width)
        print(
            f"{device.type}, {os.cpu_count()} cores, torch {torch.__version__}, T = {args.num_tasks}, "
            f"P = {num_params:,}, batch {args.batch_size} per rank, {args.rounds} rounds\n"
            "| ranks | variant | ms per step, median | quartiles | MB sent by rank 0 |\n|---|---|---|---|---|"
        )
        for variant, samples in seconds.items():
            low, median, high = (1e3 * q for q in statistics.quantiles(samples, n=4))
            print(
                f"| {dist.get_world_size()} | {variant} | {median:.2f} | {low:.2f} to {high:.2f} "
                f"| {sent[variant] / 1e6:.2f} |"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
