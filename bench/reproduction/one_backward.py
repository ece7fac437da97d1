"""Test accuracy of ``balancer.split`` beside the exact mode and Uniform, on pairs of small digits.

    python bench/reproduction/one_backward.py            # minutes on one CPU core, no download

Two digits share each image; ``--noise`` of the second one's training labels are wrong. A perceptron of two layers
of 128, Adam 1e-3, batch 128, 8 epochs; accuracies on clean test labels, mean and range over three seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from excessmtl_ext import Balancer, ExcessMTL, Uniform
from excessmtl_ext.data.digits import load_digit_pairs
from excessmtl_ext.data.multitask_data import MultiTaskData
from excessmtl_ext.models import mlp

NUM_EPOCHS, BATCH, LR = 8, 128, 1e-3
NUM_CLASSES = 10

Make = Callable[[list[nn.Parameter]], Balancer]

IN_T_PASSES: dict[str, Make] = {
    "Uniform": lambda shared: Uniform(shared, num_tasks=2),
    "exact": lambda shared: ExcessMTL(shared, num_tasks=2),
    'exact, combine="sum"': lambda shared: ExcessMTL(shared, num_tasks=2, combine="sum"),
}
IN_ONE_PASS: dict[str, Make] = {
    "split": lambda shared: ExcessMTL(num_tasks=2),
    'split, combine="sum"': lambda shared: ExcessMTL(num_tasks=2, combine="sum"),
    "split, full adapter": lambda shared: ExcessMTL(num_tasks=2, feature_adapter="full"),
    "split, diagonal adapter": lambda shared: ExcessMTL(num_tasks=2, feature_adapter="diagonal"),
}


def train(name: str, data: MultiTaskData, seed: int) -> list[float]:
    """Trains from scratch; returns the accuracy of each task on the test pairs."""
    torch.manual_seed(seed)
    inputs = data.train.batch(torch.arange(1)).inputs
    assert isinstance(inputs, torch.Tensor)
    model = mlp(inputs.shape[1:], [NUM_CLASSES] * 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    balancer = (IN_T_PASSES | IN_ONE_PASS)[name](list(model.encoder.parameters()))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(NUM_EPOCHS):
        for rows in torch.randperm(len(data.train), generator=generator).split(BATCH):
            batch = data.train.batch(rows)
            z = model.encoder(batch.inputs)
            copies: Sequence[torch.Tensor] = [z, z]
            if isinstance(balancer, ExcessMTL) and name in IN_ONE_PASS:
                copies = balancer.split(z)
            losses = [
                cross_entropy(head(copy), target)  # type: ignore[arg-type]
                for head, copy, target in zip(model.heads, copies, batch.targets, strict=True)
            ]
            optimizer.zero_grad()
            if name in IN_ONE_PASS:
                torch.stack(losses).sum().backward()
            else:
                balancer.backward(losses)
            optimizer.step()
    return test_accuracy(model, data)


@torch.no_grad()
def test_accuracy(model: nn.Module, data: MultiTaskData) -> list[float]:
    """Share of right classes per task."""
    right = torch.zeros(2)
    for batch in data.test.batches(1000):
        for task, output in enumerate(model(batch.inputs)):
            right[task] += (output.argmax(1) == batch.targets[task]).sum()
    return (right / len(data.test)).tolist()


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--noise", nargs="+", type=float, default=[0.8, 0.0])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| noise | method | clean task | noisy task |\n|---|---|---|---|")
    for noise in arguments.noise:
        data = [load_digit_pairs(noise=noise, seed=seed) for seed in range(arguments.seeds)]
        for name in IN_T_PASSES | IN_ONE_PASS:
            runs = torch.tensor([train(name, each, seed) for seed, each in enumerate(data)])
            cells = [
                f"{column.mean():.4f} ({column.min():.4f} to {column.max():.4f})"
                for column in runs.unbind(1)
            ]
            print(f"| {noise:.0%} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
