"""A step that fails after it has moved the weights leaves state and gradients as they were, to the bit."""

from __future__ import annotations

import pytest
import torch
from _published import published
from torch import Tensor

from excessmtl_ext import ExcessMTL
from excessmtl_ext.engines.undo import all_or_nothing


def make() -> tuple[ExcessMTL, Tensor]:
    parameter = torch.ones(3, requires_grad=True)
    balancer = published([parameter], num_tasks=2)
    balancer.update_weights([[torch.ones(3)], [torch.full((3,), 2.0)]])
    parameter.grad = torch.tensor([1.0, 2.0, 3.0])
    return balancer, parameter


def state(balancer: ExcessMTL) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in balancer.state_tensors().items()}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_state_and_grad_are_put_back(error: type[BaseException]) -> None:
    balancer, parameter = make()
    before, grad = state(balancer), parameter.grad
    with pytest.raises(error), all_or_nothing(balancer, [parameter], [1]):
        assert parameter.grad is None
        balancer.task_weights.fill_(0.5)
        balancer.num_steps += 1
        balancer.sq_grad_sum[1] += 3.0
        parameter.grad = torch.ones(3)
        raise error
    after = state(balancer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert parameter.grad is grad
    assert grad is not None and grad.tolist() == [1.0, 2.0, 3.0]


def test_a_step_that_does_not_count_keeps_what_the_rule_wrote() -> None:
    balancer, parameter = make()
    with pytest.raises(FloatingPointError), all_or_nothing(balancer, [parameter], [0, 1]):
        balancer.num_skipped_steps += 1
        raise FloatingPointError
    assert balancer.num_skipped_steps == 1
    assert parameter.grad is not None and parameter.grad.tolist() == [1.0, 2.0, 3.0]


def test_what_the_body_leaves_is_added_to_what_was_there() -> None:
    balancer, parameter = make()
    with all_or_nothing(balancer, [parameter]):
        parameter.grad = torch.full((3,), 10.0)
    assert parameter.grad.tolist() == [11.0, 12.0, 13.0]
    with all_or_nothing(balancer, [parameter]):
        pass
    assert parameter.grad is not None and parameter.grad.tolist() == [11.0, 12.0, 13.0]
