"""Missing labels: tasks without labels in a batch, and single examples without a label.

docs/tutorials/missing_labels.md walks through it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from excessmtl_ext import ExcessMTL

torch.manual_seed(0)
NUM_TASKS = 3
encoder = nn.Sequential(nn.Linear(10, 32), nn.ReLU())
heads = nn.ModuleList([nn.Linear(32, 1) for _ in range(NUM_TASKS)])
optimizer = torch.optim.Adam([*encoder.parameters(), *heads.parameters()], lr=1e-3)
balancer = ExcessMTL(encoder.parameters(), num_tasks=NUM_TASKS)

x = torch.randn(512, 10)
y = x[:, :NUM_TASKS].sin()
y[torch.rand(512) < 0.5, 1] = float("nan")  # every second label of task 1 is unknown
y[:256, 2] = float("nan")  # task 2 is labelled in the second half of the data only


def masked_loss(prediction: Tensor, target: Tensor) -> Tensor | None:
    """The mean over the labelled examples; None where there is none."""
    is_labelled = target.isfinite()
    if not is_labelled.any():
        return None  # not 0.0: a loss of zero means that the task is solved
    return (prediction[is_labelled] - target[is_labelled]).square().mean()


weights = []
for _ in range(3):
    for rows in torch.arange(512).split(64):
        z = encoder(x[rows])
        losses = [masked_loss(head(z)[:, 0], y[rows, task]) for task, head in enumerate(heads)]
        optimizer.zero_grad()
        balancer.backward(losses)  # a task that is None keeps its risk and its baseline
        if not balancer.found_nonfinite.any():
            optimizer.step()
        weights.append(balancer.task_weights.clone())

for task in range(NUM_TASKS):
    print(
        f"task {task}: took part in {balancer.num_task_steps[task]:2} of {balancer.num_steps} steps, "
        f"weight {balancer.task_weights[task]:.3f}"
    )
