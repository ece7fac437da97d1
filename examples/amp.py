"""Mixed precision: bfloat16 without a loss scale, float16 with a GradScaler and an overflow on the way.

Runs on the GPU if there is one, else on the CPU. docs/tutorials/amp.md walks through it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from excessmtl_ext import ExcessMTL

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
x, y = torch.randn(256, 20, device=device), torch.randn(256, 2, device=device)


def make_model() -> tuple[nn.Module, nn.ModuleList, torch.optim.Optimizer, ExcessMTL]:
    """An encoder, two heads, and what trains them."""
    encoder = nn.Sequential(nn.Linear(20, 64), nn.ReLU()).to(device)
    heads = nn.ModuleList([nn.Linear(64, 1) for _ in range(2)]).to(device)
    optimizer = torch.optim.Adam([*encoder.parameters(), *heads.parameters()], lr=1e-3)
    return encoder, heads, optimizer, ExcessMTL(encoder.parameters(), num_tasks=2)


def task_losses(encoder: nn.Module, heads: nn.ModuleList) -> list[Tensor]:
    """One scalar per task, in float32 as autocast computes losses."""
    z = encoder(x)
    return [(head(z)[:, 0].float() - y[:, task]).square().mean() for task, head in enumerate(heads)]


# bfloat16 has the range of float32: nothing to scale.
encoder, heads, optimizer, balancer = make_model()
for _ in range(20):
    optimizer.zero_grad()
    with torch.autocast(device, dtype=torch.bfloat16):
        losses = task_losses(encoder, heads)
    balancer.backward(losses)  # outside autocast, as every backward pass
    if not balancer.found_nonfinite.any():
        optimizer.step()
print("bfloat16:", balancer.task_weights.tolist())

# float16 does not: gradients are scaled up, and a step that overflows is skipped.
encoder, heads, optimizer, balancer = make_model()
scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=5)
for step in range(20):
    optimizer.zero_grad()
    with torch.autocast(device, dtype=torch.float16):
        losses = task_losses(encoder, heads)
    if step == 10:
        losses[1] = losses[1] * float("inf")  # what an overflow leaves
    scaler.scale(balancer(losses)).backward()  # in place of scaler.scale(sum(losses))
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
    scaler.step(optimizer)  # skips by itself: the shared .grad is NaN
    scaler.update()
print("float16: ", balancer.task_weights.tolist())
print(f"{balancer.num_steps} steps counted, {balancer.num_skipped_steps} skipped")
