"""LibMTL's Trainer for a small regression, on whatever device the machine has."""

from __future__ import annotations

from typing import Any

import LibMTL
import torch
from LibMTL.loss import AbsLoss
from LibMTL.metrics import AbsMetric
from torch import nn


class SquaredError(AbsLoss):
    def compute_loss(self, pred, gt):
        return (pred - gt).square().mean()


class Count(AbsMetric):
    """The Trainer wants a metric; the tests look at weights and parameters."""

    def update_fun(self, pred, gt):
        self.record.append(pred.shape[0])

    def score_fun(self):
        return [float(sum(self.record))]


class Trainer(LibMTL.Trainer):
    """LibMTL's, where there may be no GPU: it asks for cuda:0 whatever the machine has."""

    device = property(
        lambda self: torch.device("cuda:0" if torch.cuda.is_available() else "cpu"),
        lambda self, value: None,
    )


class Encoder(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())


def settings(tasks: list[str]) -> dict[str, Any]:
    """What a Trainer takes besides its weighting; inputs have 6 columns, targets one."""
    description = {
        task: {
            "metrics": ["count"],
            "metrics_fn": Count(),
            "loss_fn": SquaredError(),
            "weight": [1],
        }
        for task in tasks
    }
    return {
        "task_dict": description,
        "architecture": "HPS",
        "encoder_class": Encoder,
        "decoders": nn.ModuleDict({task: nn.Linear(8, 1) for task in tasks}),
        "rep_grad": False,
        "multi_input": False,
        "optim_param": {"optim": "sgd", "lr": 0.05},
        "scheduler_param": None,
        "arch_args": {},
    }
