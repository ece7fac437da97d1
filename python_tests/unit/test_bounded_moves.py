"""Bounded moves, the default weights of ExcessMTL: values by hand, units, rare and late tasks, bounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from excessmtl_ext import ExcessMTL, bounded_moves, functional

KAPPA = 0.2


def stream(
    steps: int, num_tasks: int, seed: int = 0, numel: int = 400, signal: float = 0.5
) -> Tensor:
    """[steps, T, P]: gradients of tasks that are alike, a mean and variance."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(num_tasks, numel, generator=generator) * signal
    return means + torch.randn(steps, num_tasks, numel, generator=generator)


def fading(steps: int, learned: Tensor, seed: int = 1, numel: int = 300) -> Tensor:
    """[steps, T, P]: like tasks whose signal fades with the steps in which each was learned, ``learned`` [steps, T]."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(learned.shape[1], numel, generator=generator)
    signal = torch.exp(-learned / 60.0)[:, :, None] * means
    return signal + torch.randn(signal.shape, generator=generator)


def weights_of(grads: Tensor, present: Tensor | None = None, **options) -> Tensor:
    """[steps, T]; ``present`` [steps, T] bool."""
    balancer = ExcessMTL(num_tasks=grads.shape[1], **options)
    weights = []
    for step, rows in enumerate(grads):
        given = [
            [row] if present is None or bool(present[step, task]) else []
            for task, row in enumerate(rows)
        ]
        weights.append(balancer.update_weights(given).clone())
    return torch.stack(weights)


# ---- values by hand


def test_three_steps_by_hand():
    """b = 1/2. Task 0: g = 2 in each step. Task 1: 2, -2, 2."""
    balancer = ExcessMTL(num_tasks=2, gradient_momentum=0.5)
    tasks = ([2.0, 2.0, 2.0], [2.0, -2.0, 2.0])
    for step in range(3):
        weights = balancer.update_weights([[torch.tensor([task[step]])] for task in tasks])
        assert weights.tolist() == pytest.approx([0.5, 0.5], abs=0.005)
    # Step 2: m = 1.5 or -0.5 of mass 3/4: t E / P = 2 * m^2 / (9/16) / 8 = 1 or 1/9; c = (5/16) / (9/16) = 5/9, so
    # q = 1 or (1/9 - 5/9) / (4/9) = -1, cut to 0. Step 3: m = 1.75 or 0.75 of mass 7/8, t E / P = 1 or 9/49, c = 3/7.
    assert balancer.risk_share_sum.tolist() == pytest.approx([2.0, 0.0], abs=1e-6)
    # Step 3 weighs with A = (1, 0) of step 2: R = (1, 1 - 3/150).
    assert balancer.relative_excess_risk.tolist() == pytest.approx([1.0, 0.98], rel=1e-8)
    ratio = float(weights[0] / weights[1])
    assert math.log(ratio) == pytest.approx(KAPPA * 0.02, rel=1e-6)


def test_the_share_of_a_constant_gradient_is_one_and_of_variance_about_zero():
    generator = torch.Generator().manual_seed(0)
    balancer = ExcessMTL(num_tasks=2)
    constant = torch.randn(4000, generator=generator)
    for _ in range(400):
        balancer.update_weights([[constant], [torch.randn(4000, generator=generator)]])
    of_signal, of_variance = balancer.risk_share_sum.tolist()
    assert of_signal == pytest.approx(399, rel=1e-3)  # none in the first step
    assert of_variance < 1.0
    weights = balancer.task_weights
    assert math.log(weights[0] / weights[1]) == pytest.approx(KAPPA, abs=0.01)


def test_max_log_ratio_bounds_the_weights_and_zero_makes_them_equal():
    grads = stream(300, 2, signal=0.0)
    grads[:, 0] += 1.0
    for ratio in (0.0, 0.3, 2.0):
        log_weights = weights_of(grads, max_log_ratio=ratio).log()
        gaps = (log_weights[:, 0] - log_weights[:, 1]).abs()
        assert float(gaps.max()) <= ratio + 1e-12
        assert float(gaps[-1]) == pytest.approx(ratio, rel=0.1)


def test_the_warm_up_has_the_weights_of_the_priorities():
    weights = weights_of(stream(20, 3), num_warmup_steps=15, priorities=(1, 2, 5))
    assert torch.allclose(weights[:15], torch.tensor([0.125, 0.25, 0.625]).double())


# ---- units


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e6, 1e12])
@pytest.mark.parametrize("scaled", ["one", "all"])
def test_no_unit_of_a_loss_decides(factor, scaled):
    grads = stream(250, 3, numel=64)
    other = grads.clone()
    other[:, slice(None) if scaled == "all" else 1] *= factor
    torch.testing.assert_close(weights_of(other), weights_of(grads), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [
        (torch.float32, 2.0**-40),
        (torch.float32, 2.0**40),
        (torch.bfloat16, 2.0**-40),
        (torch.bfloat16, 2.0**40),
        (torch.float16, 2.0**-6),
        (torch.float16, 2.0**10),
    ],
    ids=str,
)
def test_no_power_of_two_changes_more_than_rounding_in_any_dtype(dtype, factor):
    grads = stream(200, 2, numel=64).to(dtype)
    if (
        dtype == torch.float16
    ):  # no subnormals: what the gradient itself loses is none of the weights'
        grads = torch.where(grads.abs() < 2.0**-6, 2.0**-6, grads)
    scaled = grads.clone()
    scaled[:, 0] *= factor
    torch.testing.assert_close(weights_of(scaled), weights_of(grads), rtol=1e-6, atol=1e-7)


# ---- tasks that are rare, late, or drawn one per batch


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_a_rare_task_like_the_others_keeps_its_weight_while_gradients_fade(share):
    """Signal fades as a task is learned: with its own steps, as those alone train its head."""
    generator = torch.Generator().manual_seed(1)
    steps = 1500
    present = torch.ones(steps, 3, dtype=torch.bool)
    present[:, 0] = torch.rand(steps, generator=generator) < share
    weights = weights_of(fading(steps, present.cumsum(0)), present)
    assert float((weights - 1 / 3).abs().max()) < 0.05


@pytest.mark.parametrize("how", ["absent", "zeros"])
def test_a_late_task_gets_the_weight_it_would_have_had(how):
    steps, late = 900, 400
    own = torch.arange(steps)[:, None].expand(-1, 2).clone()
    own[:, 1] = (own[:, 1] - late).clamp(min=0)
    grads = fading(steps, own)
    present = torch.ones(steps, 2, dtype=torch.bool)
    if how == "absent":
        present[:late, 1] = False
    else:
        grads[:late, 1] = 0.0  # 0 * loss
    weights = weights_of(grads, present)
    assert float((weights - 0.5).abs().max()) < 0.05


def test_zero_gradients_in_between_change_no_weight():
    """0 * loss and None are the same batch without labels."""
    grads = stream(300, 2, numel=200)
    present = torch.ones(300, 2, dtype=torch.bool)
    present[1::3, 0] = False
    zeros = grads.clone()
    zeros[~present] = 0.0
    absent, zero = weights_of(grads, present), weights_of(zeros)
    # m fades in a batch of zeros, so that older gradients have smaller shares in it: a slightly other mean.
    torch.testing.assert_close(zero, absent, rtol=0.0, atol=0.01)


@pytest.mark.parametrize("draw", ["round robin", "6:3:1"])
def test_one_task_per_batch_keeps_equal_weights(draw):
    generator = torch.Generator().manual_seed(3)
    steps = 1200
    shares = torch.tensor([6.0, 3.0, 1.0])
    tasks = torch.arange(steps) % 3
    if draw == "6:3:1":
        tasks = torch.multinomial(shares, steps, replacement=True, generator=generator)
    present = torch.nn.functional.one_hot(tasks, 3).bool()
    grads = fading(steps, present.cumsum(0))
    assert float((weights_of(grads, present) - 1 / 3).abs().max()) < 0.05


# ---- no batch decides, nothing collapses


@pytest.mark.parametrize("at", [60, 300])
def test_a_single_outlier_does_not_decide(at):
    grads = fading(500, torch.arange(500)[:, None].expand(-1, 2))
    outlier = grads.clone()
    outlier[at, 0] *= 1e5
    difference = (weights_of(outlier) - weights_of(grads)).abs()
    assert float(difference[: at + 1].max()) < 1e-9  # a step weighs with what was known before it
    assert float(difference.max()) < 0.1


def test_the_first_batch_does_not_decide():
    """After 200 steps the weights are those of a run with another first batch."""
    grads = stream(400, 2)
    other = grads.clone()
    other[0] = stream(1, 2, seed=9)[0]
    difference = (weights_of(other) - weights_of(grads))[200:].abs()
    assert float(difference.max()) < 0.005


@pytest.mark.slow
def test_weights_stay_within_their_bounds_over_20_000_steps():
    generator = torch.Generator().manual_seed(4)
    balancer = ExcessMTL(num_tasks=3)
    mean = torch.randn(16, generator=generator)
    least = 1.0
    for step in range(20_000):
        noise = torch.randn(3, 16, generator=generator)
        rows = torch.stack([mean + 0.1 * noise[0], noise[1], 1e3 * noise[2] / (1 + step)])
        weights = balancer.update_weights(rows)
        if step % 500 == 499:
            least = min(least, float(weights.min()))
            assert float((weights.max() / weights.min()).log()) <= KAPPA + 1e-9
    assert least > 1 / (1 + 2 * math.exp(KAPPA)) - 1e-9


# ---- priorities and floors


@pytest.mark.parametrize("step_size", [None, 0.01])
@pytest.mark.parametrize(
    ("floors", "want"), [(0.1, [0.52, 0.24, 0.24]), ((0.0, 0.0, 0.5), [0.3, 0.1, 0.6])]
)
def test_the_first_weights_have_their_floors(step_size, floors, want):
    balancer = ExcessMTL(
        num_tasks=3, priorities=(6, 2, 2), min_weight=floors, robust_step_size=step_size
    )
    assert balancer.task_weights.tolist() == pytest.approx(want)


def test_the_weights_of_like_tasks_are_proportional_to_the_priorities():
    grads = stream(400, 1).expand(-1, 3, -1)
    for options in ({}, {"robust_step_size": 0.5}):
        weights = weights_of(grads, priorities=(3, 1, 1), **options)
        torch.testing.assert_close(
            weights, torch.tensor([0.6, 0.2, 0.2]).double().expand_as(weights)
        )


@pytest.mark.parametrize("options", [{}, {"robust_step_size": 1.0}], ids=["bounded", "mirror"])
def test_floors_of_each_task_are_mixed_in(options):
    grads = stream(200, 3)
    grads[:, 0] += 1.0
    floors = torch.tensor([0.1, 0.3, 0.0]).double()
    without = weights_of(grads, **options)
    weights = weights_of(grads, min_weight=(0.1, 0.3, 0.0), **options)
    torch.testing.assert_close(weights, 0.6 * without + floors)
    same = weights_of(grads, min_weight=(0.1, 0.1, 0.1), **options)
    torch.testing.assert_close(same, weights_of(grads, min_weight=0.1, **options))


# ---- steps that do not count


def test_a_step_that_is_not_finite_changes_nothing():
    grads = stream(30, 2)
    balancer = ExcessMTL(num_tasks=2)
    for rows in grads[:-1]:
        balancer.update_weights(rows)
    before = {
        name: value.clone() for name, value in balancer.state_dict().items() if "extra" not in name
    }
    bad = grads[-1].clone()
    bad[1, 3] = float("inf")
    balancer.update_weights(bad)
    assert int(balancer.num_skipped_steps) == 1
    for name, value in before.items():
        if name not in ("num_skipped_steps", "found_nonfinite", "sq_grad_sum", "grad_mean"):
            assert torch.equal(value, balancer.state_dict()[name]), name


def test_bfloat16_state_gives_the_weights_of_float32_state():
    grads = stream(300, 2, numel=2000)
    grads[:, 1] += 0.5
    narrow = weights_of(grads, state_dtype=torch.bfloat16)
    assert float((narrow - weights_of(grads)).abs().max()) < 0.01


def test_relative_risks_are_one_before_anything_is_known():
    move = functional.init_move_state(3, 1)
    assert bounded_moves.relative_risks(move).tolist() == [1.0, 1.0, 1.0]


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "sqrt"}, "`fisher` 'linear' with robust_step_size=None, but got 'sqrt'"),
        ({"gradient_momentum": 0.0}, "`gradient_momentum` above 0 with robust_step_size=None"),
        ({"relative": False}, "`relative` True with robust_step_size=None"),
        ({"max_log_ratio": -1.0}, "`max_log_ratio` >= 0 and finite, but got -1.0"),
        ({"max_log_ratio": float("nan")}, "`max_log_ratio` >= 0 and finite, but got nan"),
        ({"priorities": (1, 2)}, "`priorities` to hold 3 numbers, one per task, but got 2"),
        ({"priorities": (1, 0, 2)}, "`priorities` > 0 and finite"),
        ({"min_weight": (0.5, 0.5, 0.5)}, "sum to 1 at most"),
        ({"min_weight": (0.5, -0.5, 0.5)}, "`min_weight` of numbers >= 0"),
        ({"combine": "mean"}, "`combine` to be one of 'per_tensor', 'sum', but got 'mean'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ExcessMTL(num_tasks=3, **options)


def test_the_default_is_the_recommended_preset():
    assert repr(ExcessMTL(num_tasks=2)) == repr(ExcessMTL.from_preset("recommended", num_tasks=2))
    options = {
        "priorities": (2, 1),
        "min_weight": (0.1, 0.0),
        "combine": "sum",
        "max_log_ratio": 1.0,
    }
    balancer = ExcessMTL(num_tasks=2, **options)
    assert repr(eval(repr(balancer), {"ExcessMTL": ExcessMTL})) == repr(balancer)
