"""Gradients and small models that several tests use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

PARAM_NUMELS = {
    "one": [1],
    "odd": [5, 31, 33],
    "with_empty": [64, 0, 7],
    "empty": [0],
    "many_small": [3] * 40,
    "several_chunks": [40_000, 3, 16_384, 17, 1_000],  # a CPU chunk is 16,384 padded elements
}


def make_task_grads(
    num_tasks: int,
    numels: list[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kind: str = "typical",
) -> list[Tensor]:
    """T * L gradients, task-major; ``kind`` names what is unusual about them."""
    scale = {"typical": 1.0, "huge": 100.0, "tiny": 1e-4}.get(kind, 1.0)
    grads = []
    for task in range(num_tasks):
        for numel in numels:
            grad = torch.randn(numel, dtype=torch.float64) * scale * (1 + task)
            if kind == "zero_task" and task == 0:
                grad = torch.zeros_like(grad)
            if kind == "strided":
                grad = torch.stack([grad, grad], dim=1)[:, 0]
            grads.append(grad.to(dtype=dtype, device=device))
    return grads


@dataclass
class Problem:
    """A small network with one encoder and one head per task, and a batch for it."""

    encoder: nn.Module
    heads: nn.ModuleList
    inputs: Tensor
    targets: Tensor

    def losses(self) -> list[Tensor]:
        features = self.encoder(self.inputs)
        return [
            ((head(features)[:, 0] - self.targets[:, task]) ** 2).mean()
            for task, head in enumerate(self.heads)
        ]

    def parameters(self) -> list[nn.Parameter]:
        return [*self.encoder.parameters(), *self.heads.parameters()]

    def grads(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in self.parameters()]

    def zero_grad(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None


def make_problem(num_tasks: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
    heads = nn.ModuleList([nn.Linear(8, 1) for _ in range(num_tasks)])
    inputs = torch.randn(20, 6, generator=generator, dtype=dtype)
    targets = torch.randn(20, num_tasks, generator=generator, dtype=dtype)
    return Problem(
        encoder.to(dtype), heads.to(dtype), inputs, targets * torch.arange(1, num_tasks + 1)
    )
