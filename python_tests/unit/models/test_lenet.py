"""The MultiMNIST network has the paper's layers and one output per task."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from excessmtl_ext.models import lenet


def test_outputs_have_one_tensor_per_task() -> None:
    outputs = lenet([10, 3])(torch.zeros(4, 1, 28, 28))
    assert [tuple(output.shape) for output in outputs] == [(4, 10), (4, 3)]


def test_layers_are_those_of_the_paper() -> None:
    model = lenet([10, 10])
    convolutions = [layer for layer in model.encoder.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.kernel_size for layer in convolutions] == [(5, 5), (5, 5)]
    linear = [layer for layer in model.encoder.modules() if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(320, 80)]
    assert [type(head) for head in model.heads] == [nn.Linear, nn.Linear]
    # 10 * (25 + 1) + 20 * (250 + 1) + 80 * (320 + 1)
    assert sum(parameter.numel() for parameter in model.encoder.parameters()) == 30_960


def test_encoder_and_heads_hold_every_parameter_once() -> None:
    model = lenet([10, 10])
    parts = [*model.encoder.parameters(), *model.heads.parameters()]
    assert {id(part) for part in parts} == {id(parameter) for parameter in model.parameters()}


def test_smallest_image() -> None:
    assert lenet([2], image_size=16)(torch.zeros(1, 1, 16, 16))[0].shape == (1, 2)
    with pytest.raises(ValueError, match="Expected `image_size` of at least 16, but got 15"):
        lenet([2], image_size=15)
