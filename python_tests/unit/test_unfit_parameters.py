"""Shared parameters to which no gradients can be written are refused with what is wrong with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from excessmtl_ext import Uniform
from excessmtl_ext.step_arguments import bound_parameters
from excessmtl_ext.unfit_parameters import raise_unfit


def test_parameters_with_data_of_which_some_train_are_fit() -> None:
    layer = nn.Linear(2, 2)
    balancer = Uniform(layer.parameters(), num_tasks=2)
    assert [id(each) for each in bound_parameters(balancer)] == [id(layer.weight), id(layer.bias)]


def test_each_kind_of_unfit_parameters_is_named() -> None:
    with pytest.raises(ValueError, match=r"Make it as Uniform\(model.encoder.parameters\(\)"):
        bound_parameters(Uniform(num_tasks=2))
    layer = nn.Linear(2, 2)
    balancer = Uniform(layer.parameters(), num_tasks=2)
    layer.requires_grad_(False)
    with pytest.raises(ValueError, match=r"require grad, but all 2 are frozen"):
        bound_parameters(balancer)
    balancer.shared_parameters = list(nn.Linear(2, 2, device="meta").parameters())
    with pytest.raises(ValueError, match=r"on the meta device"):
        bound_parameters(balancer)
    with FakeTensorMode():
        balancer.shared_parameters = [torch.zeros(2, requires_grad=True)]
    with pytest.raises(ValueError, match=r"those of FakeTensorMode"):
        bound_parameters(balancer)


def test_a_frozen_parameter_that_is_to_train_again_is_named() -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    balancer = Uniform(layer.parameters(), num_tasks=2)
    bound_parameters(balancer)
    layer.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"Expected shared parameter 1, of shape \[2\], to stay"):
        raise_unfit(balancer)
    with pytest.raises(ValueError, match=r"to stay frozen"):
        bound_parameters(balancer)
