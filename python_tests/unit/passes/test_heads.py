"""Which parameters are whose, and where a task's own graph ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from excessmtl_ext.passes.capture import nodes_of
from excessmtl_ext.passes.heads import HeadGraph, check_open


def leaf() -> Tensor:
    return torch.ones(2, requires_grad=True)


def ids(tensors: list[Tensor]) -> set[int]:
    return {id(tensor) for tensor in tensors}


def test_every_task_gets_the_parameters_that_its_pass_reaches_but_the_shared_ones() -> None:
    shared, tower, own = leaf(), leaf(), [leaf(), leaf(), leaf()]
    z = shared * 2
    towered = z * tower
    losses = [(towered * own[0]).sum(), (towered * own[1]).sum(), (z * own[2]).sum()]
    graph = HeadGraph([*losses, None], [shared])
    assert [ids(leaves) for leaves in graph.leaves] == [
        ids([tower, own[0]]),
        ids([tower, own[1]]),
        ids([own[2]]),
        set(),
    ]
    assert ids(graph.heads) == ids([tower, *own])


def test_borders_lie_where_a_task_hands_its_gradient_to_what_several_visit() -> None:
    shared, own = leaf(), [leaf(), leaf()]
    z = shared * 2
    products = [z * each for each in own]
    graph = HeadGraph([product.sum() for product in products], [shared], finds_borders=True)
    assert graph.borders == [[(product.grad_fn, [0])] for product in products]
    assert HeadGraph([product.sum() for product in products], [shared]).borders is None


def test_there_are_no_borders_below_which_a_head_lies() -> None:
    shared, tower = leaf(), leaf()
    towered = shared * tower  # a parameter of heads where several tasks pass
    graph = HeadGraph([towered.sum(), (towered * 2).sum()], [shared], finds_borders=True)
    assert graph.borders is None


def test_a_loss_that_is_a_parameter_itself_is_its_own_head() -> None:
    shared, own = leaf(), torch.tensor(1.0, requires_grad=True)
    graph = HeadGraph([(shared * 2).sum(), own], [shared], finds_borders=True)
    assert [ids(leaves) for leaves in graph.leaves] == [set(), {id(own)}]
    assert graph.borders is None


def test_a_reentrant_checkpoint_is_seen_through_or_refused_by_name() -> None:
    head, shared = nn.Linear(2, 1), leaf()
    z = shared * 2
    loss = checkpoint(head, z, use_reentrant=True).sum()
    graph = HeadGraph([loss], [shared])
    assert graph.hides
    assert ids(graph.heads) == ids(list(head.parameters()))
    with pytest.raises(ValueError, match=r"torch.utils.checkpoint with use_reentrant=True"):
        check_open(nodes_of([loss]), "this is a test")
