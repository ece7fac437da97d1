"""Arguments are refused with their name, what was expected, what came, and the way out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from excessmtl_ext.arguments import (
    check_choice,
    check_count,
    check_positive,
    checked_parameters,
    shortened,
)


def test_numbers_and_choices() -> None:
    check_choice("kind", "a", ("a", "b"))
    check_positive("rate", 0.5)
    check_count("number", 2, 2)
    with pytest.raises(ValueError, match=r"Expected `kind` to be one of 'a', 'b', but got 'c'\."):
        check_choice("kind", "c", ("a", "b"))
    for value in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"Expected `rate` > 0, but got"):
            check_positive("rate", value)
    with pytest.raises(TypeError, match=r"Expected `rate` to be a number, but got bool\."):
        check_positive("rate", True)
    with pytest.raises(ValueError, match=r"Expected `number` >= 2, but got 1\."):
        check_count("number", 1, 2)
    with pytest.raises(TypeError, match=r"Expected `number` to be an integer, but got float\."):
        check_count("number", 2.0, 2)  # type: ignore[arg-type]


def test_parameters_are_listed_once_and_in_order() -> None:
    layer = nn.Linear(2, 3)
    assert [id(each) for each in checked_parameters(layer.parameters())] == [
        id(layer.weight),
        id(layer.bias),
    ]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda layer: layer, TypeError, "but got a Linear"),
        (lambda layer: [], ValueError, "at least one parameter"),
        (lambda layer: layer.named_parameters(), TypeError, r"Pass \.parameters\(\)"),
        (lambda layer: [layer.weight * 2], ValueError, "to be a leaf"),
        (lambda layer: [torch.zeros(2, dtype=torch.int64)], ValueError, "real floating point"),
        (lambda layer: [layer.weight, layer.weight], ValueError, r"`chosen\[1\]` is number 0"),
        (lambda layer: [layer.weight, layer.bias.to("meta")], ValueError, "on one device"),
    ],
)
def test_parameters_that_cannot_be_shared_are_refused(
    make: object, error: type[Exception], message: str
) -> None:
    layer = nn.Linear(2, 2).requires_grad_("leaf" in message or "device" not in message)
    with pytest.raises(error, match=message):
        checked_parameters(make(layer), "chosen")  # type: ignore[operator]


def test_long_lists_are_shortened() -> None:
    assert shortened([1, 2]) == "[1, 2]"
    assert shortened(range(9)) == "[0, 1, 2, 3, 4, 5, ... (9 in all)]"
