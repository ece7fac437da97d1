"""What defines ExcessMTL beyond the contract: the properties of the method and its options."""

from __future__ import annotations

import doctest

import pytest
import torch
from _asserts import assert_equal_bits
from _inputs import make_problem
from _published import published
from torch import nn

from excessmtl_ext import ExcessMTL, excess_mtl
from excessmtl_ext.baselines import group_dro, uniform


@pytest.mark.parametrize("module", [excess_mtl, group_dro, uniform], ids=lambda m: m.__name__)
def test_docstring_examples_are_true(module):
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_task_far_from_its_optimum_gains_weight_whatever_its_loss():
    """Task 0 converges at once with a large irreducible loss; task 1 goes on: loss would favour the first."""
    shared = nn.Parameter(torch.zeros(2))
    balancer = published([shared], num_tasks=2, robust_step_size=0.5)
    for step in range(20):
        near = (shared[0] - 0.0) * (1.0 if step == 0 else 1e-3) + 100.0
        far = (shared[1] - 1.0).square()
        balancer.backward([near, far])
    assert balancer.task_weights[1] > 0.9


def test_permuting_tasks_permutes_the_result():
    order, numels = [2, 0, 1], (5, 40)
    plain, permuted = (published(num_tasks=3, robust_step_size=1.0) for _ in range(2))
    for _ in range(4):
        rows = [[torch.randn(n) for n in numels] for _ in range(3)]
        plain.update_weights(rows)
        permuted.update_weights([rows[task] for task in order])
    torch.testing.assert_close(permuted.task_weights, plain.task_weights[order], rtol=1e-14, atol=0)
    assert torch.equal(permuted.excess_risk, plain.excess_risk[order])


def test_splitting_a_parameter_changes_nothing_but_rounding():
    whole, split = (published(num_tasks=2, robust_step_size=1.0) for _ in range(2))
    for _ in range(4):
        grads = torch.randn(2, 1000)
        whole.update_weights(grads)
        split.update_weights([[row[:7], row[7:300], row[300:]] for row in grads])
    torch.testing.assert_close(split.task_weights, whole.task_weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("fisher", "power"), [("sqrt", 1), ("linear", 0)])
def test_scaling_all_losses_scales_the_risk_as_the_equations_say(fisher, power):
    plain, scaled = (published(num_tasks=2, fisher=fisher, eps=1e-30) for _ in range(2))
    for _ in range(3):
        grads = torch.randn(2, 50)
        plain.update_weights(grads)
        scaled.update_weights(grads * 8)
    torch.testing.assert_close(scaled.excess_risk, plain.excess_risk * 8**power, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.task_weights, plain.task_weights, rtol=1e-6, atol=0)


def test_weights_stay_above_the_floor():
    balancer = published(num_tasks=4, robust_step_size=50.0, min_weight=0.1)
    for _ in range(20):
        balancer.update_weights(
            torch.randn(4, 10) * torch.tensor([[9.0], [1.0], [1.0], [1.0]]).roll(1, 0)
        )
    assert balancer.task_weights.min() >= 0.1
    assert balancer.task_weights.sum().item() == pytest.approx(1.0, abs=1e-14)


def test_momentum_reads_a_steady_gradient_as_risk_and_pure_noise_as_little():
    """Both tasks have the same mean square gradient; only one of them has a mean."""
    balancer = published(num_tasks=2, gradient_momentum=0.95, fisher="linear", robust_step_size=1.0)
    plain = published(num_tasks=2, fisher="linear", robust_step_size=1.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        steady, noise = torch.ones(500), torch.randn(500, generator=generator)
        balancer.update_weights(torch.stack([steady, noise]))
        plain.update_weights(torch.stack([steady, noise]))
    assert balancer.excess_risk[0] > 10 * balancer.excess_risk[1]
    assert plain.excess_risk[0] < 2 * plain.excess_risk[1]


def test_without_warmup_no_task_takes_all_the_weight_at_the_first_step():
    """The first risk is its own baseline, so every task moves alike, whatever the scale of its gradient."""
    balancer = published(num_tasks=3, num_warmup_steps=0, robust_step_size=1.0)
    balancer.update_weights(torch.randn(3, 50) * torch.tensor([[1e3], [1.0], [1e-3]]))
    assert balancer.relative_excess_risk.tolist() == [1.0] * 3
    assert balancer.task_weights.tolist() == pytest.approx([1 / 3] * 3)
    assert int(balancer.num_steps) == 1


def test_half_precision_gradients_neither_overflow_nor_stall_in_the_state():
    """300 squared is beyond float16; 2,000 equal squares summed in bfloat16 would stop at a fraction of the truth."""
    large = published(num_tasks=1)
    large.update_weights(torch.full((1, 8), 300.0, dtype=torch.float16))
    assert large.sq_grad_sum[0, 0].item() == 90_000.0
    long = published(num_tasks=1)
    for _ in range(2_000):
        long.update_weights(torch.ones(1, 8, dtype=torch.bfloat16))
    assert long.sq_grad_sum[0, 0].item() == 2_000.0


def test_equal_runs_give_equal_bits():
    results = []
    for _ in range(2):
        problem = make_problem()
        balancer = ExcessMTL.from_preset("recommended", problem.encoder.parameters(), num_tasks=3)
        optimizer = torch.optim.Adam(problem.parameters(), lr=1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            balancer.backward(problem.losses())
            optimizer.step()
        results.append([*balancer.state_tensors().values(), *problem.parameters()])
    assert_equal_bits(results[0], results[1])


def test_state_is_sized_by_the_first_step_and_moves_to_the_gradients(device):
    layer = nn.Linear(3, 3).to(device)
    balancer = published(num_tasks=2)
    assert balancer.sq_grad_sum.shape == (2, 0)
    balancer.update_weights([[p.detach() for p in layer.parameters()]] * 2)
    assert balancer.sq_grad_sum.shape == (2, 64)
    assert balancer.sq_grad_sum.device.type == device.type
    assert balancer.task_weights.device.type == device.type


@pytest.mark.parametrize("preset", ["official", "paper"])
def test_the_unit_of_a_loss_counts_under_the_published_eps_alone(preset):
    def weights(unit: float, **options) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        balancer = ExcessMTL.from_preset(
            preset, num_tasks=2, num_warmup_steps=2, robust_step_size=1.0, **options
        )
        for _ in range(20):
            grads = torch.randn(2, 50, generator=generator, dtype=torch.float64)
            balancer.update_weights(grads * torch.tensor([[1.0], [unit]], dtype=torch.float64))
        return balancer.task_weights.tolist()

    for unit in (1e-12, 1e-6, 1e6):
        assert weights(unit, eps=2**-126) == pytest.approx(weights(1.0, eps=2**-126), rel=1e-9)
    assert weights(1e-6) != pytest.approx(weights(1.0), rel=0.05)


def test_many_tasks_train():
    problem = make_problem(num_tasks=60)
    balancer = published(problem.encoder.parameters(), num_tasks=60, robust_step_size=0.1)
    for _ in range(3):
        problem.zero_grad()
        balancer.backward(problem.losses())
    assert balancer.task_weights.sum().item() == pytest.approx(1.0)
    assert bool((balancer.task_weights > 0).all())
