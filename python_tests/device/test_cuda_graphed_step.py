"""Graphs on a GPU: a graphed step takes the steps of an ordinary loop, and graphed callables need copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from excessmtl_ext import ExcessMTL, GraphedStep, _extension

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.skipif(
        not _extension.has_op_for("cuda"), reason="the ops were built without CUDA kernels"
    ),
]

NUM_TASKS = 3
Batch = tuple[Tensor, list[Tensor | None]]


class Training:
    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.encoder: Any = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 16)).cuda()
        self.heads = nn.ModuleList([nn.Linear(16, 1) for _ in range(NUM_TASKS)]).cuda()
        self.balancer = ExcessMTL(self.encoder.parameters(), num_tasks=NUM_TASKS, **options)
        self.parameters = [*self.encoder.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-2, fused=True, capturable=True)

    def step(self, batch: Batch) -> Tensor:
        inputs, targets = batch
        features = self.encoder(inputs.cuda())
        losses = [
            None if target is None else (head(features)[:, 0] - target.cuda()).square().mean()
            for head, target in zip(self.heads, targets, strict=True)
        ]
        self.optimizer.zero_grad()
        self.balancer.backward(losses)
        self.optimizer.step()
        return torch.stack([loss.detach() for loss in losses if loss is not None])


def batches(number: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(64, 20, generator=generator),
            [
                None if index % 2 and task == 1 else torch.randn(64, generator=generator)
                for task in range(NUM_TASKS)
            ],
        )
        for index in range(number)
    ]


def test_a_graphed_step_takes_the_steps_of_an_ordinary_loop() -> None:
    plain, graphed = Training(), Training()
    data = batches(16)
    step = GraphedStep(graphed.step, data[0], graphed.balancer, graphed.optimizer)
    for batch in data:
        torch.testing.assert_close(step(batch), plain.step(batch))
    assert step.num_graphs == 2
    torch.testing.assert_close(graphed.parameters, plain.parameters)
    torch.testing.assert_close(graphed.balancer.task_weights, plain.balancer.task_weights)
    assert graphed.balancer.num_steps.item() == plain.balancer.num_steps.item() == 16


def test_graphed_callables_are_an_error_and_right_with_copies() -> None:
    def risks(*, is_graphed: bool, copy_gradients: bool) -> Tensor:
        training = Training(copy_gradients=copy_gradients)
        if is_graphed:
            training.encoder = torch.cuda.make_graphed_callables(
                training.encoder, (torch.randn(64, 20, device="cuda"),)
            )
        for inputs, targets in batches(4):
            training.step((inputs, [t if t is not None else torch.zeros(64) for t in targets]))
        return training.balancer.excess_risk

    with pytest.raises(ValueError, match="copy_gradients"):
        risks(is_graphed=True, copy_gradients=False)
    torch.testing.assert_close(
        risks(is_graphed=True, copy_gradients=True), risks(is_graphed=False, copy_gradients=False)
    )
