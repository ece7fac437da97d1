"""reference.py against fractions worked out by hand and as a fallback; the official preset against its loop."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from _asserts import assert_states_close
from _inputs import make_task_grads
from torch import Tensor

from excessmtl_ext import ExcessMTL, _extension, reference
from excessmtl_ext import functional as F
from excessmtl_ext.functional import ParamLayout, StepOptions, init_state


def step(state, layout, options, grads):
    reference.fused_step_(
        [torch.tensor(g, dtype=torch.float64) for g in grads], layout, state, options
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


# ---- where it takes the place of the compiled ops

needs_ops = pytest.mark.skipif(
    not _extension.ops_available, reason=f"no compiled ops: {_extension.unavailable_reason}"
)
NUMELS = [40, 9]
LAYOUT = ParamLayout(NUMELS)
OPTIONS = StepOptions(gradient_momentum=0.9, robust_step_size=0.3)


def expectation_of(error: Exception) -> str:
    """What an error expected; what it got instead, C++ and Python print in their own way."""
    return str(error).partition("Expected")[2].partition(", but got")[0]


@needs_ops
@pytest.mark.parametrize(
    "damage",
    [
        lambda grads: grads[:-1],
        lambda grads: [*grads[:-1], grads[-1][:-1]],
        lambda grads: [grads[0].int(), *grads[1:]],
        lambda grads: [grads[0].double(), *grads[1:]],
    ],
    ids=["one is missing", "one is too short", "integers", "wider than the state"],
)
def test_gradients_are_refused_in_the_words_of_the_ops(
    damage: Callable[[list[Tensor]], list[Tensor]],
) -> None:
    messages = []
    for ops in (F, reference):
        state = init_state(2, LAYOUT, has_momentum=True)
        with pytest.raises(RuntimeError) as caught:
            ops.fused_step_(damage(make_task_grads(2, NUMELS)), LAYOUT, state, OPTIONS)
        messages.append(expectation_of(caught.value))
        assert int(state.num_steps) == 0
    assert messages[0] == messages[1] != ""


@needs_ops
def test_rows_of_bfloat16_state_without_their_step_are_refused_in_the_words_of_the_ops() -> None:
    messages = []
    for ops in (F, reference):
        state = init_state(2, LAYOUT, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError) as caught:
            ops.accumulate_excess_risk_(
                make_task_grads(2, NUMELS), LAYOUT, state.sq_grad_sum, state.grad_mean,
                state.excess_risk, state.ticket, StepOptions(),
            )  # fmt: skip
        messages.append(expectation_of(caught.value))
    assert messages[0] == messages[1] != ""


@needs_ops
def test_a_skipped_step_under_a_scaler_is_skipped_as_by_the_op() -> None:
    states = [init_state(2, LAYOUT, has_momentum=True) for _ in range(2)]
    scale = torch.tensor([1024.0])
    for number in range(3):
        torch.manual_seed(number)
        grads = [grad * scale for grad in make_task_grads(2, NUMELS)]
        if number == 1:
            grads[2][5] = float("inf")
        outputs = []
        for ops, state in zip((F, reference), states, strict=True):
            before = state.sq_grad_sum.clone()
            ops.fused_step_(grads, LAYOUT, state, OPTIONS, scale)
            outputs.append([torch.zeros(numel) for numel in NUMELS])
            ops.combine_(grads, outputs[-1], LAYOUT, state, OPTIONS, scale)
            if number == 1:
                assert all(bool(output.isnan().all()) for output in outputs[-1])
                assert torch.equal(state.sq_grad_sum, before)
        torch.testing.assert_close(outputs[0], outputs[1], equal_nan=True)
        assert_states_close(*states, rtol=1e-5, atol=1e-6)
    assert int(states[1].num_skipped_steps) == 1
