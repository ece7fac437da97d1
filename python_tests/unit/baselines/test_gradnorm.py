"""GradNorm: weighted gradient norms at the last shared layer are pulled to the mean times the relative rate ^ 1.5."""

from __future__ import annotations

import pytest
import torch
from _asserts import assert_equal_bits
from _inputs import make_problem

from excessmtl_ext import GradNorm


def gradients_of_norms(*norms: float) -> torch.Tensor:
    return torch.diag(torch.tensor(norms, dtype=torch.float64))


def test_two_steps_by_hand():
    balancer = GradNorm(num_tasks=2, robust_step_size=0.1)
    # Equal rates: G = (3, 1), mean 2. w = (1 - 0.3, 1 + 0.1), scaled to sum 2.
    balancer.update_weights(gradients_of_norms(3, 1), losses=[4.0, 2.0])
    first = torch.tensor([0.7, 1.1], dtype=torch.float64)
    first *= 2 / first.sum()
    torch.testing.assert_close(balancer.task_weights, first / 2)
    assert balancer.initial_losses.tolist() == [4.0, 2.0]
    # Ratios 1/2 and 1/4: rates 4/3 and 2/3. G = (3 w0, w1), targets mean * (1.5396, 0.5443).
    balancer.update_weights(gradients_of_norms(3, 1), losses=[2.0, 0.5])
    weighted = first * torch.tensor([3.0, 1.0])
    target = weighted.mean() * torch.tensor([4 / 3, 2 / 3], dtype=torch.float64) ** 1.5
    signs = (weighted - target).sign()
    assert signs.tolist() == [-1.0, 1.0]
    second = first - 0.1 * torch.tensor([3.0, 1.0]) * signs
    torch.testing.assert_close(balancer.task_weights, second / second.sum())


def test_step_is_that_of_autograd_on_the_objective():
    norms = torch.rand(5, dtype=torch.float64) + 0.5
    balancer = GradNorm(num_tasks=5, robust_step_size=0.01)
    balancer.update_weights(torch.diag(norms), losses=torch.rand(5) + 1)
    weights = (balancer.task_weights * 5).requires_grad_()
    losses = torch.rand(5, dtype=torch.float64) + 0.1
    ratios = losses / balancer.initial_losses
    weighted = weights * norms
    target = (weighted.mean() * (ratios / ratios.mean()) ** 1.5).detach()
    (weighted - target).abs().sum().backward()
    moved = weights.detach() - 0.01 * weights.grad
    balancer.update_weights(torch.diag(norms), losses=losses)
    torch.testing.assert_close(balancer.task_weights, moved / moved.sum())


def test_equal_weighted_norms_at_equal_rates_are_a_fixed_point():
    balancer = GradNorm(num_tasks=3, robust_step_size=0.5)
    balancer.task_weights.copy_(torch.tensor([0.5, 0.25, 0.25]))
    # 1.5 * 1, 0.75 * 2, 0.75 * 2, all exact in binary.
    balancer.update_weights(gradients_of_norms(1, 2, 2), losses=[1.0, 1.0, 1.0])
    assert balancer.task_weights.tolist() == [0.5, 0.25, 0.25]


@pytest.mark.parametrize("rates", [(1.0, 1.0, 1.0), (1.3, 1.0, 0.7)])
def test_weighted_norms_end_at_the_mean_times_the_rate(rates):
    norms = torch.tensor([4.0, 1.0, 0.5], dtype=torch.float64)
    step = 1e-3
    balancer = GradNorm(num_tasks=3, robust_step_size=step)
    balancer.update_weights(torch.diag(norms), losses=[1.0, 1.0, 1.0])
    for _ in range(6000):
        balancer.update_weights(torch.diag(norms), losses=list(rates))
    weighted = 3 * balancer.task_weights * norms
    wanted = torch.tensor(rates, dtype=torch.float64) ** 1.5
    # The targets are shares of a mean, so the norms end in the proportions of rate ^ 1.5 (to within the steps of an
    # L1 objective, one step size times a squared norm).
    torch.testing.assert_close(
        weighted / weighted.sum(), wanted / wanted.sum(), rtol=0, atol=2 * step * 16
    )


def test_a_task_that_improves_less_gains():
    balancer = GradNorm(num_tasks=2, robust_step_size=0.1)
    balancer.update_weights(gradients_of_norms(1, 1), losses=[1.0, 10.0])
    assert balancer.task_weights.tolist() == [0.5, 0.5]
    balancer.update_weights(gradients_of_norms(1, 1), losses=[0.9, 1.0])  # 90 % and 10 % are left
    assert balancer.task_weights[0] > 0.5


