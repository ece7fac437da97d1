"""A whole training step, balancer included, as one CUDA graph: launches cost nothing, whatever T is.

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
balancer = ExcessMTL.from_preset("recommended", encoder.parameters(), num_tasks=3)
optimizer = torch.optim.Adam(
    [*encoder.parameters(), *heads.parameters()], lr=1e-3, capturable=device == "cuda"
)

# A graph reads and writes where it did when it was recorded: batches are copied to a fixed place.
inputs, targets = torch.empty(64, 20, device=device), torch.empty(64, 3, device=device)


def step() -> Tensor:
    """One ordinary training step; the losses [T]."""
    z = encoder(inputs)
    losses = [(head(z)[:, 0] - targets[:, task]).square().mean() for task, head in enumerate(heads)]
    optimizer.zero_grad()
    balancer.backward(losses)
    optimizer.step()
    return torch.stack([loss.detach() for loss in losses])


def load(rows: Tensor) -> None:
    """The next batch, to the fixed place."""
    inputs.copy_(x[rows])
    targets.copy_(y[rows])


# A few ordinary steps on a side stream make all that is made once: state, Adam's moments, cuBLAS's workspace.
batches = torch.randperm(len(x)).split(64)
warm_up, rest = batches[:3], batches[3:]
side = torch.cuda.Stream() if device == "cuda" else None
if side is not None:
    side.wait_stream(torch.cuda.current_stream())  # the network has to be there
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
        graph.replay()  # fills `losses` and everything else where it lies

print("losses:", losses.tolist())
print("weights:", balancer.task_weights.tolist())
print(f"{balancer.num_steps} steps counted, {balancer.num_skipped_steps} skipped")
