"""Weights within bounds and gradients at one size, natively: by hand, against the twin in float64, and part by part."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from _asserts import assert_equal_bits
from torch import Tensor

from excessmtl_ext import _extension, op_calls, reference
from excessmtl_ext import functional as F
from excessmtl_ext.functional import (
    SMALLEST_EPS,
    MoveOptions,
    MoveState,
    ParamLayout,
    StepOptions,
    StepState,
    init_move_state,
    init_state,
)

pytestmark = pytest.mark.skipif(
    not _extension.ops_available, reason=f"no compiled ops: {_extension.unavailable_reason}"
)

LINEAR = StepOptions(fisher="linear", eps=SMALLEST_EPS, gradient_momentum=0.9, robust_step_size=0.5)
MOVES = {
    "default": MoveOptions(0.7, True),
    "sum": MoveOptions(0.7, False),
    "mirror": MoveOptions(None, True),
    "floors": MoveOptions(0.7, True, True),
    "mirror_floors": MoveOptions(None, False, True),
}
# Within a chunk of the CPU loops, over several, empty, and shorter than a vector.
NUMELS = [5, 64, 40_000, 0, 3, 1_000, 17_000]
NUM_TASKS = 3


def states(dtype: torch.dtype = torch.float32, floors: bool = False) -> tuple[StepState, MoveState]:
    layout = ParamLayout(NUMELS)
    chosen = (0.1, 0.2, 0.0) if floors else None
    move = init_move_state(NUM_TASKS, len(NUMELS), (1, 2, 3), floors=chosen)
    return init_state(NUM_TASKS, layout, dtype=dtype, has_momentum=True), move


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Signal and noise, sizes far apart; without some tensors in step 1, without task 1 in step 2."""
    generator = torch.Generator().manual_seed(step)
    grads = [
        ((torch.randn(n, generator=generator) + task) * 10.0 ** (task - 1)).to(dtype)
        for task in range(NUM_TASKS)
        for n in NUMELS
    ]
    if step == 1:
        grads[0] = grads[9] = torch.empty(0)
    if step == 2:
        grads[len(NUMELS) : 2 * len(NUMELS)] = [torch.empty(0)] * len(NUMELS)
    return grads


def assert_close(left: StepState | MoveState, right: StepState | MoveState, rtol: float) -> None:
    """Relative to the largest number of each tensor, of shares to 1: a difference has lost digits."""
    for name, a, b in zip(left._fields, left, right, strict=True):
        if b.numel() == 0:
            continue
        largest = max(float(b.double().abs().max()), 1.0 if name == "risk_share_sum" else 0.0)
        worst = float((a.double() - b.double()).abs().max())
        assert worst <= rtol * largest, f"{name}: off by {worst} of {largest}"


@pytest.mark.parametrize("ops", [reference, F], ids=["reference", "compiled"])
def test_three_steps_by_hand(ops):
    """b = 1/2, equal priorities. Task 0: g = (2), (1, -1). Task 1: (1), (3, 3), with -1 in step 2.

    Mean squares n: 4 and 1; 1 and 9, in each step. Factors: the weight, times sqrt(4 / 1) or sqrt(9 / 1) where smaller.
    Step 2, mass 3/4, c = (5/16) / (9/16) = 5/9: E = 3 * 1.5^2 / 8 = 27/32 and 1/32 + 2 * 9/32 = 19/32, so
    2 E / (9/16) / 3 = 1 and 19/27, and q = 1 and (19/27 - 15/27) / (12/27) = 1/3.
    """
    layout = ParamLayout([1, 2])
    options = LINEAR._replace(gradient_momentum=0.5)
    state, move = init_state(2, layout, has_momentum=True), init_move_state(2, 2)
    outputs = [torch.zeros(1), torch.zeros(2)]
    for sign in (1.0, -1.0, 1.0):
        grads = [torch.tensor(g) for g in ([2.0], [1.0, -1.0], [sign], [3.0, 3.0])]
        ops.fused_step_combine_(
            grads, outputs, layout, state, options, move=move, moves=MOVES["default"]
        )
        if int(state.num_steps) < 3:
            assert state.task_weights.tolist() == [0.5, 0.5]
            expected = torch.tensor([[0.5, 1.5], [1.0, 0.5]]).double()
            torch.testing.assert_close(move.tensor_weights, expected, rtol=1e-6, atol=0.0)
            # 0.5 * 2 + 1 * (+-1); 1.5 * (1, -1) + 0.5 * (3, 3)
            torch.testing.assert_close(outputs[0], torch.tensor([1.0 + sign]))
            torch.testing.assert_close(outputs[1], torch.tensor([3.0, 0.0]))
        if int(state.num_steps) == 1:
            assert state.excess_risk.tolist() == pytest.approx([3.0, 3.0], rel=1e-6)
            assert move.risk_share_sum.tolist() == [0.0, 0.0]
        if int(state.num_steps) == 2:
            assert move.risk_share_sum.tolist() == pytest.approx([1.0, 1 / 3], rel=1e-5)
    # Step 3 weighs with A = (1, 1/3): R = 1 and 1 + (1/3 - 1) * 3/150.
    assert state.relative_excess_risk.tolist() == pytest.approx([1.0, 1 - 1 / 75], rel=1e-6)
    log_ratio = float(state.task_weights[0] / state.task_weights[1])
    assert math.log(log_ratio) == pytest.approx(0.7 / 75, rel=1e-4)
    assert move.num_gradient_steps.tolist() == [3, 3]
    assert move.num_tensor_steps.tolist() == [[3, 3], [3, 3]]
    assert move.momentum_mass.tolist() == [7 / 8, 7 / 8]
    assert move.momentum_sq_mass.tolist() == [21 / 64, 21 / 64]


