"""A tensor that autograd has saved and an op then overwrites is an error in the backward pass, not a wrong gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from excessmtl_ext import ExcessMTL, functional

LAYOUT = functional.ParamLayout([40])
OPTIONS = functional.StepOptions()


def sizes() -> tuple[list[Tensor], list[Tensor], functional.StepState]:
    torch.manual_seed(0)
    return [torch.randn(40), torch.randn(40)], [torch.zeros(40)], functional.init_state(2, LAYOUT)


def test_every_tensor_that_an_op_writes_has_a_new_version_and_no_other() -> None:
    grads, outputs, state = sizes()
    tensors = {"output": outputs[0], "gradient": grads[0], **state._asdict()}
    before = {name: tensor._version for name, tensor in tensors.items()}
    functional.fused_step_combine_(grads, outputs, LAYOUT, state, OPTIONS)
    changed = {name for name, tensor in tensors.items() if tensor._version > before[name]}
    assert changed == set(tensors) - {"gradient"} - ({"ticket"} if no_ops() else set())


def no_ops() -> bool:
    return functional.cpu_capability() == "reference"


def saved_by_exp() -> tuple[Tensor, Tensor]:
    """The result of exp, which autograd keeps for its derivative, and a sum of it."""
    h = torch.randn(40, requires_grad=True).exp()
    return h.detach(), h.sum()


def written(name: str, memory: Tensor) -> None:
    """Lets a function of the stateless layer write ``memory`` [40]."""
    grads, _, state = sizes()
    one = torch.ones(2, dtype=torch.float64)
    if name == "weighted_sum_":
        functional.weighted_sum_(grads, [memory], LAYOUT, one)
    elif name == "fused_step_combine_":
        functional.fused_step_combine_(grads, [memory], LAYOUT, state, OPTIONS)
    elif name == "combine_":
        functional.fused_step_(grads, LAYOUT, state, OPTIONS)
        functional.combine_(grads, [memory], LAYOUT, state, OPTIONS)
    else:
        layout = functional.ParamLayout([32])
        running, log_max = memory[:32], torch.tensor(0.0, dtype=torch.float64)
        functional.fold_([torch.randn(32)], layout, log_max.clone(), running, log_max)


@pytest.mark.parametrize("name", ["weighted_sum_", "fused_step_combine_", "combine_", "fold_"])
def test_a_saved_tensor_that_an_op_overwrites_is_an_error_in_the_backward_pass(name: str) -> None:
    memory, loss = saved_by_exp()
    written(name, memory)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_that_a_loss_was_made_with_may_not_move_before_its_backward_pass() -> None:
    layer = nn.Linear(3, 2)
    balancer = ExcessMTL(layer.parameters(), num_tasks=2)
    losses = layer(torch.randn(4, 3)).square().mean(0)
    other = layer(torch.randn(4, 3)).square().mean(0)
    weighted = (balancer.task_weights.float() * 1.0).exp().dot(other)
    direct = (balancer.task_weights * other.double()).sum()
    balancer.backward(losses)
    weighted.backward()  # of a copy of the weights
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        direct.backward()


def test_one_tensor_may_be_the_gradient_of_several_tasks() -> None:
    (grad, _), outputs, state = sizes()
    functional.fused_step_combine_([grad, grad], outputs, LAYOUT, state, OPTIONS)
    of_copies, apart = [torch.zeros(40)], functional.init_state(2, LAYOUT)
    copies = [grad.clone(), grad.clone()]
    functional.fused_step_combine_(copies, of_copies, LAYOUT, apart, OPTIONS)
    assert torch.equal(outputs[0], of_copies[0])
    assert all(map(torch.equal, state, apart))


def test_steps_work_on_tensors_of_inference_mode() -> None:
    with torch.inference_mode():
        grads, outputs, state = sizes()
        functional.fused_step_combine_(grads, outputs, LAYOUT, state, OPTIONS)
    arguments: dict[str, Any] = {"accumulate": True}
    functional.fused_step_combine_(grads, outputs, LAYOUT, state, OPTIONS, **arguments)
    assert int(state.num_steps) == 2
