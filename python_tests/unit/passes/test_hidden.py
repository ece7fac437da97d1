"""A node that runs a backward pass of its own is told from one that does not, with what it can reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from excessmtl_ext.passes.hidden import described, hidden_parameters, hides_parameters

LAYER = nn.Linear(2, 2)


class Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


class Nested(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(LAYER(x), grads[0])
        assert x.grad is not None
        return x.grad


def node_of(function: type[torch.autograd.Function]) -> Any:
    return function.apply(torch.ones(1, 2, requires_grad=True)).grad_fn  # type: ignore[union-attr]


def test_only_a_function_that_runs_a_pass_hides_parameters() -> None:
    assert not hides_parameters(node_of(Plain))
    assert hides_parameters(node_of(Nested))
    assert not hides_parameters((torch.ones(1, requires_grad=True) * 2).grad_fn)  # type: ignore[arg-type]


def test_the_parameters_are_those_of_the_modules_that_the_function_refers_to() -> None:
    found = hidden_parameters(node_of(Nested))
    assert found is not None
    assert {id(each) for each in found} == {id(each) for each in LAYER.parameters()}


def test_a_node_is_named_by_its_function() -> None:
    assert described(node_of(Nested)).startswith("the autograd Function Nested")