@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_steps_equal_the_twin_in_float64(moves, dtype):
    layout, rtol = ParamLayout(NUMELS), 1e-11 if dtype == torch.float64 else 3e-6
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state, move = states(wide, moves.has_floors)
    expected, expected_move = states(torch.float64, moves.has_floors)
    scale = torch.tensor(64.0)
    for step in range(5):
        grads = [scale.to(grad) * grad for grad in gradients(step, dtype)]
        outputs = [torch.zeros(n, dtype=wide) for n in NUMELS]
        wanted = [torch.zeros(n, dtype=torch.float64) for n in NUMELS]
        F.fused_step_combine_(grads, outputs, layout, state, LINEAR, scale, move=move, moves=moves)
        reference.fused_step_combine_(
            [grad.double() for grad in grads], wanted, layout, expected, LINEAR, scale,
            move=expected_move, moves=moves,
        )  # fmt: skip
        assert_close(state, expected, rtol)
        assert_close(move, expected_move, rtol)
        for output, want in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(output.double(), want, rtol=1e-5, atol=1e-5 * 64)


@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)
def test_the_parts_give_the_bits_of_the_whole(moves):
    layout = ParamLayout(NUMELS)
    (whole, whole_move), (parts, parts_move) = states(), states()
    for step in range(4):
        grads = gradients(step)
        results = [[torch.zeros(n) for n in NUMELS] for _ in range(2)]
        F.fused_step_combine_(
            grads, results[0], layout, whole, LINEAR, move=whole_move, moves=moves
        )
        sums, squares = (
            torch.zeros_like(parts.excess_risk),
            torch.zeros(NUM_TASKS, len(NUMELS)).double(),
        )
        F.accumulate_excess_risk_(
            grads, layout, parts.sq_grad_sum, parts.grad_mean, sums, parts.ticket, LINEAR,
            square_sums=squares,
        )  # fmt: skip
        tasks = [0, 2] if step == 2 else [0, 1, 2]
        F.commit_step_(sums, squares, tasks, layout, parts, LINEAR, move=parts_move, moves=moves)
        weights = parts_move.tensor_weights if moves.per_tensor else parts.task_weights
        F.combine_(grads, results[1], layout, parts, LINEAR, weights=weights)
        assert_equal_bits([*parts, *parts_move, *results[1]], [*whole, *whole_move, *results[0]])


@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)
def test_a_step_that_is_not_finite_is_counted_and_changes_nothing_else(moves):
    layout = ParamLayout(NUMELS)
    state, move = states()
    F.fused_step_(gradients(0), layout, state, LINEAR, move=move, moves=moves)
    before = [tensor.clone() for tensor in (*state[2:7], *move)]
    grads = gradients(3)
    grads[2][100] = float("nan")
    F.fused_step_(grads, layout, state, LINEAR, move=move, moves=moves)
    assert_equal_bits([*state[2:7], *move], before)
    assert (int(state.num_steps), int(state.num_skipped_steps)) == (1, 1)
    assert state.found_nonfinite.tolist() == [True, False, False]


