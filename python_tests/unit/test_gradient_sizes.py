"""Task gradients brought to one size per tensor: values by hand, units of what is applied, all ways to take a step."""

from __future__ import annotations

import io
import math

import pytest
import torch
from _asserts import assert_equal_bits
from _inputs import make_problem
from torch import Tensor, nn

from excessmtl_ext import ExcessMTL, gradient_sizes
from excessmtl_ext.state import ParamLayout

UNITS = (1e3, 1e-3, 1.0)


def combined(balancer: ExcessMTL, shared: list[nn.Parameter], rows: list[list[Tensor]]) -> None:
    """A step in which task i has the gradients ``rows[i]``."""
    for parameter in shared:
        parameter.grad = None
    losses = [sum((p * g).sum() for p, g in zip(shared, row, strict=True)) for row in rows]
    balancer.backward(losses)


def test_the_sum_of_two_steps_by_hand():
    """Equal weights. Tensor 0: g = 3 and 1, then 3 and 5; tensor 1: equal sizes."""
    shared = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2))]
    balancer = ExcessMTL(shared, num_tasks=2, max_log_ratio=0.0)
    same = torch.tensor([1.0, -1.0])
    combined(balancer, shared, [[torch.tensor([3.0]), same], [torch.tensor([1.0]), 2 * same / 2]])
    assert shared[0].grad.item() == pytest.approx(
        0.5 * 3 + 0.5 * 3, rel=1e-6
    )  # 1 brought to size 3
    torch.testing.assert_close(shared[1].grad, same)  # equal sizes: the plain sum
    combined(balancer, shared, [[torch.tensor([3.0]), same], [torch.tensor([5.0]), same]])
    # n = 9 and (1 + 25) / 2 = 13: the larger one is 13.
    expected = 0.5 * 3 * (13 / 9) ** 0.5 + 0.5 * 5
    assert shared[0].grad.item() == pytest.approx(expected, rel=1e-6)
    expected_sizes = torch.tensor([[9.0, 1.0], [13.0, 1.0]]).double()
    torch.testing.assert_close(balancer.tensor_mean_square, expected_sizes, rtol=1e-6, atol=0.0)


def test_an_outlier_enters_at_ten_times_the_running_size():
    shared = [nn.Parameter(torch.zeros(4))]
    balancer = ExcessMTL(shared, num_tasks=2, max_log_ratio=0.0)
    one = torch.ones(4)
    for _ in range(100):
        combined(balancer, shared, [[one], [one]])
    combined(balancer, shared, [[1e5 * one], [one]])
    # x / 100 = 1e8 is more than n = 1 + 99 / 100, and the largest size is that n = 1.99.
    expected = 0.5 * 1e5 * (1.99 / 1e8) ** 0.5 + 0.5 * 1.99**0.5
    torch.testing.assert_close(shared[0].grad, expected * one)
    combined(balancer, shared, [[one], [one]])
    assert float(balancer.tensor_mean_square[0]) < 2.0


