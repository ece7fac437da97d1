"""What lies on either side of the features, and why passes may not be cut there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from excessmtl_ext.passes.cut_graph import CutGraph


def leaf() -> Tensor:
    return torch.ones(2, requires_grad=True)


def test_heads_and_features_of_each_task() -> None:
    shared, own = leaf(), [leaf(), leaf()]
    z, second = shared * 2, shared * 3
    losses = [(z * own[0]).sum(), ((z + second) * own[1]).sum()]
    graph = CutGraph([*losses, None], [z, second], [shared])
    assert graph.reached == [[0], [0, 1], []]
    assert [[id(each) for each in heads] for heads in graph.heads] == [
        [id(own[0])],
        [id(own[1])],
        [],
    ]
    assert [id(each) for each in graph.all_heads] == [id(each) for each in own]
    assert graph.heads_are_apart and not graph.heads_meet
    assert graph.obstacle is None
    assert graph.obstacle_to_batching() == "a task has features of its own"


def test_a_node_of_several_heads_is_told() -> None:
    shared = leaf()
    z = shared * 2
    common = z * leaf()
    graph = CutGraph([common.sum(), (common * 2).sum()], [z], [shared])
    assert graph.heads_meet and not graph.heads_are_apart


def test_a_loss_of_the_features_themselves_has_no_node_of_its_own() -> None:
    shared = torch.tensor(1.0, requires_grad=True)
    z = shared * 2
    graph = CutGraph([z, z * 3], [z], [shared])
    assert not graph.heads_meet and not graph.heads_are_apart


@pytest.mark.parametrize(
    ("make", "obstacle"),
    [
        (lambda z, a: (z.register_hook(lambda grad: grad), z)[1], "a feature has a hook"),
        (lambda z, a: (z.retain_grad(), z)[1], "a feature has a hook or retains its gradient"),
        (lambda z, a: z * a, "parameters that are not shared lie below the features"),
    ],
)
def test_obstacles_are_named(make: object, obstacle: str) -> None:
    shared, other = leaf(), leaf()
    z = make(shared * 2, other)  # type: ignore[operator]
    graph = CutGraph([(z * leaf()).sum(), (z * leaf()).sum()], [z], [shared])
    assert graph.obstacle is not None and obstacle in graph.obstacle


def test_a_loss_past_the_features_or_without_them_is_refused() -> None:
    shared = leaf()
    z = shared * 2
    with pytest.raises(ValueError, match=r"through `features` only"):
        CutGraph([(z * shared).sum()], [z], [shared])
    with pytest.raises(ValueError, match=r"to depend on `features`, but it does not"):
        CutGraph([leaf().sum()], [z], [shared])
