"""State in bfloat16: the rounding itself, the ops against their twin, and what becomes of long sums."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from _asserts import assert_equal_bits
from _inputs import PARAM_NUMELS, make_problem, make_task_grads
from _published import published

from excessmtl_ext import ExcessMTL, _extension, reference
from excessmtl_ext import functional as F
from excessmtl_ext.functional import ParamLayout, StepOptions, StepState, init_state
from excessmtl_ext.op_arguments import op_arguments
from excessmtl_ext.stochastic_rounding import rounding_words, stochastically_rounded

needs_ops = pytest.mark.skipif(
    not _extension.ops_available, reason=f"no compiled ops: {_extension.unavailable_reason}"
)

BFLOAT16_MAX = torch.finfo(torch.bfloat16).max
ALL_RANDOM_BITS = torch.arange(2**16)
# Few digits: with bfloat16 gradients float32 arithmetic rounds at most once, fused multiply-add or not, so that op and
# twin compute the same float32 and every stored bit can be compared.
EXACT_MOMENTUM = 0.5
OPTIONS = {
    "sqrt": StepOptions(robust_step_size=0.3, rounding_seed=5),
    "linear": StepOptions(fisher="linear", robust_step_size=0.3, rounding_seed=6),
    "momentum": StepOptions(gradient_momentum=EXACT_MOMENTUM, robust_step_size=0.3),
}


def bfloat16_state(num_tasks, layout, options, device="cpu") -> StepState:
    return init_state(
        num_tasks,
        layout,
        dtype=torch.bfloat16,
        device=device,
        has_momentum=options.gradient_momentum > 0,
    )


def rounded_to_nearest(values: torch.Tensor) -> torch.Tensor:
    return values.bfloat16().float()


# ---- the rounding


@pytest.mark.parametrize(
    "value", [1.0, 1.00390625, 1 + 2**-23, 255.999, -0.3, 1e-30, -7e37, 3.3895e38, 1e-40, 0.0]
)
def test_mean_over_all_random_bits_is_the_number_itself(value):
    number = torch.tensor(value, dtype=torch.float32)
    rounded = stochastically_rounded(number.expand(2**16), ALL_RANDOM_BITS)
    assert rounded.double().mean().item() == number.double().item()
    assert rounded.unique().numel() <= 2


def test_nothing_finite_becomes_infinite_and_the_rest_stays_what_it_is():
    largest = torch.finfo(torch.float32).max
    for value in (largest, -largest, BFLOAT16_MAX):
        number = torch.tensor(value, dtype=torch.float32)
        rounded = stochastically_rounded(number.expand(2**16), ALL_RANDOM_BITS)
        assert rounded.abs().double().unique().tolist() == [BFLOAT16_MAX]
    infinite = torch.tensor([float("inf"), float("-inf")]).repeat_interleave(2**16)
    assert_equal_bits(
        [stochastically_rounded(infinite, ALL_RANDOM_BITS.repeat(2)).float()], [infinite]
    )
    nan_of_low_bits = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)
    nans = stochastically_rounded(nan_of_low_bits.expand(2**16), ALL_RANDOM_BITS)
    assert nans.isnan().all()


def test_random_bits_are_uniform_and_independent_of_neighbours_steps_and_tasks():
    """Four standard errors of n fair draws: one of these 100 comparisons fails in 160 if the bits were chance."""
    n = 2**16
    rows = {
        "seed 0": rounding_words(0, 10, 0, n),
        "seed 1": rounding_words(1, 10, 0, n),
        "next step": rounding_words(0, 11, 0, n),
        "next task": rounding_words(0, 10, 1, n),
    }
    rows["neighbour"] = rows["seed 0"].roll(1)
    bits = {name: (row[:, None] >> torch.arange(32) & 1).double() for name, row in rows.items()}
    for name, row in bits.items():
        off = (row.mean(0) - 0.5).abs() * 2 * n**0.5
        assert off.max() < 4.5, name
        if name != "seed 0":  # bit k of one with bit k of the other
            agree = (row == bits["seed 0"]).double().mean(0)
            assert ((agree - 0.5).abs() * 2 * n**0.5).max() < 4.5, name
    low, high = rows["seed 0"] & 0xFFFF, rows["seed 0"] >> 16
    correlation = torch.corrcoef(torch.stack([low, high]).double())[0, 1]
    assert correlation.abs() * n**0.5 < 4
    # An element's draws over the steps, which is what a sum averages.
    over_steps = torch.stack([rounding_words(0, step, 0, 8) for step in range(4096)])
    uniform = (over_steps & 0xFFFF).double() / 2**16
    assert ((uniform.mean(0) - 0.5).abs() * (12 * 4096) ** 0.5).max() < 4
    pairs = (uniform[1:] - 0.5) * (uniform[:-1] - 0.5) * 12
    assert (pairs.mean(0).abs() * 4095**0.5).max() < 4


# ---- the ops


@needs_ops
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("numels", PARAM_NUMELS.values(), ids=PARAM_NUMELS.keys())
def test_op_equals_the_reference_to_the_bit(numels, options, device):
    """Steps, a task without gradients, and a step with an infinity."""
    layout = ParamLayout(numels)
    state = bfloat16_state(3, layout, options, device)
    twin = bfloat16_state(3, layout, options)
    for step in range(5):
        grads = make_task_grads(3, numels, torch.bfloat16, device)
        if step == 1:
            grads[: len(numels)] = [grad.new_empty(0) for grad in grads[: len(numels)]]
        if step == 3 and grads[-1].numel() > 0:
            grads[-1][0] = float("inf")
        F.fused_step_(grads, layout, state, options)
        F.combine_(grads, [], layout, state, options)
        cpu_grads = [grad.cpu() for grad in grads]
        reference.fused_step_(cpu_grads, layout, twin, options)
        reference.combine_(cpu_grads, [], layout, twin, options)
        assert_equal_bits(
            [state.sq_grad_sum.cpu(), state.grad_mean.cpu()], [twin.sq_grad_sum, twin.grad_mean]
        )
        assert int(state.num_skipped_steps) == int(twin.num_skipped_steps)
        torch.testing.assert_close(
            state.task_weights.cpu(), twin.task_weights, rtol=1e-5, atol=1e-9
        )
    if sum(numels) > 0:
        assert int(state.num_skipped_steps) == 1


@needs_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_gradients_differ_from_the_reference_by_one_neighbour_at_most(dtype, device):
    """A last digit of float32 (fused multiply-add) turns one of 2^15 roundings."""
    numels, options = [40_000, 7], OPTIONS["momentum"]
    layout = ParamLayout(numels)
    state, twin = (bfloat16_state(2, layout, options, d) for d in (device, "cpu"))
    grads = make_task_grads(2, numels, dtype, device)
    F.fused_step_(grads, layout, state, options)
    reference.fused_step_([g.cpu() for g in grads], layout, twin, options)
    for ours, theirs in zip(state[:2], twin[:2], strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=2**-6, atol=0)
        assert (ours.cpu() != theirs).double().mean() < 1e-3


@needs_ops
@pytest.mark.parametrize("momentum", [0.0, EXACT_MOMENTUM])
def test_parts_row_by_row_equal_the_fused_step(momentum, device):
    """As streaming calls them: each row says which task it is of."""
    numels = [20_000, 7]
    layout, options = ParamLayout(numels), StepOptions(gradient_momentum=momentum, rounding_seed=9)
    fused, parts = (bfloat16_state(3, layout, options, device) for _ in range(2))
    for step in range(3):
        grads = make_task_grads(3, numels, torch.float32, device)
        if step == 1:
            grads[0][5] = float("nan")
        F.fused_step_(grads, layout, fused, options)
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        flags = F.find_nonfinite(grads, 3, torch.bfloat16, None)
        for task in range(3):
            row = slice(task, task + 1)
            F.accumulate_excess_risk_(
                grads[task * 2 : task * 2 + 2], layout, parts.sq_grad_sum[row], parts.grad_mean[row], sums[row],
                parts.ticket, options, state=parts, first_task=task,
                known_nonfinite=flags.any().reshape(1),
            )  # fmt: skip
        F.update_task_risks_(sums, [0, 1, 2], layout, parts, options)
        F.update_task_weights_([0, 1, 2], parts, options)
        if step == 1:
            parts.found_nonfinite.copy_(fused.found_nonfinite)  # by row all are
        assert_equal_bits(list(parts), list(fused))


@needs_ops
def test_equal_bits_for_any_number_of_threads_and_other_bits_for_another_seed():
    numels = [100_003, 1, 50_000]
    layout = ParamLayout(numels)
    grads = make_task_grads(2, numels, torch.float32)
    threads = torch.get_num_threads()

    def state_after(seed: int) -> list[torch.Tensor]:
        options = StepOptions(gradient_momentum=0.9, rounding_seed=seed)
        state = bfloat16_state(2, layout, options)
        for _ in range(2):
            F.fused_step_(grads, layout, state, options)
        return list(state)

    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(state_after(0))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_equal_bits(other, results[0])
    assert (state_after(1)[0] != results[0][0]).double().mean() > 0.1


PRINT_STATE = """
import hashlib, torch
from excessmtl_ext import functional as F
layout, options = F.ParamLayout([20_000, 7]), F.StepOptions(gradient_momentum=0.5, rounding_seed=2)
state = F.init_state(2, layout, dtype=torch.bfloat16, has_momentum=True)
generator = torch.Generator().manual_seed(0)
for _ in range(3):
    grads = [torch.randn(n, generator=generator).bfloat16() for _ in range(2) for n in layout.numels]
    F.fused_step_(grads, layout, state, options)
