"""One encoder for all heads, whether the tasks share their inputs or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from excessmtl_ext.models import EncoderHeads


def test_a_list_of_inputs_gives_each_head_its_own() -> None:
    model = EncoderHeads(nn.Linear(4, 3), [nn.Linear(3, 2), nn.Linear(3, 5)])
    first, second = torch.randn(6, 4), torch.randn(1, 4)
    outputs = model([first, second])
    assert torch.equal(outputs[0], model(first)[0])
    assert torch.equal(outputs[1], model(second)[1])


def test_graphs_of_tasks_with_their_own_inputs_are_independent() -> None:
    model = EncoderHeads(nn.Linear(4, 3), [nn.Linear(3, 2), nn.Linear(3, 2)])
    inputs = [torch.randn(5, 4), torch.randn(5, 4)]
    losses = [output.square().sum() for output in model(inputs)]
    # Neither backward pass is told to keep a graph, and none is missing.
    for loss, task_inputs, head in zip(losses, inputs, model.heads, strict=True):
        grads = torch.autograd.grad(loss, list(model.encoder.parameters()))
        alone = head(model.encoder(task_inputs)).square().sum()
        expected = torch.autograd.grad(alone, list(model.encoder.parameters()))
        torch.testing.assert_close(grads, expected)


def test_a_list_of_another_length_is_an_error() -> None:
    model = EncoderHeads(nn.Identity(), [nn.Identity(), nn.Identity()])
    with pytest.raises(ValueError, match="a list of 2, one per head, but got a list of 3"):
        model([torch.zeros(1)] * 3)
