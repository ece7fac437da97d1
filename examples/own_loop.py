"""A training loop: three regression tasks on one encoder, the labels of one task mostly wrong.

Trains with uniform weights and with ExcessMTL, prints test errors, weights and the balancer's report, then stops and
resumes. Seconds on one CPU core; docs/tutorials/own_loop.md walks through it.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from excessmtl_ext import Balancer, ExcessMTL, Uniform

TASKS = ["speed", "angle", "torque"]
NOISY = 2  # "torque": 80 % of its training labels are wrong
NUM_EPOCHS = 8


def make_data(num: int) -> tuple[Tensor, Tensor]:
    """Inputs [num, 20] and targets [num, 3], all three from the same four hidden features."""
    teacher = torch.Generator().manual_seed(1)
    hidden = torch.randn(20, 4, generator=teacher)
    readout = torch.randn(4, len(TASKS), generator=teacher)
    x = torch.randn(num, 20)
    return x, torch.tanh(x @ hidden / 20**0.5) @ readout


class Network(nn.Module):
    """A shared encoder and a head per task."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(32, 1) for _ in TASKS])

    def losses(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """One scalar per task."""
        z = self.encoder(x)
        return [
            (head(z)[:, 0] - y[:, task]).square().mean() for task, head in enumerate(self.heads)
        ]


def train_epoch(
    model: Network, balancer: Balancer, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> None:
    """One epoch; the two marked places are what balancing adds."""
    for rows in torch.randperm(len(x)).split(64):
        losses = model.losses(x[rows], y[rows])
        optimizer.zero_grad()
        balancer.backward(losses)  # 1. in place of sum(losses).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if nn.utils.get_total_norm(grads).isfinite():  # 2. skip a step with a NaN gradient
            optimizer.step()


torch.manual_seed(0)
x, y = make_data(2048)
x_test, y_test = make_data(1024)
wrong = torch.rand(len(y)) < 0.8
y[wrong, NOISY] = y[torch.randperm(len(y))[: int(wrong.sum())], NOISY] * 3.0
start = Network()

test_errors: dict[str, list[float]] = {}
for make_balancer in (Uniform, ExcessMTL):
    model = copy.deepcopy(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    balancer = make_balancer(model.encoder.parameters(), num_tasks=len(TASKS))
    with balancer.record_history(every=5, gradients=True, task_names=TASKS):
        for _ in range(NUM_EPOCHS):
            train_epoch(model, balancer, optimizer, x, y)
    with torch.no_grad():
        errors = [loss.item() for loss in model.losses(x_test, y_test)]
    method = type(balancer).__name__
    test_errors[method] = errors
    for name, error, weight in zip(TASKS, errors, balancer.task_weights.tolist(), strict=True):
        print(f"{method:9} {name:6} test error {error:.4f}  weight {weight:.2f}")
print(balancer.report())

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "checkpoint.pt"
    stateful = {"model": model, "optimizer": optimizer, "balancer": balancer}
    torch.save({name: part.state_dict() for name, part in stateful.items()}, path)

    resumed_model = Network()
    resumed = {
        "model": resumed_model,
        "optimizer": torch.optim.Adam(resumed_model.parameters(), lr=3e-3),
        "balancer": ExcessMTL.from_preset(
            "recommended", resumed_model.encoder.parameters(), num_tasks=len(TASKS)
        ),
    }
    for name, state in torch.load(path).items():
        resumed[name].load_state_dict(state)

for parts in (stateful, resumed):
    torch.manual_seed(1)  # the same batches for both
    train_epoch(parts["model"], parts["balancer"], parts["optimizer"], x, y)
assert torch.equal(stateful["balancer"].task_weights, resumed["balancer"].task_weights)
print("The resumed run reached the same weights, bit for bit.")
