"""The perceptron flattens its input and ends in one head per task."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from excessmtl_ext.models import mlp


def test_outputs_have_one_tensor_per_task() -> None:
    outputs = mlp((1, 12, 12), [10, 1])(torch.zeros(5, 1, 12, 12))
    assert [tuple(output.shape) for output in outputs] == [(5, 10), (5, 1)]


def test_hidden_widths_are_the_shared_layers() -> None:
    model = mlp((21,), [1] * 7, hidden=(128, 64, 32))
    linear = [layer for layer in model.encoder.modules() if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [
        (21, 128),
        (128, 64),
        (64, 32),
    ]


def test_no_shared_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match="Expected at least one width in `hidden`"):
        mlp((4,), [1], hidden=())