def test_a_task_without_any_gradient_but_zeros_keeps_its_share_and_sizes():
    layout = ParamLayout(NUMELS)
    state, move = states()
    for step in (0, 3):
        F.fused_step_(gradients(step), layout, state, LINEAR, move=move, moves=MOVES["default"])
    share, sizes = float(move.risk_share_sum[1]), move.tensor_mean_square[1].clone()
    grads = gradients(4)
    grads[len(NUMELS) : 2 * len(NUMELS)] = [torch.zeros(n) for n in NUMELS]
    F.fused_step_(grads, layout, state, LINEAR, move=move, moves=MOVES["default"])
    assert float(move.risk_share_sum[1]) == share
    assert torch.equal(move.tensor_mean_square[1], sizes)
    assert move.num_gradient_steps.tolist() == [3, 2, 3]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_square_sums_are_those_of_float64_and_change_no_other_bit(dtype):
    layout = ParamLayout(NUMELS)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    (plain, _), (with_squares, _) = states(wide), states(wide)
    grads = gradients(1, dtype)
    squares = torch.full((NUM_TASKS, len(NUMELS)), 7.0).double()
    sums = [torch.zeros(NUM_TASKS).double() for _ in range(2)]
    for state, own_sums, own_squares in ((plain, sums[0], None), (with_squares, sums[1], squares)):
        F.accumulate_excess_risk_(
            grads, layout, state.sq_grad_sum, state.grad_mean, own_sums, state.ticket, LINEAR,
            square_sums=own_squares,
        )  # fmt: skip
    assert_equal_bits([*with_squares, sums[1]], [*plain, sums[0]])
    expected = torch.stack([grad.double().square().sum() for grad in grads]).view(NUM_TASKS, -1)
    torch.testing.assert_close(squares, expected, rtol=1e-6, atol=0.0)


def test_squares_beyond_float32_count_as_its_largest_number():
    layout = ParamLayout([40])
    state, squares = init_state(1, layout, has_momentum=True), torch.zeros(1, 1).double()
    sums = torch.zeros(1).double()
    F.accumulate_excess_risk_(
        [torch.full((40,), 1e19)], layout, state.sq_grad_sum, state.grad_mean, sums, state.ticket,
        LINEAR, square_sums=squares,
    )  # fmt: skip
    assert squares.item() == torch.finfo(torch.float32).max
    assert math.isfinite(sums.item())


