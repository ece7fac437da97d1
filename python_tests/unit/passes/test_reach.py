"""Which tasks reach which parameters, and where they part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.checkpoint import checkpoint

from excessmtl_ext.passes.reach import Parting, TaskReach


def weights(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(size)) for size in sizes]


def reached(reach: TaskReach, *parameters: Tensor) -> list[int]:
    return [reach.tasks.get(id(parameter), 0) for parameter in parameters]


def test_bits_say_which_tasks_reach_a_parameter():
    shared, first, second, unused = weights(2, 2, 2, 2)
    z = shared.exp()
    reach = TaskReach([(z * first).sum(), None, (z * second).sum()])
    assert reached(reach, shared, first, second, unused) == [0b101, 0b001, 0b100, 0]
    assert reach.present == 0b101
    assert reach.partings == [Parting((2,), "ExpBackward0", 0b101)]
    assert reach.behind == {}


def test_two_places_are_told_apart():
    (a, b) = weights(2, 3)
    z, y = a.exp(), b.sin()
    reach = TaskReach([z.sum() + y.sum(), z.prod() + y.prod()])
    assert sorted(reach.partings) == [
        Parting((2,), "ExpBackward0", 0b11),
        Parting((3,), "SinBackward0", 0b11),
    ]


def test_graphs_of_their_own_part_at_no_value():
    (a,) = weights(2)
    reach = TaskReach([a.exp().sum(), a.exp().sum()])
    assert reached(reach, a) == [0b11]
    assert reach.partings == []


def test_values_that_no_parameter_leads_to_are_no_parting():
    (a,) = weights(2)
    mask = torch.ones(2, requires_grad=True)
    z = a.exp()
    reach = TaskReach([z.sum(), z.prod()])
    assert mask.grad is None
    assert [each.node for each in reach.partings] == ["ExpBackward0"]


def test_the_layer_of_a_head_that_another_task_reads_lies_behind_the_parting():
    shared, head, other = weights(2, 2, 2)
    z = shared.exp()
    out = z * head
    reach = TaskReach([out.sum(), (out * z * other).sum()])
    assert reached(reach, shared, head, other) == [0b11, 0b11, 0b10]
    assert reach.behind == {id(head): 0b10}


def test_a_layer_after_a_value_that_all_take_is_not_behind():
    shared, neck = weights(2, 2)
    z = shared.exp()
    y = z * neck
    reach = TaskReach([z.sum() + y.sum(), z.prod() + y.prod()])
    assert reach.behind == {}


def test_a_loss_may_be_a_parameter_or_an_edge():
    (a, b) = weights(1, 2)
    stacked = torch.stack([b.exp().sum(), b.sin().sum()])
    node = stacked.grad_fn
    assert node is not None
    (first, nr), _ = node.next_functions
    assert first is not None
    reach = TaskReach([a, GradientEdge(first, nr)])
    assert reached(reach, a, b) == [0b01, 0b10]


def test_one_loss_given_twice_is_two_tasks():
    (a,) = weights(2)
    loss = a.exp().sum()
    reach = TaskReach([loss, loss])
    assert reached(reach, a) == [0b11]


def test_a_checkpoint_that_tells_its_parameters_is_looked_into():
    layer, head = nn.Linear(2, 2), nn.Linear(2, 1)
    x = torch.ones(1, 2, requires_grad=True)
    z = checkpoint(layer, x, use_reentrant=True)
    reach = TaskReach([head(z).sum(), z.sum()])
    assert reached(reach, layer.weight, head.weight) == [0b11, 0b01]


class Secret(torch.autograd.Function):
    """Runs a pass of its own into a parameter that nothing names."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        torch.autograd.backward([grad.detach().requires_grad_().sum()])
        return grad


def test_a_node_that_hides_its_parameters_is_an_error():
    (a,) = weights(2)
    with pytest.raises(ValueError, match="the autograd Function Secret, which runs a backward"):
        TaskReach([Secret.apply(a.exp()).sum(), a.sum()])
