"""Compares estimates without bias with the full-batch gradient, along the first epoch of runs with uniform weights.

    python bench/reproduction/estimator/halves.py digits multimnist-14px sarcos --data-root DATA --output RESULTS

At some twenty steps, evenly spaced in log time, the run is held still and the noisy tasks' share of the risk g^T H^-1 g
is measured, H from the squares the run has accumulated (linear, Eq. 7), with

- full: the full-batch gradient, which the others estimate;
- batch: one mini-batch gradient, squared, as published; it counts variance as risk;
- momentum: the bias-corrected running mean, momentum 0.98, squared;
- corrected: the same without what variance alone would leave in it, as the default of ExcessMTL takes it away;
- halves: the products of the gradients of two halves of a mini-batch, whose noise is independent.

Batch and halves are means over sixteen mini-batches at these very parameters: T numbers that are smoothed.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import bias
import grid
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from reporting import environment, short_conditions, write_folder  # isort: skip
from rich.progress import track
from torch import Tensor

from excessmtl_ext.data import Split, Task
from excessmtl_ext.data.seeding import seeded_generator
from excessmtl_ext.models import EncoderHeads
from excessmtl_ext.training.run.config import TrainConfig
from excessmtl_ext.training.run.metrics import task_losses
from excessmtl_ext.training.run.workloads import WORKLOADS

ESTIMATES = ("full", "batch", "momentum", "corrected", "halves")
COLUMNS = ("seed", "step", "num_tasks", "num_noisy", *ESTIMATES)
NUM_MEASUREMENTS = 20


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("datasets", nargs="+", choices=sorted(grid.SCREEN))
    parser.add_argument("--noise", type=float, default=0.8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data-root")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = {**environment(torch.device("cpu")), "noise": arguments.noise}
    arguments.output.mkdir(parents=True, exist_ok=True)
    for dataset in arguments.datasets:
        rows = []
        for seed in range(arguments.seeds):
            cell = grid.Cell("screen", dataset, arguments.noise, seed, 256, "uniform")
            rows += list(measure(cell.config(arguments.data_root)))
        with (arguments.output / f"halves_{dataset}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows([*row[:4], *(f"{value:.4f}" for value in row[4:])] for row in rows)
    write_folder(arguments.output, make_readme(arguments.output, facts), environment=facts)


def make_readme(folder: Path, facts: Mapping[str, Any]) -> list[str]:
    """Returns README.md from the tables in a folder."""
    columns: list[list[str]] = []
    for path in sorted(folder.glob("halves_*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        shares = [statistics.fmean(float(row[name]) for row in rows) for name in ESTIMATES]
        uniform = int(rows[0]["num_noisy"]) / int(rows[0]["num_tasks"])
        title = f"{path.stem.removeprefix('halves_')} ({len({row['seed'] for row in rows})} seeds)"
        columns.append([title, *(f"{share:.2f}" for share in shares), f"{uniform:.2f}"])
    names = ["share of the noisy tasks", *ESTIMATES, "number of tasks"]
    lines = [f"| {' | '.join(cells)} |" for cells in zip(names, *columns, strict=True)]
    return [
        "# Estimates of the excess risk without bias",
        "",
        short_conditions(facts),
        "",
        "The noisy tasks' share in g^T H^-1 g, mean over the first epoch of runs with uniform weights, "
        f"{facts['noise']:.0%} of their",
        "training labels corrupted. The rows: `bench/reproduction/estimator/halves.py`, which writes this folder.",
        "",
        lines[0],
        "|" + "---|" * (len(columns) + 1),
        *lines[1:],
    ]


def measure(config: TrainConfig) -> Iterator[list[float]]:
    """Trains for an epoch and yields one row per measurement."""
    data = WORKLOADS[config.dataset].load(config)
    tasks, train = data.tasks, data.train
    model, optimizer = bias.fresh(config, data)
    shared = list(model.encoder.parameters())
    order = torch.randperm(len(train), generator=seeded_generator(config.seed, "batch_order", 0))
    batches = order.split(config.batch_size)
    last = len(batches)
    stops = {round(last ** (i / (NUM_MEASUREMENTS - 1))) for i in range(NUM_MEASUREMENTS)}
    num_params = sum(parameter.numel() for parameter in shared)
    sq_grad_sum = torch.zeros(len(tasks), num_params)
    grad_mean = torch.zeros_like(sq_grad_sum)
    is_noisy = torch.tensor([task.is_noisy for task in tasks])
    for step, indices in enumerate(
        track(batches, description=f"{config.dataset}, seed {config.seed}"), start=1
    ):
        batch = train.batch(indices)
        losses = task_losses(model(batch.inputs), batch.targets, tasks)
        grads = torch.stack([bias.flat_grad(loss, shared) for loss in losses])
        sq_grad_sum.addcmul_(grads, grads)
        grad_mean.lerp_(grads, 1 - bias.MOMENTUM)
        if step in stops:
            mean = grad_mean / (1 - bias.MOMENTUM**step)
            momentum = quadratic(mean, mean, sq_grad_sum)
            # Of pure variance the mean keeps this part, and S has the sum of `step` squares.
            reached = (sq_grad_sum > 0).sum(1)
            corrected = momentum - variance_left(step) * reached / step
            _, full_grads = bias.full_batch(model, train, tasks, shared)
            values = {
                "full": quadratic(full_grads, full_grads, sq_grad_sum),
                "momentum": momentum,
                "corrected": corrected,
                **_mini_batches(model, train, tasks, shared, sq_grad_sum, config, step),
            }
            yield [
                config.seed,
                step,
                len(tasks),
                int(is_noisy.sum()),
                *(noisy_share(values[name], is_noisy) for name in ESTIMATES),
            ]
        optimizer.zero_grad()
        torch.stack([loss for loss in losses if loss is not None]).mean().backward()
        optimizer.step()


def variance_left(step: int) -> float:
    """Returns the part of a variance that the bias-corrected running mean keeps after ``step`` gradients."""
    b = bias.MOMENTUM
    return (1 - b) * (1 + b**step) / ((1 + b) * (1 - b**step))


def quadratic(left: Tensor, right: Tensor, sq_grad_sum: Tensor) -> Tensor:
    """Returns left^T H^-1 right [T] with H = diag(S)."""
    return (left * right / (sq_grad_sum + bias.EPS)).sum(1)


def noisy_share(risks: Tensor, is_noisy: Tensor) -> float:
    """Returns the noisy tasks' share of the risks; one below zero counts as none."""
    risks = risks.clamp(min=0)
    total = float(risks.sum())
    return float(risks[is_noisy].sum()) / total if total > 0 else float(is_noisy.float().mean())


def _mini_batches(
    model: EncoderHeads,
    train: Split,
    tasks: tuple[Task, ...],
    shared: list[Tensor],
    sq_grad_sum: Tensor,
    config: TrainConfig,
    step: int,
) -> dict[str, Tensor]:
    order = torch.randperm(len(train), generator=seeded_generator(config.seed, "bias", step))
    sums = {name: torch.zeros(len(tasks)) for name in ("batch", "halves")}
    for indices in order.split(config.batch_size)[: bias.NUM_BATCHES]:
        halves = []
        for half in indices.tensor_split(2):
            batch = train.batch(half)
            losses = task_losses(model(batch.inputs), batch.targets, tasks)
            halves.append(torch.stack([bias.flat_grad(loss, shared) for loss in losses]))
        mean = (halves[0] + halves[1]) / 2
        sums["batch"] += quadratic(mean, mean, sq_grad_sum)
        sums["halves"] += quadratic(halves[0], halves[1], sq_grad_sum)
    return sums


if __name__ == "__main__":
    main()