@pytest.mark.slow
def test_equal_steps_give_equal_bits_for_any_number_of_threads():
    program = """
import hashlib, sys, torch
torch.set_num_threads(int(sys.argv[1]))
import test_commit_step as t
state, move = t.states()
for step in range(3):
    t.F.fused_step_(t.gradients(step), t.ParamLayout(t.NUMELS), state, t.LINEAR, move=move, moves=t.MOVES["default"])
print(hashlib.sha256(b"".join(x.numpy().tobytes() for x in (*state, *move))).hexdigest())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    digests = {
        subprocess.run(
            [sys.executable, "-c", program, threads], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for threads in ("1", "4")
    }  # fmt: skip
    assert len(digests) == 1


def test_one_task_after_the_other_takes_in_what_all_at_once_do():
    layout, moves = ParamLayout(NUMELS), MOVES["default"]
    (whole, whole_move), (streamed, streamed_move) = states(), states()
    num_tensors = len(NUMELS)
    for step in (0, 3, 4):
        grads = gradients(step)
        F.fused_step_(grads, layout, whole, LINEAR, move=whole_move, moves=moves)
        shares = torch.zeros(NUM_TASKS).double()
        streamed.found_nonfinite.zero_()
        for task in range(NUM_TASKS):
            row, sums = slice(task, task + 1), torch.zeros(NUM_TASKS).double()
            squares = torch.zeros(1, num_tensors).double()
            F.accumulate_excess_risk_(
                grads[task * num_tensors : (task + 1) * num_tensors], layout, streamed.sq_grad_sum[row],
                streamed.grad_mean[row], sums[row], streamed.ticket, LINEAR, square_sums=squares,
            )  # fmt: skip
            F.commit_step_(
                sums, squares, [task], layout, streamed, LINEAR, move=streamed_move, moves=moves,
                risk_share=shares, moves_weights=False,
            )  # fmt: skip
        F.commit_step_(
            None, None, [0, 1, 2], layout, streamed, LINEAR, move=streamed_move, moves=moves
        )
        streamed_move.risk_share_sum.add_(shares)
        assert_equal_bits(
            [*streamed, *streamed_move._replace(tensor_weights=whole_move.tensor_weights)],
            [*whole, *whole_move],
        )


# ---- weights per tensor in the sums


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_sum_with_weights_per_tensor_is_one_sum_per_tensor(accumulate):
    grads, layout = gradients(1), ParamLayout(NUMELS)
    weights = torch.rand(
        NUM_TASKS, len(NUMELS), generator=torch.Generator().manual_seed(0)
    ).double()
    outputs, expected = ([torch.ones(n) for n in NUMELS] for _ in range(2))
    F.weighted_sum_(grads, outputs, layout, weights, accumulate=accumulate)
    for index, output in enumerate(expected):
        column = weights[:, index].contiguous()
        own = ParamLayout([NUMELS[index]])
        F.weighted_sum_(grads[index :: len(NUMELS)], [output], own, column, accumulate=accumulate)
    assert_equal_bits(outputs, expected)
    wanted = [torch.ones(n) for n in NUMELS]
    reference.weighted_sum_(grads, wanted, layout, weights, accumulate=accumulate)
    for output, want in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(output, want)


def test_a_fold_with_log_weights_per_tensor_is_one_fold_per_tensor():
    layout = ParamLayout(NUMELS)
    sums = [torch.zeros(layout.padded_numel) for _ in range(3)]
    maxima = [torch.full((len(NUMELS),), -math.inf).double() for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    for task in range(NUM_TASKS):
        grads = gradients(1)[task * len(NUMELS) : (task + 1) * len(NUMELS)]
        log_weights = torch.randn(len(NUMELS), generator=generator).double()
        F.fold_(grads, layout, log_weights, sums[0], maxima[0])
        reference.fold_(grads, layout, log_weights, sums[1], maxima[1])
        start = 0
        for index, grad in enumerate(grads):
            own = ParamLayout([NUMELS[index]])
            part = sums[2][start : start + own.padded_numel]
            F.fold_([grad], own, log_weights[index], part, maxima[2][index])
            start += own.padded_numel
    assert_equal_bits([sums[0], maxima[0]], [sums[2], maxima[2]])
    torch.testing.assert_close(sums[0], sums[1])
    assert_equal_bits([maxima[0]], [maxima[1]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_mean_square": torch.zeros(3, 6).double()}, r"`tensor_mean_square` of shape \[3, 7\]"),
        ({"num_tensor_steps": torch.zeros(3, 7).double()}, "`num_tensor_steps` of Long"),
        ({"risk_share_sum": torch.zeros(2).double()}, "`risk_share_sum` to be contiguous with 3 elements"),
        ({"momentum_mass": None}, "`momentum_mass` with `risk_share_sum`, but got None"),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_before_anything_is_written(changes, message):
    layout = ParamLayout(NUMELS)
    state, move = states()
    before = [tensor.clone() for tensor in (*state, *move)]
    with pytest.raises(RuntimeError, match=message):
        F.fused_step_(
            gradients(0),
            layout,
            state,
            LINEAR,
            move=move._replace(**changes),
            moves=MOVES["default"],
        )
    assert_equal_bits([*state, *move], before)


def test_ops_composed_of_others_give_what_the_compiled_ones_give(monkeypatch):
    """What devices use whose ops know neither squares nor weights per tensor."""
    layout = ParamLayout(NUMELS)
    for moves in MOVES.values():
        (native, native_move), (composed, composed_move) = states(), states()
        for step in range(4):
            results = [[torch.zeros(n) for n in NUMELS] for _ in range(2)]
            pairs = ((native, native_move), (composed, composed_move))
            for on, outputs, (state, move) in zip((set(), {"cpu"}), results, pairs, strict=True):
                monkeypatch.setattr(op_calls, "COMPOSED_ON", on)
                F.fused_step_combine_(
                    gradients(step), outputs, layout, state, LINEAR, move=move, moves=moves
                )
            assert_close(composed, native, 1e-6)
            assert_close(composed_move, native_move, 1e-6)
            for left, right in zip(*results, strict=True):
                torch.testing.assert_close(left, right)
