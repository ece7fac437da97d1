"""MOML: MGDA's weights from validation losses, of which nothing else remains."""

from __future__ import annotations

import pytest
import torch
from _asserts import assert_equal_bits
from _inputs import Problem, make_problem

from excessmtl_ext import MGDA, MOML


def validation_losses(problem: Problem, seed: int = 1) -> list[torch.Tensor]:
    """Losses of another batch on the same network."""
    other = make_problem(seed=seed, dtype=problem.inputs.dtype)
    return Problem(problem.encoder, problem.heads, other.inputs, other.targets).losses()


def test_weights_are_those_of_mgda_on_the_validation_losses():
    problem = make_problem()
    balancer = MOML(problem.encoder.parameters(), num_tasks=3)
    mgda = MGDA(problem.encoder.parameters(), num_tasks=3)
    observed = balancer.observe_validation(validation_losses(problem)).clone()
    mgda.backward(problem.losses())
    assert not torch.allclose(mgda.task_weights, observed)  # the training losses say otherwise
    mgda.backward(validation_losses(problem))
    assert torch.equal(mgda.task_weights, observed)
    assert observed.max() - observed.min() > 0.01


def test_step_is_the_weighted_backward_pass_of_the_training_losses():
    problem, plain = make_problem(), make_problem()
    balancer = MOML(problem.encoder.parameters(), num_tasks=3)
    weights = balancer.observe_validation(validation_losses(problem)).clone()
    balancer.backward(problem.losses())
    assert torch.equal(balancer.task_weights, weights)
    losses = plain.losses()
    (torch.stack(losses) * weights.float()).sum().backward(retain_graph=True)
    for ours, theirs in zip(problem.encoder.parameters(), plain.encoder.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    plain.zero_grad()
    sum(losses).backward()
    for ours, theirs in zip(problem.heads.parameters(), plain.heads.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("has_grads", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_observing_leaves_every_grad_as_it_was(has_grads, stacked):
    problem = make_problem()
    balancer = MOML(problem.encoder.parameters(), num_tasks=3)
    if has_grads:
        for parameter in problem.parameters():
            parameter.grad = torch.randn_like(parameter)
    objects, before = [p.grad for p in problem.parameters()], problem.grads()
    losses = validation_losses(problem)
    balancer.observe_validation(torch.stack(losses) if stacked else losses)
    assert all(p.grad is old for p, old in zip(problem.parameters(), objects, strict=True))
    assert_equal_bits(problem.grads(), before)


def test_a_wrong_validation_loss_leaves_grads_and_weights_as_they_were():
    problem = make_problem()
    balancer = MOML(problem.encoder.parameters(), num_tasks=3)
    for parameter in problem.parameters():
        parameter.grad = torch.ones_like(parameter)
    losses = validation_losses(problem)
    losses[2] = torch.ones((), requires_grad=True) * 2  # does not depend on the encoder
    with pytest.raises(ValueError, match=r"`losses\[2\]` to depend on the shared"):
        balancer.observe_validation(losses)
    assert_equal_bits(problem.grads(), [torch.ones_like(p) for p in problem.parameters()])
    assert balancer.task_weights.tolist() == [1 / 3] * 3
    with pytest.raises(ValueError, match="3 losses, one per task, but got 2"):
        balancer.observe_validation(losses[:2])


@pytest.mark.parametrize("how", ["backward", "forward"])
def test_a_step_before_the_first_observation_raises(how):
    problem = make_problem()
    balancer = MOML(problem.encoder.parameters(), num_tasks=3)
    with pytest.raises(
        RuntimeError, match=r"observe_validation\(losses\) before the first backward"
    ):
        if how == "backward":
            balancer.backward(problem.losses())
        else:
            balancer(problem.losses()).backward()
    assert all(grad is None for grad in problem.grads())
    balancer.observe_validation(validation_losses(problem))
    balancer.backward(problem.losses())
    balancer.backward(problem.losses())  # the last weights stay until the next observation
    balancer.reset()
    with pytest.raises(RuntimeError, match="observe_validation"):
        balancer.backward(problem.losses())


def test_a_resumed_run_needs_no_new_observation():
    problem = make_problem()
    balancer, loaded = (MOML(problem.encoder.parameters(), num_tasks=3) for _ in range(2))
    balancer.observe_validation(validation_losses(problem))
    loaded.load_state_dict(balancer.state_dict())
    loaded.backward(problem.losses())
    assert torch.equal(loaded.task_weights, balancer.task_weights)


def test_a_task_absent_from_training_keeps_its_weight():
    problem = make_problem()
    balancer = MOML(problem.encoder.parameters(), num_tasks=3)
    weights = balancer.observe_validation(validation_losses(problem)).clone()
    losses = problem.losses()
    balancer.backward([losses[0], None, losses[2]])
    assert torch.equal(balancer.task_weights, weights)
    assert problem.heads[1].weight.grad is None


def test_a_task_absent_from_validation_counts_as_uniform():
    problem = make_problem()
    balancer = MOML(problem.encoder.parameters(), num_tasks=3)
    losses = validation_losses(problem)
    weights = balancer.observe_validation([losses[0], None, losses[2]])
    assert weights[1].item() == pytest.approx(1 / 3)
    assert (weights[0] + weights[2]).item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_nonfinite_validation_gradients_keep_the_weights(nonfinite):
    problem = make_problem()
    balancer = MOML(problem.encoder.parameters(), num_tasks=3, nonfinite=nonfinite)
    weights = balancer.observe_validation(validation_losses(problem)).clone()
    losses = validation_losses(problem, seed=2)
    losses[1] = losses[1] * float("nan")
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match=r"task\(s\) \[1\]"):
            balancer.observe_validation(losses)
    else:
        balancer.observe_validation(losses)
    assert balancer.found_nonfinite.tolist() == [False, True, False]
    assert int(balancer.num_skipped_steps) == 1
    assert torch.equal(balancer.task_weights, weights)
    balancer.backward(problem.losses())  # the training step is as good as before
    assert not balancer.found_nonfinite.any()
    assert all(bool(p.grad.isfinite().all()) for p in problem.parameters())


def test_gradients_of_validation_losses_can_be_given():
    balancer = MOML(num_tasks=2)
    assert balancer.requires == {"validation_losses"}
    weights = balancer.update_weights(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    assert weights.tolist() == pytest.approx([0.2, 0.8])
    with pytest.raises(ValueError, match="Expected `task_grads`: MOML computes"):
        balancer.update_weights(losses=[1.0, 2.0])


def test_grad_scale_changes_no_weight():
    problem = make_problem(dtype=torch.float64)
    balancer = MOML(problem.encoder.parameters(), num_tasks=3)
    plain = balancer.observe_validation(validation_losses(problem)).clone()
    scaled = balancer.observe_validation(validation_losses(problem), grad_scale=1024.0)
    torch.testing.assert_close(scaled, plain)
