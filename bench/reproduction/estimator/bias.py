"""Compares what the estimates say with what they estimate, along one training run with uniform weights.

    python bench/reproduction/estimator/bias.py sarcos --noise 0.8 --data-root DATA --output RESULTS

At some thirty steps, evenly spaced in log time, the run is held still and measured per task:

- the true excess risk: training loss of the present parameters minus the lowest training loss that training the task
  alone reached in three times as many epochs, both over the whole training set with the labels the run sees;
- g^T H^-1 g with the full-batch gradient, H from the squares the run has accumulated: no gradient variance in g;
- the same with a mini-batch gradient, as published: the mean over sixteen batches at these very parameters;
- the same with the bias-corrected running mean of the gradients, momentum 0.98;
- the share of variance in the expected squared mini-batch gradient, 1 - |G|^2 / E|g|^2.

The weights stay uniform, so that all estimates see the same parameters.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import grid
import torch
from rich.progress import track
from torch import Tensor

from excessmtl_ext.data import MultiTaskData, Split, Task
from excessmtl_ext.data.seeding import seeded_generator
from excessmtl_ext.models import EncoderHeads
from excessmtl_ext.training.run.config import TrainConfig
from excessmtl_ext.training.run.metrics import task_losses
from excessmtl_ext.training.run.workloads import WORKLOADS

MOMENTUM = 0.98
EPS = 1e-7
NUM_MEASUREMENTS = 30
ALONE_EPOCHS = 3  # times the run's
NUM_BATCHES = 16  # that the mini-batch estimate is averaged over
FULL_BATCH = 4_000  # samples at once when the whole set is gone through

COLUMNS = [
    "dataset",
    "noise",
    "seed",
    "step",
    "epoch",
    "task",
    "is_noisy",
    "train_loss",
    "lowest_loss",
    "true_excess_risk",
    *(
        f"{numerator}_{fisher}"
        for numerator in ("batch", "momentum", "full")
        for fisher in ("sqrt", "linear")
    ),
    "variance_share",
]


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset", choices=sorted(grid.SCREEN))
    parser.add_argument("--noise", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--data-root")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cell = grid.Cell("screen", arguments.dataset, arguments.noise, arguments.seed, 256, "uniform")
    config = cell.config(arguments.data_root)
    rows = measure(config, arguments.epochs or config.epochs)
    arguments.output.mkdir(parents=True, exist_ok=True)
    table = arguments.output / f"bias_{arguments.dataset}_noise{arguments.noise:g}.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in row])
    print(table)


def measure(config: TrainConfig, epochs: int) -> list[list[object]]:
    """Trains with uniform weights and returns one row per measurement and task."""
    workload = WORKLOADS[config.dataset]
    data = workload.load(config)
    tasks, train = data.tasks, data.train
    lowest = [
        lowest_loss_alone(config, data, index, epochs * ALONE_EPOCHS) for index in range(len(tasks))
    ]
    model, optimizer = fresh(config, data)
    shared = list(model.encoder.parameters())
    steps_per_epoch = -(-len(train) // config.batch_size)
    num_steps = epochs * steps_per_epoch
    stops = {round(num_steps ** (i / (NUM_MEASUREMENTS - 1))) for i in range(NUM_MEASUREMENTS)}
    num_params = sum(parameter.numel() for parameter in shared)
    sq_grad_sum = torch.zeros(len(tasks), num_params)
    grad_mean = torch.zeros_like(sq_grad_sum)
    rows: list[list[object]] = []
    step = 0
    for epoch in track(range(epochs), description=f"{config.dataset}, noise {config.noise:g}"):
        order = torch.randperm(
            len(train), generator=seeded_generator(config.seed, "batch_order", epoch)
        )
        for indices in order.split(config.batch_size):
            batch = train.batch(indices)
            losses = task_losses(model(batch.inputs), batch.targets, tasks)
            grads = torch.stack([flat_grad(loss, shared) for loss in losses])
            step += 1
            sq_grad_sum.addcmul_(grads, grads)
            grad_mean.mul_(MOMENTUM).add_(grads, alpha=1 - MOMENTUM)
            if step in stops:
                full_losses, full_grads = full_batch(model, train, tasks, shared)
                full = _quadratic("full", full_grads, sq_grad_sum)
                estimates = {
                    **_mini_batches(model, train, tasks, shared, sq_grad_sum, config, step),
                    **_quadratic("momentum", grad_mean / (1 - MOMENTUM**step), sq_grad_sum),
                    **full,
                }
                share = 1 - full_grads.square().sum(1) / estimates["sq_norm"]
                for index, task in enumerate(tasks):
                    rows.append(
                        [
                            config.dataset,
                            config.noise,
                            config.seed,
                            step,
                            step / steps_per_epoch,
                            task.name,
                            int(task.is_noisy),
                            full_losses[index],
                            lowest[index],
                            full_losses[index] - lowest[index],
                            *(
                                float(estimates[name][index])
                                for name in COLUMNS[COLUMNS.index("batch_sqrt") : -1]
                            ),
                            float(share[index]),
                        ]
                    )
            optimizer.zero_grad()
            torch.stack([loss for loss in losses if loss is not None]).mean().backward()
            optimizer.step()
    return rows


def lowest_loss_alone(config: TrainConfig, data: MultiTaskData, index: int, epochs: int) -> float:
    """Returns the lowest training loss of a task trained alone, its learning rate falling to 0 along a cosine."""
    tasks, train = data.tasks, data.train
    model, optimizer = fresh(config, data)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    lowest = float("inf")
    for epoch in track(range(epochs), description=f"{tasks[index].name} alone"):
        order = torch.randperm(
            len(train), generator=seeded_generator(config.seed, "batch_order", epoch)
        )
        for indices in order.split(config.batch_size):
            batch = train.batch(indices)
            loss = task_losses(model(batch.inputs), batch.targets, tasks)[index]
            assert loss is not None
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        lowest = min(lowest, _full_losses(model, train, tasks)[index])
    return lowest


def fresh(config: TrainConfig, data: MultiTaskData) -> tuple[EncoderHeads, torch.optim.Optimizer]:
    torch.manual_seed(config.seed)
    model = WORKLOADS[config.dataset].build_model(data, config)
    return model, torch.optim.Adam(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )


def flat_grad(loss: Tensor | None, shared: list[Tensor]) -> Tensor:
    assert loss is not None
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)])


def _quadratic(name: str, grads: Tensor, sq_grad_sum: Tensor) -> dict[str, Tensor]:
    """Returns g^T H^-1 g for H with and without the root (Eqs. 6-7)."""
    return {
        f"{name}_sqrt": (grads.square() / (sq_grad_sum + EPS).sqrt()).sum(1),
        f"{name}_linear": (grads.square() / (sq_grad_sum + EPS)).sum(1),
    }


def _mini_batches(
    model: EncoderHeads,
    train: Split,
    tasks: tuple[Task, ...],
    shared: list[Tensor],
    sq_grad_sum: Tensor,
    config: TrainConfig,
    step: int,
) -> dict[str, Tensor]:
    """Returns the means over mini-batches of the published estimates and of the squared gradient norm, [T] each."""
    order = torch.randperm(len(train), generator=seeded_generator(config.seed, "bias", step))
    sums: dict[str, Tensor] = {}
    batches = order.split(config.batch_size)[:NUM_BATCHES]
    for indices in batches:
        batch = train.batch(indices)
        losses = task_losses(model(batch.inputs), batch.targets, tasks)
        grads = torch.stack([flat_grad(loss, shared) for loss in losses])
        values = {**_quadratic("batch", grads, sq_grad_sum), "sq_norm": grads.square().sum(1)}
        for name, value in values.items():
            sums[name] = sums.get(name, torch.zeros(len(tasks))) + value / len(batches)
    return sums


def full_batch(
    model: EncoderHeads, train: Split, tasks: tuple[Task, ...], shared: list[Tensor]
) -> tuple[list[float], Tensor]:
    losses = torch.zeros(len(tasks))
    grads: Tensor | float = 0.0
    for batch_indices in torch.arange(len(train)).split(FULL_BATCH):
        share = len(batch_indices) / len(train)
        batch = train.batch(batch_indices)
        values = task_losses(model(batch.inputs), batch.targets, tasks)
        grads = grads + share * torch.stack([flat_grad(value, shared) for value in values])
        losses += share * torch.stack([v.detach() for v in values if v is not None])
    return losses.tolist(), torch.as_tensor(grads)


@torch.no_grad()
def _full_losses(model: EncoderHeads, train: Split, tasks: tuple[Task, ...]) -> list[float]:
    losses = torch.zeros(len(tasks))
    for batch_indices in torch.arange(len(train)).split(FULL_BATCH):
        batch = train.batch(batch_indices)
        values = task_losses(model(batch.inputs), batch.targets, tasks)
        losses += (
            len(batch_indices) / len(train) * torch.stack([v for v in values if v is not None])
        )
    return losses.tolist()


if __name__ == "__main__":
    main()
