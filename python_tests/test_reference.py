"""reference.py against fractions worked out by hand, and the official code's loop against the official preset."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from excessmtl_ext import ExcessMTL, reference
from excessmtl_ext.functional import ParamLayout, StepOptions, init_state


def step(state, layout, options, grads):
    reference.fused_step_(
        [torch.tensor(g, dtype=torch.float64) for g in grads],
        layout.param_numels,
        layout.chunk_map(torch.device("cpu")),
        None,
        *state,
        sqrt_fisher=options.fisher == "sqrt",
        eps=options.eps,
        gradient_momentum=options.gradient_momentum,
        robust_step_size=options.robust_step_size,
        num_warmup_steps=options.num_warmup_steps,
        relative=options.relative,
        min_weight=options.min_weight,
        weight_total=options.weight_total,
    )


def test_two_steps_by_hand_with_sqrt_fisher():
    layout, options = ParamLayout([2]), StepOptions(eps=1e-30, robust_step_size=1.0)
    state = init_state(2, layout, dtype=torch.float64)
    step(state, layout, options, [[3.0, 4.0], [1.0, 0.0]])
    # E = 9/3 + 16/4 = 7 and 1/1 = 1: the baselines; weights rest.
    assert state.excess_risk.tolist() == pytest.approx([7, 1])
    assert state.task_weights.tolist() == [0.5, 0.5]
    step(state, layout, options, [[4.0, 3.0], [0.0, 2.0]])
    # S = [25, 25] and [1, 4]; E = 16/5 + 9/5 = 5 and 4/2 = 2; R = 5/7 and 2.
    assert state.sq_grad_sum[:, :2].tolist() == [[25, 25], [1, 4]]
    assert state.excess_risk.tolist() == pytest.approx([5, 2])
    assert state.relative_excess_risk.tolist() == pytest.approx([5 / 7, 2])
    first, second = math.exp(5 / 7), math.exp(2)
    assert state.task_weights.tolist() == pytest.approx(
        [first / (first + second), second / (first + second)]
    )
    assert int(state.num_steps) == 2


def test_two_steps_by_hand_with_linear_fisher_and_momentum():
    layout = ParamLayout([1])
    options = StepOptions(fisher="linear", eps=1e-30, gradient_momentum=0.5, robust_step_size=2.0)
    state = init_state(2, layout, dtype=torch.float64, has_momentum=True)
    step(state, layout, options, [[2.0], [1.0]])
    # m = 1 and 1/2, corrected by 1/(1 - 1/2): 2 and 1; E = 4/4 and 1/1.
    assert state.excess_risk.tolist() == pytest.approx([1, 1])
    step(state, layout, options, [[-2.0], [1.0]])
    # m = 1/2 - 1 = -1/2 and 3/4, corrected by 4/3: -2/3 and 1; S = 8 and 2; E = (4/9)/8 = 1/18 and 1/2.
    assert state.excess_risk.tolist() == pytest.approx([1 / 18, 1 / 2])
    ratio = math.exp(2 * (1 / 18 - 1 / 2))
    assert (state.task_weights[0] / state.task_weights[1]).item() == pytest.approx(ratio)


def test_baseline_is_the_mean_over_the_warmup_and_weights_rest_meanwhile():
    layout, options = ParamLayout([1]), StepOptions(fisher="linear", eps=1e-30, num_warmup_steps=3)
    state = init_state(1, layout, dtype=torch.float64)
    for gradient in (1.0, 1.0, 1.0):
        step(state, layout, options, [[gradient]])
    assert state.baseline_excess_risk.item() == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert state.task_weights.tolist() == [1.0]


def test_zero_baseline_is_set_at_the_first_gradient():
    layout, options = (
        ParamLayout([1]),
        StepOptions(fisher="linear", eps=1e-30, robust_step_size=1.0),
    )
    state = init_state(2, layout, dtype=torch.float64)
    step(state, layout, options, [[0.0], [1.0]])
    step(state, layout, options, [[0.0], [1.0]])
    assert state.baseline_excess_risk.tolist() == [0.0, 1.0]
    assert state.relative_excess_risk.tolist() == pytest.approx([0.0, 0.5])
    step(state, layout, options, [[5.0], [1.0]])
    assert state.baseline_excess_risk.tolist() == pytest.approx([1.0, 1.0])
    assert state.relative_excess_risk.tolist() == pytest.approx([1.0, 1 / 3])


def test_raw_risk_of_the_linear_fisher_is_divided_by_the_number_of_parameters():
    layout, options = ParamLayout([4]), StepOptions(fisher="linear", eps=1e-30, relative=False)
    state = init_state(1, layout, dtype=torch.float64)
    step(state, layout, options, [[1.0, 2.0, 3.0, 0.0]])
    assert state.excess_risk.item() == pytest.approx(3)
    assert state.relative_excess_risk.item() == pytest.approx(3 / 4)


def published_loop(streams: list[Tensor], robust_step_size: float) -> list[Tensor]:
    """The published algorithm as the authors' code runs it: weights sum to T, float32, exp of the scaled ratio."""
    num_tasks = streams[0].shape[0]
    weights, sums, baseline = torch.ones(num_tasks), torch.zeros_like(streams[0]), None
    history = []
    for grads in streams:
        sums = sums + grads**2
        risk = (grads**2 / (sums + 1e-7).sqrt()).sum(1)
        if baseline is None:
            baseline = risk
        else:
            weights = weights * (robust_step_size * risk / baseline).exp()
            weights = weights / weights.sum() * num_tasks
        history.append(weights)
    return history


@pytest.mark.parametrize("scale", [1.0, 1e-3, 30.0])
def test_official_preset_follows_the_published_loop(scale):
    generator = torch.Generator().manual_seed(1)
    streams = [
        torch.randn(3, 200, generator=generator)
        * scale
        * torch.tensor([[1.0], [2.0], [0.5]])
        / (1 + t) ** 0.5
        for t in range(300)
    ]
    balancer = ExcessMTL.from_preset("official", num_tasks=3, robust_step_size=0.1)
    for grads, expected in zip(streams, published_loop(streams, 0.1), strict=True):
        weights = balancer.update_weights(grads)
        torch.testing.assert_close(weights.float(), expected, rtol=1e-5, atol=1e-7)
    assert (balancer.task_weights - 1).abs().max() > 0.01  # they did move