digest = hashlib.sha256(b"".join(t.view(torch.int16).numpy().tobytes() for t in state[:2])).hexdigest()
print(F.cpu_capability(), digest)
"""


@needs_ops
@pytest.mark.slow
def test_every_cpu_path_gives_the_same_bits(tmp_path):
    digests = {}
    for capability in ("avx512", "avx2", "default"):
        result = subprocess.run(
            [sys.executable, "-c", PRINT_STATE],
            env={**os.environ, "EXCESSMTL_CPU_CAPABILITY": capability},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        name, digest = result.stdout.split()
        digests[name] = digest
    if len(digests) == 1:
        pytest.skip("this machine has one path only")
    assert len(set(digests.values())) == 1, digests


@needs_ops
@pytest.mark.parametrize(
    "name", ["fused_step_", "fused_step_combine_", "accumulate_excess_risk_", "combine_"]
)
def test_op_with_bfloat16_state_passes_opcheck(name, device):
    options = StepOptions(gradient_momentum=0.9, rounding_seed=3)
    layout = ParamLayout([40, 9])
    state = bfloat16_state(2, layout, options, device)
    grads = make_task_grads(2, [40, 9], torch.float32, device)
    args, kwargs = op_arguments(
        name,
        device,
        layout,
        state,
        options,
        task_grads=grads,
        outputs=[torch.zeros(40, device=device), torch.zeros(9, device=device)],
        excess_risk_sum=state.excess_risk,
        grad_scale=None,
        accumulate=True,
        first_task=0,
    )
    torch.library.opcheck(getattr(torch.ops.excessmtl_ext, name).default, args, kwargs)


def test_rows_without_their_step_raise_and_change_nothing(device):
    layout, options = ParamLayout([40]), StepOptions()
    state = bfloat16_state(1, layout, options, device)
    grads = make_task_grads(1, [40], torch.float32, device)
    sums = torch.zeros(1, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="Expected `num_steps` and `num_skipped_steps`"):
        F.accumulate_excess_risk_(
            grads, layout, state.sq_grad_sum, state.grad_mean, sums, state.ticket, options
        )
    with pytest.raises(RuntimeError, match="`sq_grad_sum` of float64 for float64 gradients"):
        F.fused_step_([grads[0].double()], layout, state, options)
    assert not state.sq_grad_sum.any()


# ---- what becomes of long sums


def test_sums_of_thousands_of_small_squares_neither_stall_nor_drift(device):
    """g^2 = 1, 4,000 times: above 256 an increment is under half of what separates two bfloat16 numbers.

    A sum's relative variance is at most 2^-7 * 3/8: an increment d adds at most d times that distance
    (docs/kernels.md). So the mean of P sums is off by 4 * 0.0541 / sqrt(P) at most. The risk sees that variance
    through the curvature of 1/sqrt or 1/S: 3/8 or 1 times it.
    """
    numel, num_steps = 16_384, 4_000
    layout = ParamLayout([numel])
    grads = [torch.ones(numel, device=device)]
    for options, curvature in (
        (StepOptions(relative=False), 3 / 8),
        (StepOptions(fisher="linear", relative=False), 1.0),
    ):
        narrow = bfloat16_state(1, layout, options, device)
        wide = init_state(1, layout, device=device)
        nearest = torch.zeros(numel)
        for _ in range(num_steps):
            F.fused_step_(grads, layout, narrow, options)
            F.fused_step_(grads, layout, wide, options)
        for _ in range(300):
            nearest = rounded_to_nearest(nearest + 1.0)
        assert wide.sq_grad_sum.unique().tolist() == [num_steps]
        assert nearest.unique().tolist() == [256.0]  # and there it stays
        sums = narrow.sq_grad_sum.double()
        variance = 2**-7 * 3 / 8
        assert (sums / num_steps).var().item() < 1.1 * variance
        off = (sums.mean().item() - num_steps) / num_steps
        assert abs(off) < 4 * (variance / numel) ** 0.5
        risks = (narrow.excess_risk / wide.excess_risk).item()
        assert -4 * (variance / numel) ** 0.5 < risks - 1 < 1.1 * curvature * variance + 0.002


def test_running_mean_reaches_what_rounding_to_nearest_never_does(device):
    numel, momentum = 16_384, 0.999
    layout, options = ParamLayout([numel]), StepOptions(gradient_momentum=momentum)
    state = bfloat16_state(1, layout, options, device)
    wide = init_state(1, layout, device=device, has_momentum=True)
    grads = [torch.ones(numel, device=device)]
    nearest = torch.zeros(numel)
    for _ in range(3_000):
        F.fused_step_(grads, layout, state, options)
        F.fused_step_(grads, layout, wide, options)
        nearest = rounded_to_nearest(nearest * momentum + (1 - momentum))
    exact = 1 - momentum**3_000
    assert nearest.max().item() < 0.6 * exact
    # Variance of one rounding is at most a quarter of 2^-8 squared, of the mean that over 1 - b^2.
    spread = 2**-9 / (1 - momentum**2) ** 0.5
    assert abs(state.grad_mean.double().mean().item() - exact) < 4 * spread / numel**0.5
    assert abs((state.excess_risk / wide.excess_risk).item() - 1) < 0.02


@pytest.mark.parametrize(
    ("options", "distance"),
    [
        ({"robust_step_size": 0.02}, 0.002),  # 0.0001 measured
        ({"robust_step_size": 3.0, "gradient_momentum": 0.98, "fisher": "linear"}, 0.02),  # 0.0025
    ],
    ids=["sqrt", "momentum"],
)
def test_weights_of_a_training_stay_near_those_of_float32_state(options, distance):
    """1,000 steps of full-batch training: the weights' largest distance on the way, and what was learned."""
    trajectories, losses = [], []
    for state_dtype in (None, torch.bfloat16):
        problem = make_problem(num_tasks=3)
        balancer = published(
            problem.encoder.parameters(), num_tasks=3, state_dtype=state_dtype, **options
        )
        optimizer = torch.optim.SGD(problem.parameters(), lr=0.01)
        weights = []
        values = problem.losses()
        for _ in range(1_000):
            optimizer.zero_grad()
            values = problem.losses()
            balancer.backward(values)
            optimizer.step()
            weights.append(balancer.task_weights.clone())
        trajectories.append(torch.stack(weights))
        losses.append(torch.stack(values).detach())
    wide, narrow = trajectories
    assert (wide[-1] - 1 / 3).abs().max() > 0.05, "the weights should have gone somewhere"
    assert (narrow - wide).abs().max() < distance
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=1e-3)


