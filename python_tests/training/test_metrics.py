"""Metrics are over all samples of a split, whatever the batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from excessmtl_ext.data import Task, TensorSplit
from excessmtl_ext.models import EncoderHeads
from excessmtl_ext.training import metrics

TASKS = (Task("first", 2), Task("second", 2))


class ConstantLogits(nn.Module):
    """Says class 1 with probability 3/4, whatever the features."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, math.log(3)]).expand(len(features), 2)


def test_evaluate_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "EVALUATION_BATCH_SIZE", 3)  # 5 samples: a last batch of 2
    model = EncoderHeads(nn.Flatten(), [ConstantLogits(), ConstantLogits()])
    split = TensorSplit(
        torch.zeros(5, 1, dtype=torch.uint8),
        (torch.tensor([1, 1, 1, 0, 0]), torch.tensor([1, 0, 0, 0, 0])),
        0.0,
        1.0,
    )
    result = metrics.evaluate(model, split, TASKS)
    assert result["first_accuracy"] == pytest.approx(3 / 5)
    assert result["second_accuracy"] == pytest.approx(1 / 5)
    assert result["mean_accuracy"] == pytest.approx(2 / 5)
    assert result["first_loss"] == pytest.approx(-(3 * math.log(3 / 4) + 2 * math.log(1 / 4)) / 5)
    assert result["second_loss"] == pytest.approx(-(math.log(3 / 4) + 4 * math.log(1 / 4)) / 5)


def test_evaluate_leaves_the_mode_of_the_model() -> None:
    model = EncoderHeads(nn.Flatten(), [ConstantLogits(), ConstantLogits()])
    labels = torch.zeros(2, dtype=torch.int64)
    split = TensorSplit(torch.zeros(2, 1, dtype=torch.uint8), (labels, labels), 0.0, 1.0)
    for mode in (True, False):
        metrics.evaluate(model.train(mode), split, TASKS)
        assert model.training is mode
