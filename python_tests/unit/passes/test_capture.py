"""Passes that return gradients leave every ``.grad`` alone; a deposit adds to it and runs the hooks there."""

from __future__ import annotations

import torch
from torch import Tensor

from excessmtl_ext.passes.capture import (
    capture_batched,
    capture_grads,
    deposit_grads,
    leaves_of,
    nodes_of,
)


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, requires_grad=True)


def test_captured_gradients_are_returned_and_not_accumulated() -> None:
    a, b, unused = leaf(2.0), leaf(3.0), leaf(1.0)
    grads = capture_grads((a * b).sum(), torch.tensor(10.0), [a, b, unused], retain_graph=False)
    assert [None if grad is None else grad.tolist() for grad in grads] == [[30.0], [20.0], None]
    assert a.grad is None and b.grad is None


def test_a_sparse_gradient_becomes_dense_unless_it_is_to_be_kept() -> None:
    table = torch.zeros(4, 2, requires_grad=True)

    def captured(*, keep_sparse: bool) -> Tensor:
        looked_up = torch.nn.functional.embedding(torch.tensor([1]), table, sparse=True)
        (grad,) = capture_grads(
            looked_up.sum(), torch.tensor(1.0), [table], retain_graph=False, keep_sparse=keep_sparse
        )
        assert grad is not None
        return grad

    assert captured(keep_sparse=True).is_sparse
    assert captured(keep_sparse=False).tolist() == [[0, 0], [1, 1], [0, 0], [0, 0]]


def test_a_batched_pass_gives_a_row_per_start() -> None:
    a = leaf(1.0, 2.0)
    unused = leaf(0.0)
    root = a * a
    starts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    rows = capture_batched([root], [starts], [a, unused], retain_graph=False)
    assert [row[0].tolist() for row in rows if row[0] is not None] == [[2, 0], [0, 4], [2, 4]]
    assert [row[1] for row in rows] == [None] * 3


def test_a_deposit_adds_what_is_given_runs_hooks_once_and_passes_over_none() -> None:
    a, b = leaf(0.0), leaf(0.0)
    a.grad = torch.tensor([1.0])
    seen: list[str] = []
    for name, parameter in (("a", a), ("b", b)):
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    deposit_grads([a, b], [torch.tensor([4.0]), None], at_start=lambda: seen.append("start"))
    assert a.grad.tolist() == [5.0]
    assert b.grad is None
    assert seen[:2] == ["start", "a"]


def test_a_walk_visits_every_node_once_and_finds_every_parameter() -> None:
    a, b, apart = leaf(1.0), leaf(1.0), leaf(1.0)
    middle = a * b
    roots = [(middle * 2).sum(), (middle * middle).sum(), apart]
    nodes = list(nodes_of(roots))
    assert len(nodes) == len(set(nodes))
    assert set(leaves_of(*roots)) == {id(a), id(b), id(apart)}
