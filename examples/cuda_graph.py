"""A whole training step, balancer included, as one CUDA graph.

Without a GPU the same loop runs step by step. docs/tutorials/cuda_graph.md walks through it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from excessmtl_ext import ExcessMTL, GraphedStep

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
x, y = torch.randn(2048, 20), torch.randn(2048, 3)
encoder = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()).to(device)
heads = nn.ModuleList([nn.Linear(64, 1) for _ in range(3)]).to(device)
balancer = ExcessMTL(encoder.parameters(), num_tasks=3)
optimizer = torch.optim.Adam(
    [*encoder.parameters(), *heads.parameters()], lr=1e-3, fused=True, capturable=device == "cuda"
)


def step_function(batch: tuple[Tensor, Tensor]) -> Tensor:
    """Runs one ordinary training step and returns the losses [T]."""
    inputs, targets = batch
    z = encoder(inputs)
    losses = [(head(z)[:, 0] - targets[:, task]).square().mean() for task, head in enumerate(heads)]
    optimizer.zero_grad()
    balancer.backward(losses)
    optimizer.step()
    return torch.stack([loss.detach() for loss in losses])


step = GraphedStep(step_function, (x[:64], y[:64]), balancer, optimizer)

for rows in torch.randperm(len(x)).split(64):
    losses = step((x[rows], y[rows]))

print("losses:", losses.tolist())
print("weights:", balancer.task_weights.tolist())
print(f"{balancer.num_steps} steps counted, {balancer.num_skipped_steps} skipped")
