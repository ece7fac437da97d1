"""IMTL: equal projections (G), scaled losses that tend to 1 (L), and what both together mean."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext

import pytest
import torch
from _asserts import assert_equal_bits
from _inputs import make_problem

from excessmtl_ext import IMTL


def projections(weights: torch.Tensor, jacobian: torch.Tensor) -> torch.Tensor:
    """Of the weighted sum on the unit gradients, in units of its length."""
    combined = weights @ jacobian
    return torch.nn.functional.normalize(jacobian, dim=1) @ combined / combined.norm()


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_projections_onto_the_unit_gradients_are_equal(num_tasks, spread):
    for _ in range(20):
        jacobian = torch.randn(num_tasks, 40, dtype=torch.float64) + torch.randn(40).double()
        jacobian *= torch.logspace(-math.log10(spread), math.log10(spread), num_tasks)[:, None]
        weights = IMTL(num_tasks=num_tasks, variant="G").update_weights(jacobian)
        assert weights.sum().item() == pytest.approx(1.0, rel=1e-9)
        actual = projections(weights, jacobian)
        torch.testing.assert_close(actual, actual[0].expand(num_tasks), rtol=1e-6, atol=1e-9)


def test_repeated_gradients_leave_projections_equal():
    jacobian = torch.randn(3, 10, dtype=torch.float64)[[0, 1, 2, 0, 1]]
    weights = IMTL(num_tasks=5, variant="G").update_weights(jacobian)
    actual = projections(weights, jacobian)
    torch.testing.assert_close(actual, actual[0].expand(5))


def test_opposite_gradients_cancel():
    jacobian = torch.tensor([[1.0, 2.0], [-2.0, -4.0]])
    weights = IMTL(num_tasks=2, variant="G").update_weights(jacobian)
    torch.testing.assert_close(weights @ jacobian.double(), torch.zeros(2).double())
    assert weights.sum().item() == pytest.approx(1.0)


def test_a_zero_gradient_counts_as_absent_and_all_zero_keeps_the_weights():
    balancer = IMTL(num_tasks=3, variant="G")
    weights = balancer.update_weights(torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 1.0]])).clone()
    assert weights.tolist() == pytest.approx([0.25 * 2 / 3, 1 / 3, 0.75 * 2 / 3])
    assert torch.equal(balancer.update_weights(torch.zeros(3, 2)), weights)


def test_weights_can_be_negative_and_still_sum_to_the_total():
    # The middle one of three gradients in a narrow fan has to be pushed back.
    jacobian = torch.tensor([[1.0, 0.0, 0.1], [0.0, 1.0, 0.1], [1.0, 1.0, -0.1]])
    balancer = IMTL(num_tasks=3, variant="G", weight_scale="num_tasks")
    weights = balancer.update_weights(jacobian)
    assert weights.min() < 0
    assert weights.sum().item() == pytest.approx(3.0)
    actual = projections(weights, jacobian.double())
    torch.testing.assert_close(actual, actual[0].expand(3))


@pytest.mark.parametrize("head_weighting", ["none", "task_weights"])
def test_negative_weights_reach_the_shared_gradient_and_no_head(head_weighting):
    rows = torch.tensor([[1.0, 0.0, 0.1], [0.0, 1.0, 0.1], [1.0, 1.0, -0.1]])
    shared = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    heads = torch.ones(3).unbind()
    for head in heads:
        head.requires_grad_()
    balancer = IMTL([shared], num_tasks=3, variant="G", head_weighting=head_weighting)
    balancer.backward([head * (row @ shared) for head, row in zip(heads, rows, strict=True)])
    assert balancer.task_weights.min() < 0
    torch.testing.assert_close(shared.grad, balancer.task_weights.float() @ rows)
    factor = 1.0 if head_weighting == "none" else 1 / 3
    torch.testing.assert_close(
        torch.stack([head.grad for head in heads]), factor * (rows @ shared).detach()
    )


# ---- IMTL-L ----


def test_two_steps_of_the_loss_scales_by_hand():
    balancer = IMTL(num_tasks=2, variant="L", robust_step_size=0.1)
    balancer.update_weights(losses=[1.5, 0.5])
    first = [-0.1 * (1.5 - 1), -0.1 * (0.5 - 1)]
    assert balancer.log_loss_scales.tolist() == pytest.approx(first)
    balancer.update_weights(losses=[1.2, 0.8])
    second = [s - 0.1 * (math.exp(s) * loss - 1) for s, loss in zip(first, [1.2, 0.8], strict=True)]
    assert balancer.log_loss_scales.tolist() == pytest.approx(second)
    total = math.exp(second[0]) + math.exp(second[1])
    assert balancer.task_weights.tolist() == pytest.approx([math.exp(s) / total for s in second])


@pytest.mark.parametrize("variant", ["L", "both"])
def test_scaled_losses_tend_to_one(variant):
    balancer = IMTL(num_tasks=3, variant=variant, robust_step_size=0.1)
    losses = torch.tensor([5.0, 0.3, 1.0], dtype=torch.float64)
    for _ in range(200):
        balancer.update_weights(torch.eye(3), losses)
    torch.testing.assert_close(
        balancer.log_loss_scales.exp() * losses, torch.ones(3).double(), rtol=1e-6, atol=0
    )
    if variant == "L":
        torch.testing.assert_close(balancer.task_weights, (1 / losses) / (1 / losses).sum())


def test_a_step_of_the_scales_is_the_gradient_step_of_their_objective():
    scales = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    losses = torch.tensor([0.7, 1.3, 1.0], dtype=torch.float64)
    (scales.exp() * losses - scales).sum().backward()
    balancer = IMTL(num_tasks=3, variant="L", robust_step_size=0.05)
    balancer.update_weights(losses=losses)
    torch.testing.assert_close(balancer.log_loss_scales, -0.05 * scales.grad)


def test_a_huge_first_loss_does_not_throw_a_scale_past_its_optimum():
    balancer = IMTL(num_tasks=2, variant="L", robust_step_size=1.0)
    balancer.update_weights(losses=[1e6, 1.0])
    assert balancer.log_loss_scales.tolist() == pytest.approx([-math.log(1e6), 0.0])
    balancer.update_weights(losses=[0.0, -3.0])  # no optimum: s grows
    assert bool(balancer.log_loss_scales.isfinite().all())
    assert bool((balancer.log_loss_scales > torch.tensor([-13.9, 0.0])).all())


def test_loss_scales_need_one_backward_pass():
    assert IMTL(num_tasks=2, variant="L").requires == {"losses"}
    assert IMTL(num_tasks=2, variant="G").requires == {"task_grads"}
    assert IMTL(num_tasks=2, variant="both").requires == {"task_grads", "losses"}
    assert IMTL.requires == {"task_grads", "losses"}


# ---- both ----


def test_loss_scales_leave_the_shared_gradient_of_equal_projections_unchanged():
    problem, other = make_problem(), make_problem()
    both = IMTL(problem.encoder.parameters(), num_tasks=3, variant="both", robust_step_size=0.3)
    gradients_only = IMTL(other.encoder.parameters(), num_tasks=3, variant="G")
    for _ in range(3):
        problem.zero_grad()
        other.zero_grad()
        both.backward(problem.losses())
        gradients_only.backward(other.losses())
        assert_equal_bits(problem.grads(), other.grads())
    assert both.log_loss_scales.abs().min() > 0.01
    # What G would give for losses that carry their scales, brought to the same sum.
    scales = both.log_loss_scales.exp()
    jacobian = torch.randn(3, 9, dtype=torch.float64)
    on_scaled = IMTL(num_tasks=3, variant="G").update_weights(jacobian * scales[:, None]) * scales
    on_plain = IMTL(num_tasks=3, variant="G").update_weights(jacobian)
    torch.testing.assert_close(on_scaled / on_scaled.sum(), on_plain)


def test_heads_carry_the_loss_scales():
    problem, plain = make_problem(), make_problem()
    balancer = IMTL(
        problem.encoder.parameters(),
        num_tasks=3,
        robust_step_size=0.2,
        head_weighting="task_weights",
        weight_scale="num_tasks",
    )
    balancer.backward(problem.losses())
    sum(plain.losses()).backward()
    factors = 3 * balancer.log_loss_scales.softmax(0)
    assert factors.max() / factors.min() > 1.05
    for head, reference, factor in zip(problem.heads, plain.heads, factors, strict=True):
        torch.testing.assert_close(head.weight.grad, reference.weight.grad * factor.float())


def test_a_nonfinite_loss_moves_neither_weights_nor_scales():
    balancer = IMTL(num_tasks=2, variant="both", robust_step_size=0.1)
    balancer.update_weights(torch.eye(2), losses=[2.0, 1.0])
    before = [tensor.clone() for tensor in (balancer.task_weights, balancer.log_loss_scales)]
    balancer.update_weights(torch.eye(2) * 3, losses=[float("inf"), 1.0])
    assert_equal_bits([balancer.task_weights, balancer.log_loss_scales], before)
    assert balancer.found_nonfinite.tolist() == [True, False]
    assert (int(balancer.num_steps), int(balancer.num_skipped_steps)) == (1, 1)


# ---- torchjd is optional ----


def test_without_torchjd_the_error_names_the_extra_and_loss_scales_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "\.\[train\]" in a clone'):
        IMTL(num_tasks=2, variant="G")
    IMTL(num_tasks=2, variant="L").update_weights(losses=[1.0, 2.0])


def test_wrong_options_raise():
    with pytest.raises(ValueError, match="`variant` to be one of 'G', 'L', 'both', but got 'g'"):
        IMTL(num_tasks=2, variant="g")
    with pytest.raises(ValueError, match="`robust_step_size` > 0, but got 0"):
        IMTL(num_tasks=2, robust_step_size=0)


def test_heads_have_the_scales_of_their_losses_also_where_the_weights_are_held() -> None:
    problem = make_problem()
    balancer = IMTL(problem.encoder.parameters(), num_tasks=3, head_weighting="task_weights")
    rows = []
    for holds in (False, True):
        problem.zero_grad()
        with balancer.hold_weights() if holds else nullcontext():
            balancer.backward(problem.losses())
        rows.append([head.weight.grad for head in problem.heads])
    for left, right in zip(*rows, strict=True):
        torch.testing.assert_close(left, right)
