"""A whole training step, balancer included, as one CUDA graph.

Without a GPU the same loop runs step by step. docs/tutorials/cuda_graph.md walks through it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from excessmtl_ext import ExcessMTL

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
x, y = torch.randn(2048, 20), torch.randn(2048, 3)
encoder = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()).to(device)
heads = nn.ModuleList([nn.Linear(64, 1) for _ in range(3)]).to(device)
balancer = ExcessMTL(encoder.parameters(), num_tasks=3)
optimizer = torch.optim.Adam(
    [*encoder.parameters(), *heads.parameters()], lr=1e-3, fused=True, capturable=device == "cuda"
)

# A graph reads and writes the addresses it was recorded with: batches are copied to fixed tensors.
inputs, targets = torch.empty(64, 20, device=device), torch.empty(64, 3, device=device)


def step() -> Tensor:
    """Runs one ordinary training step and returns the losses [T]."""
    z = encoder(inputs)
    losses = [(head(z)[:, 0] - targets[:, task]).square().mean() for task, head in enumerate(heads)]
    optimizer.zero_grad()
    balancer.backward(losses)
    # As GradScaler does it: a fused optimizer skips its step on the device where this is 1.
    optimizer.found_inf = balancer.found_nonfinite.any().float()
    optimizer.step()
    return torch.stack([loss.detach() for loss in losses])


def load(rows: Tensor) -> None:
    """Copies the next batch into the fixed tensors."""
    inputs.copy_(x[rows])
    targets.copy_(y[rows])


# A few ordinary steps on a side stream allocate the state, Adam's moments and cuBLAS's workspace.
batches = torch.randperm(len(x)).split(64)
warm_up, rest = batches[:3], batches[3:]
side = torch.cuda.Stream() if device == "cuda" else None
if side is not None:
    side.wait_stream(torch.cuda.current_stream())  # the network must have been copied
with torch.cuda.stream(side):
    for rows in warm_up:
        load(rows)
        losses = step()

graph = None
if side is not None:
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # recorded, not run
        losses = step()

for rows in rest:
    load(rows)
    if graph is None:
        losses = step()
    else:
        graph.replay()  # updates `losses`, parameters and state in place

print("losses:", losses.tolist())
print("weights:", balancer.task_weights.tolist())
print(f"{balancer.num_steps} steps counted, {balancer.num_skipped_steps} skipped")
