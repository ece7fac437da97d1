"""The compiled ops against their twins in reference.py, in float64 and under every condition the contract names."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from _asserts import assert_equal_bits, assert_states_close
from _inputs import DTYPES, PARAM_NUMELS, make_problem, make_task_grads
from _published import published
from torch.utils._python_dispatch import TorchDispatchMode

from excessmtl_ext import _extension, reference
from excessmtl_ext import functional as F
from excessmtl_ext.functional import ParamLayout, StepOptions, StepState, init_state

pytestmark = pytest.mark.skipif(
    not _extension.ops_available, reason=f"no compiled ops: {_extension.unavailable_reason}"
)

OPTIONS = {
    "default": StepOptions(robust_step_size=0.3),
    "linear": StepOptions(fisher="linear", robust_step_size=0.3),
    "momentum": StepOptions(fisher="linear", gradient_momentum=0.9, robust_step_size=0.3),
    "sqrt_momentum": StepOptions(gradient_momentum=0.98, robust_step_size=0.3),
    "warmup": StepOptions(num_warmup_steps=2, robust_step_size=0.3),
    "raw": StepOptions(relative=False, robust_step_size=1e-3),
    "floor": StepOptions(min_weight=0.05, weight_total=3.0, robust_step_size=0.3),
}


def run_reference(grads, layout, state, options, scale=None):
    """The twin in float64, on the values that the op was given."""
    reference.fused_step_([grad.double() for grad in grads], layout, state, options, scale)


def run_reference_combine(grads, outputs, layout, state, options, scale=None, accumulate=False):
    reference.combine_(
        [grad.double() for grad in grads],
        outputs,
        layout,
        state,
        options,
        scale,
        accumulate=accumulate,
    )


def states_of(num_tasks, layout, options, dtype, device="cpu") -> StepState:
    return init_state(
        num_tasks,
        layout,
        dtype=dtype,
        device=device,
        has_momentum=options.gradient_momentum > 0,
        weight_total=options.weight_total,
    )


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("numels", PARAM_NUMELS.values(), ids=PARAM_NUMELS.keys())
def test_steps_and_combined_gradients_equal_the_reference(numels, options, dtype, device):
    num_tasks, layout = 3, ParamLayout(numels)
    state = states_of(num_tasks, layout, options, state_dtype(dtype), device)
    expected = states_of(num_tasks, layout, options, torch.float64)
    # float32 squares and sums: 4 steps of 2^-24 per element, and the fast root's 2e-7. grad_mean crosses zero: atol.
    rtol, atol = (1e-12, 1e-12) if dtype == torch.float64 else (3e-6, 5e-7)
    for _ in range(4):
        grads = make_task_grads(num_tasks, numels, dtype, device)
        F.fused_step_(grads, layout, state, options)
        run_reference([g.cpu() for g in grads], layout, expected, options)
        assert_states_close(state, expected, rtol=rtol, atol=atol)
        outputs = [torch.full((n,), 7.0, dtype=dtype, device=device) for n in numels]
        wanted = [torch.zeros(n, dtype=torch.float64) for n in numels]
        F.combine_(grads, outputs, layout, state, options)
        run_reference_combine([g.cpu() for g in grads], wanted, layout, expected, options)
        for output, want in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(output.cpu(), want.to(dtype))


@pytest.mark.parametrize("kind", ["zero_task", "huge", "tiny", "strided"])
@pytest.mark.parametrize("num_tasks", [1, 2, 7, 64])
def test_unusual_gradients_equal_the_reference(kind, num_tasks, device):
    numels, options = [33, 5], StepOptions(robust_step_size=0.1)
    layout = ParamLayout(numels)
    state = states_of(num_tasks, layout, options, torch.float32, device)
    expected = states_of(num_tasks, layout, options, torch.float64)
    for _ in range(3):
        grads = make_task_grads(num_tasks, numels, torch.float32, device, kind)
        F.fused_step_(grads, layout, state, options)
        run_reference([g.cpu() for g in grads], layout, expected, options)
    assert_states_close(state, expected, rtol=3e-6, atol=5e-7)
    assert state.task_weights.sum().item() == pytest.approx(1.0, abs=1e-14)


def test_512_tasks_work_and_513_are_refused(device):
    layout, options = ParamLayout([3]), StepOptions(robust_step_size=0.5)
    state = states_of(512, layout, options, torch.float32, device)
    expected = states_of(512, layout, options, torch.float64)
    for _ in range(2):
        grads = make_task_grads(512, [3], torch.float32, device)
        F.fused_step_(grads, layout, state, options)
        run_reference([g.cpu() for g in grads], layout, expected, options)
    assert_states_close(state, expected, rtol=3e-6, atol=5e-7)
    with pytest.raises(ValueError, match="between 1 and 512"):
        init_state(513, layout)


def test_gradients_of_mixed_types_work_in_one_step(device):
    numels, options = [40, 9], StepOptions()
    layout = ParamLayout(numels)
    state = states_of(2, layout, options, torch.float32, device)
    expected = states_of(2, layout, options, torch.float64)
    grads = make_task_grads(2, numels, torch.float32, device)
    grads[1], grads[2] = grads[1].bfloat16(), grads[2].half()
    F.fused_step_(grads, layout, state, options)
    run_reference([g.cpu() for g in grads], layout, expected, options)
    assert_states_close(state, expected, rtol=3e-6, atol=5e-7)


def test_missing_gradients_leave_their_state_alone_and_absent_tasks_keep_their_weight(device):
    numels, options = [40, 9], StepOptions(robust_step_size=1.0, gradient_momentum=0.5)
    layout = ParamLayout(numels)
    state = states_of(3, layout, options, torch.float32, device)
    expected = states_of(3, layout, options, torch.float64)
    for kind in ("all", "all", "one parameter", "one task", "all"):
        grads = make_task_grads(3, numels, torch.float32, device)
        before = [tensor.clone() for tensor in state]
        if kind == "one parameter":
            grads[1] = grads[1].new_empty(0)
        if kind == "one task":
            grads[2] = grads[3] = grads[2].new_empty(0)
        F.fused_step_(grads, layout, state, options)
        run_reference([g.cpu() for g in grads], layout, expected, options)
        assert_states_close(state, expected, rtol=3e-6, atol=5e-7)
        after = dict(zip(StepState._fields, state, strict=True))
        old = dict(zip(StepState._fields, before, strict=True))
        if kind == "one parameter":
            assert torch.equal(after["sq_grad_sum"][0, 64:], old["sq_grad_sum"][0, 64:])
        if kind == "one task":
            for name in (
                "sq_grad_sum",
                "grad_mean",
                "excess_risk",
                "num_task_steps",
                "log_task_weights",
            ):
                assert torch.equal(after[name][1], old[name][1]), name
            assert after["task_weights"][1].item() == pytest.approx(
                old["task_weights"][1].item(), rel=1e-15
            )


def test_a_step_without_any_task_changes_nothing(device):
    layout, options = ParamLayout([4]), StepOptions()
    state = states_of(2, layout, options, torch.float32, device)
    before = [tensor.clone() for tensor in state]
    F.fused_step_([torch.empty(0, device=device)] * 2, layout, state, options)
    assert_equal_bits(list(state), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_nonfinite_step_is_counted_and_changes_nothing(bad, momentum, device):
    """1e30 is finite but its square is not, in float32."""
    numels = [20_000, 7]
    layout, options = (
        ParamLayout(numels),
        StepOptions(gradient_momentum=momentum, robust_step_size=0.5),
    )
    state = states_of(2, layout, options, torch.float32, device)
    for _ in range(3):
        F.fused_step_(make_task_grads(2, numels, torch.float32, device), layout, state, options)
    before = [tensor.clone() for tensor in state]
    grads = make_task_grads(2, numels, torch.float32, device)
    grads[2][19_999] = bad
    outputs = [torch.zeros(n, device=device) for n in numels]
    F.fused_step_(grads, layout, state, options)
    F.combine_(grads, outputs, layout, state, options)
    assert all(bool(output.isnan().all()) for output in outputs)
    assert state.found_nonfinite.tolist() == [False, True]
    assert int(state.num_skipped_steps) == 1
    for name, left, right in zip(StepState._fields, state, before, strict=True):
        if name in ("found_nonfinite", "num_skipped_steps"):
            continue
        assert torch.equal(left, right), name
    F.fused_step_(make_task_grads(2, numels, torch.float32, device), layout, state, options)
    assert not state.found_nonfinite.any()
    assert bool(state.task_weights.isfinite().all())


def test_fisher_diagonal_stops_at_the_largest_finite_number(device):
    layout, options = ParamLayout([4]), StepOptions()
    state = states_of(1, layout, options, torch.float32, device)
    for _ in range(3):
        F.fused_step_([torch.full((4,), 1.5e19, device=device)], layout, state, options)
    assert bool(state.sq_grad_sum.isfinite().all())
    assert state.sq_grad_sum[0, 0].item() == torch.finfo(torch.float32).max
    assert int(state.num_skipped_steps) == 0


def test_grad_scale_is_undone_exactly(device):
    numels, options = [100], StepOptions(robust_step_size=0.5, gradient_momentum=0.9)
    layout = ParamLayout(numels)
    plain = states_of(2, layout, options, torch.float32, device)
    scaled = states_of(2, layout, options, torch.float32, device)
    scale = torch.tensor(1024.0, device=device)
    for _ in range(3):
        grads = make_task_grads(2, numels, torch.float32, device)
        F.fused_step_(grads, layout, plain, options)
        F.fused_step_([grad * 1024 for grad in grads], layout, scaled, options, scale)
    assert_equal_bits(list(scaled), list(plain))
    outputs, scaled_outputs = [torch.zeros(100, device=device)], [torch.zeros(100, device=device)]
    F.combine_(grads, outputs, layout, plain, options)
    F.combine_([grad * 1024 for grad in grads], scaled_outputs, layout, scaled, options, scale)
    assert torch.equal(scaled_outputs[0], outputs[0] * 1024)


def test_log_weights_neither_overflow_nor_lose_a_task(device):
    layout, options = ParamLayout([1]), StepOptions(robust_step_size=1e6, relative=False)
    state = states_of(2, layout, options, torch.float32, device)
    one, zero = torch.ones(1, device=device), torch.zeros(1, device=device)
    for grads in [(one, zero)] * 5:
        F.fused_step_(list(grads), layout, state, options)
    assert state.task_weights.tolist() == pytest.approx([1.0, 0.0])
    for grads in [(zero, one)] * 20:
        F.fused_step_(list(grads), layout, state, options)
    assert state.task_weights.tolist() == pytest.approx([0.0, 1.0])
    assert bool(state.log_task_weights.isfinite().all())


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_adds_or_overwrites(accumulate, dtype, device):
    numels, weights = [5_000, 3], torch.tensor([0.25, 0.75], dtype=torch.float64, device=device)
    layout, grads = ParamLayout(numels), make_task_grads(2, numels, dtype, device)
    outputs = [torch.randn(n, device=device).to(dtype) for n in numels]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = [
        (output.to(wide) * accumulate + 0.25 * first.to(wide) + 0.75 * second.to(wide)).to(dtype)
        for output, first, second in zip(outputs, grads[:2], grads[2:], strict=True)
    ]
    F.weighted_sum_(grads, outputs, layout, weights, accumulate=accumulate)
    for output, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, want)


def test_combine_may_write_into_a_gradient_of_the_step(device):
    numels = [5_000, 3]
    layout, grads = ParamLayout(numels), make_task_grads(3, numels, torch.float32, device)
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64, device=device)
    apart = [torch.zeros(n, device=device) for n in numels]
    F.weighted_sum_(grads, apart, layout, weights)
    F.weighted_sum_(grads, grads[2:4], layout, weights)
    assert_equal_bits(grads[2:4], apart)


def test_combine_passes_over_an_output_without_elements(device):
    layout, grads = ParamLayout([4, 4]), make_task_grads(1, [4, 4], torch.float32, device)
    outputs = [torch.empty(0, device=device), torch.zeros(4, device=device)]
    F.weighted_sum_(grads, outputs, layout, torch.ones(1, dtype=torch.float64, device=device))
    assert torch.equal(outputs[1], grads[1])


def run_two_ops(grads, outputs, layout, state, options, scale=None, accumulate=False):
    F.fused_step_(grads, layout, state, options, scale)
    F.combine_(grads, outputs, layout, state, options, scale, accumulate=accumulate)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("numels", PARAM_NUMELS.values(), ids=PARAM_NUMELS.keys())
def test_step_and_combine_in_one_op_equal_the_two_ops(numels, options, dtype, accumulate, device):
    """Present, absent and non-finite gradients, outputs apart; on the CPU to the bit."""
    layout = ParamLayout(numels)
    together = states_of(3, layout, options, state_dtype(dtype), device)
    apart = StepState(*[tensor.clone() for tensor in together])
    outputs = [[torch.full((n,), 0.5, dtype=dtype, device=device) for n in numels] for _ in "ab"]
    for kind in ("all", "absent task", "absent tensor", "nonfinite", "all"):
        grads = make_task_grads(3, numels, dtype, device)
        if kind == "absent task":
            grads[: len(numels)] = [grads[0].new_empty(0)] * len(numels)
        if kind == "absent tensor":
            grads[-1] = grads[0].new_empty(0)
        if kind == "nonfinite":
            grads[0][-1:] = float("inf")
        F.fused_step_combine_(grads, outputs[0], layout, together, options, accumulate=accumulate)
        run_two_ops(grads, outputs[1], layout, apart, options, accumulate=accumulate)
        if torch.device(device).type == "cpu":
            assert_equal_bits(list(together), list(apart))
            assert_equal_bits(*outputs)
        else:  # two kernels: their compiler may contract a multiplication and an addition differently
            tolerance = 1e-11 if dtype == torch.float64 else 3e-6
            assert_states_close(together, apart, rtol=tolerance, atol=tolerance)
            for one, two in zip(*outputs, strict=True):
                torch.testing.assert_close(one, two, equal_nan=True)
        if kind == "nonfinite" and sum(numels) > 0:
            assert int(together.num_skipped_steps) == 1
            for output in [*outputs[0], *outputs[1]]:
                output.fill_(0.5)


@pytest.mark.parametrize("kind", ["typical", "strided"])
def test_one_op_equals_the_reference_where_outputs_are_gradients(kind, device):
    numels, options = [20_000, 7, 1030], StepOptions(gradient_momentum=0.9, robust_step_size=0.3)
    layout = ParamLayout(numels)
    state = states_of(3, layout, options, torch.float32, device)
    expected = states_of(3, layout, options, torch.float64)
    scale = torch.tensor(8.0, device=device)
    for _ in range(3):
        grads = make_task_grads(3, numels, torch.float32, device, kind)
        wanted = [torch.zeros(n, dtype=torch.float64) for n in numels]
        values = [grad.cpu().clone() for grad in grads]
        run_reference(values, layout, expected, options, scale.cpu())
        run_reference_combine(values, wanted, layout, expected, options, scale.cpu())
        targets = [grad.contiguous() for grad in grads[3:6]]  # those of task 1 where it can be
        F.fused_step_combine_(grads, targets, layout, state, options, scale)
        assert_states_close(state, expected, rtol=3e-6, atol=5e-7)
        for target, want in zip(targets, wanted, strict=True):
            torch.testing.assert_close(target.cpu(), want.float(), rtol=1e-5, atol=1e-5)


def test_one_op_with_outputs_left_out_of_another_type_or_none_equals_the_two_ops(device):
    numels, options = [40, 9, 5], StepOptions(robust_step_size=0.3)
    layout = ParamLayout(numels)
    together = states_of(2, layout, options, torch.float32, device)
    apart = StepState(*[tensor.clone() for tensor in together])
    for make in (
        lambda: [torch.zeros(n if n != 9 else 0, device=device) for n in numels],
        lambda: [torch.zeros(n, device=device, dtype=torch.bfloat16) for n in numels],
        lambda: [torch.zeros(n, device=device, dtype=torch.float64) for n in numels],
        list,
    ):
        for bad in (False, True):
            grads = make_task_grads(2, numels, torch.float32, device)
            if bad:
                grads[1][3] = float("nan")
            left, right = make(), make()
            F.fused_step_combine_(grads, left, layout, together, options)
            run_two_ops(grads, right, layout, apart, options)
            assert_states_close(together, apart, rtol=3e-6, atol=1e-6)
            for one, two in zip(left, right, strict=True):
                torch.testing.assert_close(one, two, equal_nan=True)
    assert int(together.num_skipped_steps) == 4


def test_one_op_without_any_task_writes_zeros_and_keeps_the_state(device):
    layout, options = ParamLayout([4]), StepOptions()
    state = states_of(2, layout, options, torch.float32, device)
    before = [tensor.clone() for tensor in state]
    state.found_nonfinite.fill_(True)  # of a step before
    outputs = [torch.ones(4, device=device)]
    grads = [torch.empty(0, device=device)] * 2
    F.fused_step_combine_(grads, outputs, layout, state, options, accumulate=True)
    assert outputs[0].tolist() == [1.0] * 4
    F.fused_step_combine_(grads, outputs, layout, state, options)
    assert outputs[0].tolist() == [0.0] * 4
    assert_equal_bits(list(state), before)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([torch.zeros(40)], "`outputs` to hold 2 tensors or none, but got 1"),
        ([torch.zeros(40), torch.zeros(8)], "`outputs` 1 to be contiguous with 9 elements"),
        ([torch.zeros(40), torch.zeros(18)[::2]], "`outputs` 1 to be contiguous"),
        ([torch.zeros(40), torch.zeros(9, dtype=torch.int32)], "float32, bfloat16 or float16"),
    ],
)
def test_wrong_output_raises_before_the_step_changes_anything(outputs, message):
    layout, options, state, grads = sample_args(torch.device("cpu"))
    before = [tensor.clone() for tensor in state]
    with pytest.raises(RuntimeError, match=message):
        F.fused_step_combine_(grads, outputs, layout, state, options)
    assert_equal_bits(list(state), before)
    assert all(bool((output == 0).all()) for output in outputs)


class _OpLog(TorchDispatchMode):
    """Names of this package's ops, as they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "excessmtl_ext":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("nonfinite", "expected"),
    [("skip", ["fused_step_combine_"]), ("raise", ["fused_step_", "combine_"])],
)
def test_a_balanced_step_is_one_op_unless_flags_are_read_in_between(nonfinite, expected):
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3, nonfinite=nonfinite)
    losses = problem.losses()
    with _OpLog() as log:
        balancer.backward(losses)
    assert log.names == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_folding_task_by_task_equals_the_weighted_sum(dtype, device):
    numels, log_weights = (
        [5_000, 3, 17],
        torch.tensor([-700.0, 3.0, 900.0, 899.0], dtype=torch.float64),
    )
    layout, grads = ParamLayout(numels), make_task_grads(4, numels, dtype, device)
    wide = state_dtype(dtype)
    total = torch.zeros(layout.padded_numel, dtype=wide, device=device)
    log_max = torch.full((), float("-inf"), dtype=torch.float64, device=device)
    for task in range(4):
        row = grads[3 * task : 3 * task + 3]
        F.fold_(row, layout, log_weights[task].to(device), total, log_max)
    assert log_max.item() == 900.0
    for index, part in enumerate(F.segments(total, layout.param_numels)):
        expected = sum(
            torch.exp(log_weights[task] - 900.0).item() * grads[3 * task + index].double()
            for task in range(4)
        )
        torch.testing.assert_close(part.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_three_parts_equal_the_fused_step(device):
    numels, options = (
        [20_000, 7],
        StepOptions(robust_step_size=0.5, gradient_momentum=0.9, fisher="linear"),
    )
    layout = ParamLayout(numels)
    fused = states_of(3, layout, options, torch.float32, device)
    parts = states_of(3, layout, options, torch.float32, device)
    for _ in range(3):
        grads = make_task_grads(3, numels, torch.float32, device)
        F.fused_step_(grads, layout, fused, options)
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        F.accumulate_excess_risk_(
            grads, layout, parts.sq_grad_sum, parts.grad_mean, sums, parts.ticket, options
        )
        F.update_task_risks_(sums, [0, 1, 2], layout, parts, options)
        F.update_task_weights_([0, 1, 2], parts, options)
    assert_equal_bits(list(parts), list(fused))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_bits_for_any_number_of_threads(dtype):
    numels, options = [100_003, 1, 50_000], StepOptions(robust_step_size=0.5, gradient_momentum=0.9)
    layout = ParamLayout(numels)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            generator = torch.Generator().manual_seed(3)
            state = states_of(3, layout, options, torch.float32)
            outputs = [torch.zeros(n, dtype=dtype) for n in numels]
            for _ in range(2):
                grads = [
                    torch.randn(n, generator=generator).to(dtype) for _ in range(3) for n in numels
                ]
                F.fused_step_(grads, layout, state, options)
                F.combine_(grads, outputs, layout, state, options, accumulate=True)
            results.append([*state, *outputs])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_equal_bits(other, results[0])


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_every_cpu_path_passes_this_file(capability, tmp_path):
    """The narrower paths of this machine, each in a process of its own since the choice is made once.

    Not in the checkout: Python would import its source folder, where nothing is compiled.
    """
    if os.environ.get("EXCESSMTL_CPU_CAPABILITY"):
        pytest.skip("this is that process")
    environment = {**os.environ, "EXCESSMTL_CPU_CAPABILITY": capability}
    code = "from excessmtl_ext import functional; print(functional.cpu_capability())"
    chosen = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if chosen != capability:
        pytest.skip(f"this machine has no {capability}")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__,
         "-k", "reference or fold or combine or nonfinite or scale"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
    assert "passed" in result.stdout


def sample_args(device: torch.device, momentum: float = 0.9):
    layout = ParamLayout([40, 9])
    options = StepOptions(gradient_momentum=momentum)
    state = states_of(2, layout, options, torch.float32, device)
    grads = make_task_grads(2, [40, 9], torch.float32, device)
    return layout, options, state, grads


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["grads"].pop(), "2 tasks x 2 parameters = 4 tensors, but got 3"),
        (lambda a: a["grads"].__setitem__(1, torch.zeros(8)), "task 0, parameter 1 to have 9 elements, but got 8"),
        (lambda a: a["grads"].__setitem__(1, torch.zeros(9, dtype=torch.int32)), "float32, bfloat16 or float16"),
        (lambda a: a["grads"].__setitem__(1, torch.zeros(9, dtype=torch.float64)), "`sq_grad_sum` of float64"),
        (lambda a: a.update(options=a["options"]._replace(eps=-1.0)), "`eps` >="),
        (lambda a: a.update(options=a["options"]._replace(robust_step_size=-1.0)), "`robust_step_size` > 0, but got"),
        (lambda a: a.update(options=a["options"]._replace(min_weight=0.6)), "`min_weight` between 0 and 1 / num_tasks"),
        (lambda a: a.update(options=a["options"]._replace(gradient_momentum=1.0)), "`gradient_momentum` in"),
        (lambda a: a.update(state=a["state"]._replace(task_weights=torch.zeros(3))), "`task_weights`"),
        (lambda a: a.update(layout=ParamLayout([40, 9, 1])), "`sq_grad_sum` of shape"),
    ],
)  # fmt: skip
def test_wrong_argument_raises_and_changes_nothing(change, message):
    layout, options, state, grads = sample_args(torch.device("cpu"))
    F.fused_step_(grads, layout, state, options)
    before = [tensor.clone() for tensor in state]
    arguments = {"grads": list(grads), "layout": layout, "state": state, "options": options}
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        F.fused_step_(
            arguments["grads"], arguments["layout"], arguments["state"], arguments["options"]
        )
    assert_equal_bits(list(state), before)


def test_more_than_2_to_the_31_elements_in_all(device):
    """Indices beyond 32 bits: two tasks of 2^30 + 5 bfloat16 gradients each. 13 GB, so only on request."""
    if os.environ.get("EXCESSMTL_TEST_HUGE") != "1":
        pytest.skip("needs 13 GB of memory and a minute: set EXCESSMTL_TEST_HUGE=1")
    numel = 2**30 + 5
    layout, options = ParamLayout([numel]), StepOptions(robust_step_size=0.5)
    state = states_of(2, layout, options, torch.float32, device)
    grads = [
        torch.full((numel,), float(task + 1), dtype=torch.bfloat16, device=device)
        for task in range(2)
    ]
    for _ in range(2):
        F.fused_step_(grads, layout, state, options)
    assert state.sq_grad_sum[1, numel - 1].item() == 8.0
    assert state.sq_grad_sum[0, 0].item() == 2.0
    expected = numel * torch.tensor([1 / 2**0.5, 4 / 8**0.5], dtype=torch.float64)
    torch.testing.assert_close(state.excess_risk.cpu(), expected, rtol=1e-5, atol=0)
