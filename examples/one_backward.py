"""Balancing inside the model: the loop calls ``loss.backward()`` and knows of no balancer.

Four tasks share an encoder; most labels of the last one are wrong, and a batch in three has none of the first. Seconds
on one CPU core; docs/tutorials/one_backward.md walks through it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from excessmtl_ext import ExcessMTL, TaskSplit

NUM_TASKS = 4
NUM_STEPS = 150


class Network(nn.Module):
    """A shared encoder and a head per task; returns one loss, as trainers expect it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.split = TaskSplit(ExcessMTL(num_tasks=NUM_TASKS))
        self.heads = nn.ModuleList([nn.Linear(32, 1) for _ in range(NUM_TASKS)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of the losses of the tasks that have labels."""
        copies = self.split(self.encoder(x))  # one copy per task
        losses = [
            (head(z)[:, 0] - y[:, task]).square().mean()
            for task, (head, z) in enumerate(zip(self.heads, copies, strict=True))
            if not y[:, task].isnan().any()
        ]
        return torch.stack(losses).sum()


def make_batch(number: int) -> tuple[Tensor, Tensor]:
    """Inputs [64, 20] and targets [64, 4]; NaN where a task has no labels."""
    x = torch.randn(64, 20)
    y = torch.stack([x[:, task : task + 4].sum(1).tanh() for task in range(NUM_TASKS)], dim=1)
    wrong = torch.rand(64) < 0.8
    y[wrong, -1] = 3 * torch.randn(int(wrong.sum()))
    if number % 3 == 0:
        y[:, 0] = float("nan")
    return x, y


torch.manual_seed(0)
model = Network()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

for number in range(NUM_STEPS):
    x, y = make_batch(number)
    loss = model(x, y)
    optimizer.zero_grad()
    loss.backward()  # one pass; weights move where the gradients of the four copies meet
    if torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0).isfinite():
        optimizer.step()

balancer = model.split.balancer
assert isinstance(balancer, ExcessMTL)
print(balancer.report())
print("steps of each task:", balancer.num_task_steps.tolist())

again = Network()
again.load_state_dict(model.state_dict())  # the balancer's state is part of the model's
x, y = make_batch(1)
for each in (model, again):
    each.zero_grad()
    each(x, y).backward()
assert isinstance(again.split.balancer, ExcessMTL)
assert torch.equal(again.split.balancer.task_weights, balancer.task_weights)

with torch.no_grad():  # copies are the features themselves, and no weight moves
    print(f"validation loss {model(*make_batch(1)):.3f}")