# ---- the balancer


def balancer_of(problem, **options) -> ExcessMTL:
    fixed = {"robust_step_size": 0.3, "gradient_momentum": 0.9, "state_dtype": torch.bfloat16}
    return published(problem.encoder.parameters(), num_tasks=3, **{**fixed, **options})


def run(balancer, problem, num_steps, *, streaming=False) -> None:
    for _ in range(num_steps):
        problem.zero_grad()
        losses = problem.losses()
        if streaming:
            for task, loss in enumerate(losses):
                balancer.accumulate(task, loss, retain_graph=task < 2)
            balancer.finish()
        else:
            balancer.backward(losses)
        with torch.no_grad():
            for parameter in problem.parameters():
                parameter -= 0.05 * parameter.grad


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_loaded_and_continued_equals_never_stopped(streaming):
    problem = make_problem()
    balancer = balancer_of(problem, rounding_seed=4)
    run(balancer, problem, 3, streaming=streaming)
    resumed_problem = copy.deepcopy(problem)
    resumed = balancer_of(resumed_problem, rounding_seed=4)
    resumed.load_state_dict(balancer.state_dict())
    for other, its_problem in ((balancer, problem), (resumed, resumed_problem)):
        run(other, its_problem, 3, streaming=streaming)
    assert resumed.sq_grad_sum.dtype == torch.bfloat16
    assert_equal_bits(list(resumed.step_state), list(balancer.step_state))