def test_equal_sizes_are_the_plain_sum():
    results = []
    for combine in ("sum", "per_tensor"):
        shared = [nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(3))]
        balancer = ExcessMTL(shared, num_tasks=3, combine=combine)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            signs = torch.randint(0, 2, (3, 11), generator=generator) * 2.0 - 1.0
            combined(balancer, shared, [[row[:8], row[8:]] for row in signs])
        results.append([p.grad for p in shared])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"update_every": 3},
        {"estimate_from": "features"},
        {"estimate_from": "last layer"},
        {"tasks_per_step": 1},
        {"robust_step_size": 0.5},
        {"head_weighting": "task_weights", "update_every": 2},
        {"min_weight": (0.1, 0.0, 0.3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("units", [UNITS, (1e-12, 1.0, 1e12)], ids=str)
def test_no_unit_of_a_loss_decides_what_is_applied(units, options):
    """Gradients of the shared parameters in units of the largest task, those of heads in their own."""

    def run(units: tuple[float, ...]) -> list[Tensor]:
        problem = make_problem(3)
        chosen = dict(options)
        if chosen.get("estimate_from") == "last layer":
            chosen["estimate_from"] = list(problem.encoder[2].parameters())
        balancer = ExcessMTL(problem.encoder.parameters(), num_tasks=3, **chosen)
        given = {"features": None}
        generator = torch.Generator().manual_seed(1)
        applied = []
        for _ in range(7):
            problem.inputs = torch.randn(problem.inputs.shape, generator=generator)
            problem.zero_grad()
            z = problem.encoder(problem.inputs)
            losses = [
                unit * (head(z).flatten() - problem.targets[..., task].flatten()).square().mean()
                for task, (unit, head) in enumerate(zip(units, problem.heads, strict=True))
            ]
            given["features"] = z if chosen.get("estimate_from") == "features" else None
            balancer.backward(losses, **given)
            applied.append(balancer.task_weights.clone())
            for unit, head in zip(units, problem.heads, strict=True):
                applied += [p.grad / unit for p in head.parameters()]
            direction = torch.cat([p.grad.flatten() for p in problem.encoder.parameters()])
            applied.append(direction / direction.norm())
        return applied

    for left, right in zip(run(units), run((1.0, 1.0, 1.0)), strict=True):
        if left.dim() == 1 and left.numel() > 100:
            assert float(left @ right) > 0.8  # the largest sizes of each tensor are of other tasks
        else:
            torch.testing.assert_close(left.double(), right.double(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"update_every": 2}, {"min_weight": (0.1, 0.0, 0.3)}, {"min_weight": 0.1}],
    ids=str,
)
def test_a_streamed_step_equals_the_plain_one(options):
    results = []
    for streams in (False, True):
        problem = make_problem(3)
        balancer = ExcessMTL(problem.encoder.parameters(), num_tasks=3, **options)
        states = []
        for step in range(6):
            problem.zero_grad()
            losses = [
                task_unit * loss for task_unit, loss in zip(UNITS, problem.losses(), strict=True)
            ]
            tasks = [0, 2] if step == 3 else [0, 1, 2]
            if streams:
                for task in tasks:
                    balancer.accumulate(task, losses[task], retain_graph=True)
                balancer.finish()
            else:
                balancer.backward(
                    [loss if task in tasks else None for task, loss in enumerate(losses)]
                )
            states += [balancer.task_weights.clone(), balancer.tensor_mean_square.clone()]
            states += [p.grad.clone() for p in problem.encoder.parameters()]
        results.append(states)
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_a_gradient_of_zeros_says_nothing_of_the_size():
    mean_square, steps = torch.zeros(1, 2).double(), torch.zeros(1, 2).long()
    for now in ([4.0, 0.0], [0.0, 0.0], [8.0, 2.0]):
        gradient_sizes.update_sizes_(
            mean_square, steps, torch.tensor([now]).double(), torch.tensor(True)
        )
    assert mean_square.tolist() == [[6.0, 2.0]]
    assert steps.tolist() == [[2, 1]]


def test_a_loss_scale_is_no_size():
    grads = [torch.randn(5), torch.randn(7)]
    plain = gradient_sizes.sums_of_squares(grads, 2, None)
    scaled = gradient_sizes.sums_of_squares([g * 1024 for g in grads], 2, torch.tensor(1024.0))
    torch.testing.assert_close(scaled, plain)
    assert plain[0, 0].item() == pytest.approx(grads[0].double().square().sum().item(), rel=1e-6)


def test_a_nonfinite_gradient_leaves_nan_and_the_sizes():
    shared = [nn.Parameter(torch.zeros(2))]
    balancer = ExcessMTL(shared, num_tasks=2)
    one = torch.ones(2)
    combined(balancer, shared, [[one], [2 * one]])
    combined(balancer, shared, [[one], [one * float("nan")]])
    assert bool(shared[0].grad.isnan().all())
    assert balancer.tensor_mean_square.flatten().tolist() == pytest.approx([1.0, 4.0], rel=1e-6)
    assert int(balancer.num_skipped_steps) == 1
    combined(balancer, shared, [[one], [2 * one]])
    assert bool(shared[0].grad.isfinite().all())


def test_a_state_without_the_new_entries_loads_and_starts_them_fresh():
    problem = make_problem(3)
    balancer = ExcessMTL(problem.encoder.parameters(), num_tasks=3)
    for _ in range(3):
        balancer.backward(problem.losses())
    file = io.BytesIO()
    state = balancer.state_dict()
    torch.save(
        {name: value for name, value in state.items() if name in (
            "sq_grad_sum", "grad_mean", "excess_risk", "relative_excess_risk", "baseline_excess_risk",
            "log_task_weights", "task_weights", "num_steps", "num_task_steps", "num_skipped_steps",
            "found_nonfinite")}
        | {"_extra_state": {"version": 1, "num_calls": 3, "param_numels": list(balancer.layout.numels)}},
        file,
    )  # fmt: skip
    file.seek(0)
    other = ExcessMTL(problem.encoder.parameters(), num_tasks=3)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.sq_grad_sum, balancer.sq_grad_sum)
    assert not bool(other.risk_share_sum.any())
    other.backward(problem.losses())
    assert int(other.num_steps) == 4


@pytest.mark.parametrize(
    ("squares", "steps"),
    [
        ([2.0, 0.5, 1e-30], [3, 1, 7]),
        ([2.0, 0.0, 0.7], [3, 0, 7]),
        ([0.0, 0.0, 0.0], [0, 0, 0]),
        ([2.0, math.inf, 0.3], [3, 1, 7]),
        ([2.0, math.nan, 0.0], [3, 1, 0]),
        ([1e300, 1e-300, 1e308], [3, 1, 2]),
    ],
)
def test_one_tensor_gives_the_bits_of_several(squares, steps):
    """A second tensor without elements takes the road of several and adds nothing."""
    one = torch.tensor(squares, dtype=torch.float64)[:, None]
    counts = torch.tensor(steps)[:, None]
    found = gradient_sizes.pass_ratios(one, counts, ParamLayout([77]))
    expected = gradient_sizes.pass_ratios(
        torch.cat([one, torch.zeros_like(one)], dim=1),
        torch.cat([counts, torch.zeros_like(counts)], dim=1),
        ParamLayout([77, 0]),
    )
    assert_equal_bits([found], [expected])
