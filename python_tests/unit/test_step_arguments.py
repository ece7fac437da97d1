"""Arguments of a step are read into roots, starts and values, or refused by name before anything has changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from excessmtl_ext import Uniform
from excessmtl_ext.step_arguments import (
    as_scale,
    check_accumulation_hooks,
    check_grads,
    checked_features,
    loss_roots,
    loss_values,
    read_step,
    start_of,
    starts_of,
)


def leaf(value: float = 1.0) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def test_the_passes_of_stacked_losses_start_at_what_was_stacked() -> None:
    a, b = leaf(2.0) * 2, leaf(3.0) * 3
    roots = loss_roots(torch.stack([a, b]), 2)
    assert [isinstance(root, GradientEdge) for root in roots] == [True, True]
    assert [root.node for root in roots if isinstance(root, GradientEdge)] == [a.grad_fn, b.grad_fn]
    assert loss_roots([a, None], 2) == [a, None]


def test_losses_without_a_graph_and_in_the_wrong_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected `losses\[1\]` to require grad"):
        loss_roots([leaf() * 1, torch.tensor(1.0)], 2)
    with pytest.raises(ValueError, match=r"to hold 3 losses, one per task, but got 2"):
        loss_roots([leaf() * 1, leaf() * 1], 3)
    with pytest.raises(ValueError, match=r"Expected `losses\[0\]` to be a scalar"):
        loss_roots([torch.ones(2, requires_grad=True) * 1], 1)
    with pytest.raises(TypeError, match=r"to be a tensor \[T\], or a list or dict"):
        loss_roots({leaf()}, 1)  # type: ignore[arg-type]


def test_a_pass_starts_with_ones_or_the_scale_in_the_type_of_the_loss() -> None:
    loss, narrow = leaf() * 2, leaf().bfloat16() * 2
    assert start_of(loss, None) == 1.0
    start = start_of(narrow, torch.tensor(8.0))
    assert start == 8.0 and start.dtype == torch.bfloat16
    starts = starts_of([loss, None, narrow, leaf() * 3], torch.tensor(4.0))
    assert [None if each is None else each.item() for each in starts] == [4.0, None, 4.0, 4.0]
    assert starts[0] is starts[3]


def test_values_of_losses_are_detached_and_nan_where_a_task_is_absent() -> None:
    values = loss_values([leaf(2.0) * 2, None], torch.zeros(1, dtype=torch.float64))
    assert values[0] == 4.0 and values[1].isnan()
    assert values.dtype == torch.float64 and not values.requires_grad


def test_a_scale_is_one_number_and_keeps_float64_only() -> None:
    assert as_scale(2, torch.device("cpu")).dtype == torch.float32
    assert as_scale(torch.tensor([2.0], dtype=torch.float64), torch.device("cpu")).dtype == (
        torch.float64
    )
    assert as_scale(torch.tensor(2.0).half(), torch.device("cpu")).dtype == torch.float32
    with pytest.raises(ValueError, match=r"Expected `grad_scale` to be one number"):
        as_scale(torch.ones(2), torch.device("cpu"))


def test_grads_that_no_sum_can_be_added_to_are_refused() -> None:
    parameter = torch.zeros(2, requires_grad=True)
    check_grads([parameter])
    parameter.grad = torch.ones(1).expand(2)
    with pytest.raises(ValueError, match=r"an expanded tensor of strides \[0\]"):
        check_grads([parameter])
    parameter.grad = torch.eye(2)[0].to_sparse()
    with pytest.raises(ValueError, match=r"the layout torch.sparse_coo"):
        check_grads([parameter])
    check_grads([parameter], allow_sparse=True)


def test_hooks_that_wait_for_a_shared_gradient_are_refused_by_name() -> None:
    parameter = torch.zeros(2, requires_grad=True)
    check_accumulation_hooks([parameter])

    def step_here(_: Tensor) -> None: ...

    handle = parameter.register_post_accumulate_grad_hook(step_here)
    with pytest.raises(ValueError, match=r"number 0, of shape \[2\], has .*step_here"):
        check_accumulation_hooks([parameter])
    handle.remove()
    check_accumulation_hooks([parameter])


def test_features_are_a_list_of_different_tensors_with_a_graph() -> None:
    z = leaf() * 2
    assert checked_features(z, z.device) == [z]
    with pytest.raises(ValueError, match=r"every tensor of `features` once"):
        checked_features([z, z], z.device)
    with pytest.raises(ValueError, match=r"a tensor without a graph"):
        checked_features([z.detach()], z.device)
    with pytest.raises(ValueError, match=r"at least one tensor"):
        checked_features([], z.device)


def test_a_step_is_read_as_a_whole() -> None:
    shared = leaf()
    balancer = Uniform([shared], num_tasks=3)
    losses = [shared * 2, None, shared * 3]
    step = read_step(balancer, losses, grad_scale=4.0, retain_graph=True)
    assert step.roots == losses
    assert step.tasks == [0, 2]
    assert step.shared == [shared]
    assert [None if each is None else each.item() for each in step.starts] == [4.0, None, 4.0]
    assert step.losses is None  # uniform weights ask for none
    assert step.moves_weights and step.retain_graph
    step.keep_only(2)
    assert step.tasks == [2]
    assert step.roots == [None, None, losses[2]]
    assert [each is None for each in step.starts] == [True, True, False]


def test_what_stands_in_the_way_of_passes_is_found_where_they_follow_at_once() -> None:
    shared = leaf()
    balancer = Uniform([shared], num_tasks=1)
    shared.register_post_accumulate_grad_hook(lambda _: None)
    read_step(balancer, [shared * 2])
    with pytest.raises(ValueError, match=r"register_post_accumulate_grad_hook"):
        read_step(balancer, [shared * 2], runs_now=True)
