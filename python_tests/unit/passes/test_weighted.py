"""Given weights reach the shared parameters; heads get their own gradient, whatever the graphs look like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from excessmtl_ext.passes.weighted import apply_weights
from excessmtl_ext.step import Step

WEIGHTS = torch.tensor([0.25, 0.75], dtype=torch.float64)


def make_step(kind: str) -> tuple[Step, Tensor, list[Tensor]]:
    """Losses 2 s h_0 and 3 s h_1 at s = 1, h = 1: shared gradients 2 and 3, head gradients 2 and 3."""
    shared = torch.ones((), requires_grad=True)
    heads = [torch.ones((), requires_grad=True) for _ in range(2)]
    z = shared * 1.0
    if kind == "common":  # a parameter that is not shared lies where both tasks pass
        heads.append(torch.ones((), requires_grad=True))
        z = z * heads[2]
    roots: list[Tensor | None] = [z * heads[0] * 2.0, z * heads[1] * 3.0]
    starts: list[Tensor | None] = [torch.ones(()), torch.ones(())]
    features = [z] if kind == "features" else None
    step = Step(roots=[*roots], tasks=[0, 1], shared=[shared], starts=starts, features=features)
    return step, shared, heads


@pytest.mark.parametrize("kind", ["plain", "features", "common"])
def test_shared_gradients_are_weighted_and_those_of_heads_are_not(kind: str) -> None:
    step, shared, heads = make_step(kind)
    apply_weights(step, WEIGHTS, head_weights=None)
    assert shared.grad == 0.25 * 2.0 + 0.75 * 3.0
    assert [head.grad for head in heads[:2]] == [2.0, 3.0]
    if kind == "common":
        assert heads[2].grad == 5.0  # the plain sum


@pytest.mark.parametrize("kind", ["plain", "features", "common"])
def test_head_weights_that_are_the_weights_take_one_pass(kind: str) -> None:
    step, shared, heads = make_step(kind)
    apply_weights(step, WEIGHTS, head_weights=WEIGHTS)
    assert shared.grad == 2.75
    assert [head.grad for head in heads[:2]] == [0.5, 2.25]


def test_other_head_weights_and_uniform_ones() -> None:
    step, shared, heads = make_step("plain")
    apply_weights(step, WEIGHTS, head_weights=torch.tensor([1.0, 10.0], dtype=torch.float64))
    assert shared.grad == 2.75
    assert [head.grad for head in heads] == [2.0, 30.0]
    step, shared, heads = make_step("plain")
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    apply_weights(step, half, head_weights=None, is_uniform=True)
    assert shared.grad == 2.5
    assert [head.grad for head in heads] == [2.0, 3.0]


def test_no_hook_is_left_behind_and_graphs_stay_where_asked() -> None:
    step, shared, _ = make_step("plain")
    step.retain_graph = True
    apply_weights(step, WEIGHTS, head_weights=None)
    shared.grad = None
    root = step.roots[0]
    assert isinstance(root, Tensor)
    root.backward()
    assert shared.grad == 2.0