def test_streamed_step_rounds_as_the_plain_one():
    plain, streamed = make_problem(), make_problem()
    one, other = balancer_of(plain), balancer_of(streamed)
    run(one, plain, 1)
    run(other, streamed, 1, streaming=True)
    assert_equal_bits([other.sq_grad_sum, other.grad_mean], [one.sq_grad_sum, one.grad_mean])


def test_state_saved_in_another_type_is_taken_in_ones_own():
    problem = make_problem()
    narrow = balancer_of(problem)
    run(narrow, problem, 2)
    wide = balancer_of(problem, state_dtype=None)
    wide.load_state_dict(narrow.state_dict())
    assert wide.sq_grad_sum.dtype == torch.float32
    assert_equal_bits([wide.sq_grad_sum], [narrow.sq_grad_sum.float()])
    back = balancer_of(problem)
    back.load_state_dict(wide.state_dict())
    assert_equal_bits(list(back.step_state), list(narrow.step_state))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_to_another_type_leaves_the_state_alone(dtype):
    problem = make_problem()
    balancer = balancer_of(problem)
    run(balancer, problem, 2)
    before = [tensor.clone() for tensor in balancer.step_state]
    balancer.to(dtype)
    assert_equal_bits(list(balancer.step_state), before)


def test_state_takes_half_of_the_memory():
    problem = make_problem()
    narrow = balancer_of(problem)
    wide = balancer_of(problem, state_dtype=None)
    for balancer in (narrow, wide):
        run(balancer, problem, 1)
    for name in ("sq_grad_sum", "grad_mean"):
        assert 2 * getattr(narrow, name).nbytes == getattr(wide, name).nbytes


