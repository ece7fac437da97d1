"""Forty tasks with a batch and a graph each, streamed: one task's graph and gradient in memory at a time.

docs/tutorials/many_tasks.md walks through it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from excessmtl_ext import ExcessMTL

torch.manual_seed(0)
NUM_TASKS = 40
encoder = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
heads = nn.ModuleList([nn.Linear(64, 1) for _ in range(NUM_TASKS)])
targets = torch.randn(NUM_TASKS, 16)  # a linear map per task


def task_loss(task: int) -> Tensor:
    """The loss of one task on a batch of its own."""
    x = torch.randn(32, 16)
    return (heads[task](encoder(x))[:, 0] - x @ targets[task]).square().mean()


optimizer = torch.optim.Adam([*encoder.parameters(), *heads.parameters()], lr=1e-3)
balancer = ExcessMTL(encoder.parameters(), num_tasks=NUM_TASKS)

for _ in range(10):
    optimizer.zero_grad()
    for task in range(NUM_TASKS):
        balancer.accumulate(task, task_loss(task))  # frees the task's graph and gradient
    balancer.finish()  # new weights, and the weighted sum in .grad
    if not balancer.found_nonfinite.any():
        optimizer.step()
print(f"heaviest task: {balancer.task_weights.argmax()}")
print(f"effective tasks: {balancer.effective_num_tasks:.1f} of {NUM_TASKS}")

# The same step with all graphs and gradients alive, to compare.
at_once = ExcessMTL(encoder.parameters(), num_tasks=NUM_TASKS)
at_once.load_state_dict(balancer.state_dict())
grads: dict[str, list[Tensor]] = {}
for way, method in (("streamed", balancer), ("at once", at_once)):
    torch.manual_seed(1)  # the same batches for both
    optimizer.zero_grad()
    if way == "streamed":
        for task in range(NUM_TASKS):
            method.accumulate(task, task_loss(task))
        method.finish()
    else:
        method.backward([task_loss(task) for task in range(NUM_TASKS)])
    grads[way] = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
torch.testing.assert_close(grads["streamed"], grads["at once"])
torch.testing.assert_close(balancer.task_weights, at_once.task_weights)
print("Streamed and at once agree.")
