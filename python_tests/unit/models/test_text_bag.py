"""The bag of embeddings: padding and order do not matter, and every task has a head."""

from __future__ import annotations

import math

import torch

from excessmtl_ext.models import text_bag


def test_features_are_the_layers_of_the_scaled_sum_of_embeddings() -> None:
    model = text_bag(50, [1, 3], width=8, hidden=4).eval()
    tokens = torch.tensor([[3, 7, 7, 9]])
    encoder = model.encoder
    total = encoder.embedding.weight[tokens[0]].sum(0) / math.sqrt(4)
    linear = encoder.layers[2]
    expected = torch.relu(linear(torch.relu(total)))
    torch.testing.assert_close(model.features(tokens)[0], expected)
    assert [tuple(output.shape) for output in model(tokens)] == [(1, 1), (1, 3)]


def test_padding_and_order_change_nothing() -> None:
    model = text_bag(50, [1]).eval()
    short, padded, turned = (
        torch.tensor([row], dtype=torch.int32) for row in ([3, 4], [3, 4, 0, 0], [4, 3])
    )
    torch.testing.assert_close(model(short)[0], model(padded)[0])
    torch.testing.assert_close(model(short)[0], model(turned)[0])


def test_an_empty_text_has_finite_features_and_padding_no_gradient() -> None:
    model = text_bag(50, [1])
    outputs = model(torch.tensor([[0, 0], [3, 0]]))[0]
    outputs.sum().backward()
    assert outputs.isfinite().all()
    grad = model.encoder.embedding.weight.grad
    assert not grad[0].any()
    assert grad[3].any()


def test_tasks_may_have_texts_of_their_own() -> None:
    model = text_bag(50, [1, 1]).eval()
    first, second = torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5]])
    outputs = model([first, second])
    torch.testing.assert_close(outputs[0], model(first)[0])
    torch.testing.assert_close(outputs[1], model(second)[1])