def test_skipped_step_leaves_the_state_within_two_roundings():
    problem = make_problem()
    balancer = balancer_of(problem)
    run(balancer, problem, 2)
    before = balancer.sq_grad_sum.clone()
    losses = problem.losses()
    balancer.backward([losses[0], losses[1] * float("nan"), losses[2]])
    assert int(balancer.num_skipped_steps) == 1
    finite = balancer.sq_grad_sum.float()
    assert finite.isfinite().all()
    # Each rounding moves a sum by less than 2^-7 of the larger of its two values.
    torch.testing.assert_close(finite, before.float(), rtol=2**-5, atol=1e-2)


def test_what_bfloat16_state_cannot_do_is_said():
    problem = make_problem()
    parameters = list(problem.encoder.parameters())
    with pytest.raises(ValueError, match="Expected `state_dtype` to be None"):
        published(parameters, num_tasks=3, state_dtype=torch.float16)
    with pytest.raises(ValueError, match="Expected `rounding_seed` >= 0"):
        published(parameters, num_tasks=3, rounding_seed=-1)
    with pytest.raises(ValueError, match="`state_dtype` to be None with several ranks"):
        published(parameters, num_tasks=3, state_dtype=torch.bfloat16, model=problem.encoder)
    double = make_problem(dtype=torch.float64)
    with pytest.raises(ValueError, match="narrower than float64"):
        balancer_of(double)


def test_repr_rebuilds_the_balancer():
    balancer = published(num_tasks=2, state_dtype=torch.bfloat16, rounding_seed=8)
    again = eval(repr(balancer), {"ExcessMTL": ExcessMTL, "torch": torch})
    assert (again.state_dtype, again.rounding_seed) == (torch.bfloat16, 8)
