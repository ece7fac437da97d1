"""SegNet predicts at full resolution from four stages down and four up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from excessmtl_ext.models.segnet import SegNetEncoder, segnet


def test_outputs_have_the_resolution_of_the_images() -> None:
    outputs = segnet([13, 1, 3], width=2)(torch.randn(2, 3, 32, 48))
    assert [tuple(output.shape) for output in outputs] == [
        (2, 13, 32, 48),
        (2, 1, 32, 48),
        (2, 3, 32, 48),
    ]


def test_stages_and_channels_are_those_of_segnet() -> None:
    encoder = SegNetEncoder(64)
    convolutions = [
        [
            (layer.in_channels, layer.out_channels)
            for layer in stage.modules()
            if isinstance(layer, nn.Conv2d)
        ]
        for stage in (*encoder.down, *encoder.up)
    ]
    assert convolutions == [
        [(3, 64), (64, 64)],
        [(64, 128), (128, 128)],
        [(128, 256), (256, 256), (256, 256)],
        [(256, 512), (512, 512), (512, 512)],
        [(64, 64), (64, 64)],
        [(128, 128), (128, 64)],
        [(256, 256), (256, 256), (256, 128)],
        [(512, 512), (512, 512), (512, 256)],
    ]


def test_each_head_has_two_convolutions() -> None:
    model = segnet([13, 1, 3], unit_heads=[2], width=4)
    for head in model.heads:
        assert sum(isinstance(layer, nn.Conv2d) for layer in head.modules()) == 2


def test_unit_heads_give_unit_vectors_and_the_others_do_not() -> None:
    segmentation, normals = segnet([3, 3], unit_heads=[1], width=2)(torch.randn(1, 3, 16, 16))
    torch.testing.assert_close(normals.norm(dim=1), torch.ones(1, 16, 16))
    assert (segmentation.norm(dim=1) - 1).abs().max() > 0.01


def test_maxima_are_put_back_to_where_they_were() -> None:
    # One stage on its own: identity convolutions leave only the pooling and its inverse.
    encoder = SegNetEncoder(3)
    identity = nn.ModuleList([nn.Identity()])
    encoder.down, encoder.up = identity, identity
    images = torch.randn(1, 3, 16, 16)
    features = encoder(images)
    pooled = nn.functional.max_pool2d(images, 2)
    expected = torch.where(
        images == pooled.repeat_interleave(2, -1).repeat_interleave(2, -2), images, 0
    )
    assert torch.equal(features, expected)


def test_every_parameter_has_a_gradient() -> None:
    model = segnet([2, 1], width=2)
    torch.stack(
        [output.square().mean() for output in model(torch.randn(2, 3, 32, 32))]
    ).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_arguments_out_of_range_are_errors() -> None:
    with pytest.raises(
        ValueError, match=r"in multiples of 16, but got \[1, 3, 16, 24\]. Resize them"
    ):
        segnet([1], width=1)(torch.zeros(1, 3, 16, 24))
    with pytest.raises(ValueError, match="Expected `width` of at least 1, but got 0"):
        segnet([1], width=0)
    with pytest.raises(ValueError, match=r"positions below 2, the number of heads, but got \[2\]"):
        segnet([1, 1], unit_heads=[2])