def test_only_the_last_shared_layer_counts():
    problem = make_problem()
    shared = list(problem.encoder.parameters())  # weight, bias, weight, bias
    grads = [[torch.rand_like(p) for p in shared] for _ in range(3)]
    losses = [1.0, 1.0, 1.0]
    balancers = {
        name: GradNorm(shared, num_tasks=3, last_layer=layer)
        for name, layer in {"default": None, "last": (2, 3), "weight": [2], "first": [0, 1]}.items()
    }
    weights = {name: b.update_weights(grads, losses) for name, b in balancers.items()}
    assert torch.equal(weights["default"], weights["last"])
    assert not torch.equal(weights["default"], weights["weight"])
    assert not torch.equal(weights["default"], weights["first"])
    unbound = GradNorm(num_tasks=3)
    assert torch.equal(unbound.update_weights(grads, losses), weights["default"])
    before = balancers["default"].task_weights.clone()
    for row in grads:
        row[0] *= 100  # the first layer
    balancers["default"].reset()
    assert torch.equal(balancers["default"].update_weights(grads, losses), before)


def test_backward_measures_the_norms_of_the_unweighted_losses():
    problem = make_problem(dtype=torch.float64)
    balancer = GradNorm(problem.encoder.parameters(), num_tasks=3, robust_step_size=0.01)
    layer = list(problem.encoder.parameters())[2:]
    losses = problem.losses()
    norms = torch.stack(
        [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(x, layer, retain_graph=True)])
            .detach()
            .norm()
            for x in losses
        ]
    )
    balancer.backward(losses)
    moved = 1 - 0.01 * norms * (norms - norms.mean()).sign()
    torch.testing.assert_close(balancer.task_weights, moved / moved.sum())


def test_a_step_too_large_leaves_a_weight_above_zero_and_it_comes_back():
    balancer = GradNorm(num_tasks=2, robust_step_size=10.0)
    balancer.update_weights(gradients_of_norms(3, 1), losses=[1.0, 1.0])
    assert 0 < balancer.task_weights[0] < 1e-6
    balancer.update_weights(gradients_of_norms(3, 1), losses=[1.0, 1.0])
    assert balancer.task_weights[0] > 0.9


def test_a_task_that_comes_later_gets_its_first_loss_then():
    balancer = GradNorm(num_tasks=2)
    balancer.update_weights([[torch.ones(2)], []], losses=[3.0, 0.0])
    assert balancer.initial_losses[0] == 3.0
    assert balancer.initial_losses[1].isnan()
    assert balancer.task_weights.tolist() == [0.5, 0.5]
    balancer.update_weights([[torch.ones(2)], [torch.ones(2)]], losses=[1.0, 7.0])
    assert balancer.initial_losses.tolist() == [3.0, 7.0]


def test_losses_of_zero_and_below_keep_the_weights_finite():
    balancer = GradNorm(num_tasks=2)
    for losses in ([0.0, 1.0], [-1.0, -1.0], [0.0, 0.0]):
        weights = balancer.update_weights(gradients_of_norms(3, 1), losses=losses)
        assert bool((weights > 0).all())
        assert weights.sum().item() == pytest.approx(1.0)


def test_a_nan_outside_the_last_layer_is_found():
    problem = make_problem()
    shared = list(problem.encoder.parameters())
    balancer = GradNorm(shared, num_tasks=3)
    grads = [[torch.rand_like(p) for p in shared] for _ in range(3)]
    grads[1][0][0, 0] = float("nan")
    before = [balancer.task_weights.clone(), balancer.initial_losses.clone()]
    balancer.update_weights(grads, [1.0, 1.0, 1.0])
    assert balancer.found_nonfinite.tolist() == [False, True, False]
    assert_equal_bits([balancer.task_weights, balancer.initial_losses], before)


def test_wrong_layer_raises():
    problem = make_problem()
    for layer in ([4], [], [-1], [1, 1], ["2"]):
        with pytest.raises(
            ValueError, match=r"`last_layer` to hold distinct positions between 0 and 3"
        ):
            GradNorm(problem.encoder.parameters(), num_tasks=3, last_layer=layer)
    with pytest.raises(ValueError, match="between 0 and 0 of shared parameters, but got"):
        GradNorm(num_tasks=2, last_layer=[1]).update_weights(torch.eye(2), [1.0, 1.0])
