"""What only a GPU can show: no host sync, launches counted, graphs, streams, other devices. Values: test_fused_step.py.

What is shown without a GPU is in test_cuda_simt.py; training through the balancers in test_cuda_training.py.
"""

from __future__ import annotations

import pytest
import torch
from _asserts import assert_equal_bits, assert_states_close, never_waiting_for_the_gpu
from _inputs import DTYPES, make_task_grads
from torch import Tensor

from excessmtl_ext import _extension
from excessmtl_ext import functional as F
from excessmtl_ext.functional import ParamLayout, StepOptions, StepState, init_state

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.skipif(
        not _extension.has_op_for("cuda"), reason="the ops were built without CUDA kernels"
    ),
]

NUMELS = [40_000, 3, 16_384, 17, 1_000, 5_001]
LAYOUT = ParamLayout(NUMELS)
OPTIONS = StepOptions(gradient_momentum=0.9, robust_step_size=0.3)


def make_state(num_tasks: int = 3, device: str = "cuda", layout: ParamLayout = LAYOUT) -> StepState:
    return init_state(num_tasks, layout, device=device, has_momentum=True)


def step_and_combine(
    grads: list[Tensor], state: StepState, outputs: list[Tensor], layout: ParamLayout = LAYOUT
) -> None:
    F.fused_step_(grads, layout, state, OPTIONS)
    F.combine_(grads, outputs, layout, state, OPTIONS)


def step_and_combine_in_one_op(
    grads: list[Tensor], state: StepState, outputs: list[Tensor], layout: ParamLayout = LAYOUT
) -> None:
    F.fused_step_combine_(grads, outputs, layout, state, OPTIONS)


BOTH_WAYS = pytest.mark.parametrize(
    "step", [step_and_combine, step_and_combine_in_one_op], ids=["two ops", "one op"]
)


def outputs_for(grads: list[Tensor], layout: ParamLayout = LAYOUT) -> list[Tensor]:
    return [torch.empty_like(grad) for grad in grads[: len(layout.numels)]]


def kernels_launched(work) -> list[str]:
    """Names of the kernels that ``work`` launches, after a first call that may set things up."""
    work()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        work()
        torch.cuda.synchronize()
    events = profile.events()
    return [
        event.name
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in event.name
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_device_equals_cpu(dtype: torch.dtype) -> None:
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    states = [
        init_state(3, LAYOUT, dtype=acc, device=d, has_momentum=True) for d in ("cpu", "cuda")
    ]
    for _ in range(4):
        grads = make_task_grads(3, NUMELS, dtype)
        for state in states:
            F.fused_step_([g.to(state.ticket.device) for g in grads], LAYOUT, state, OPTIONS)
    # Approximate roots on the device: 2 units in the last place.
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    assert_states_close(states[1], states[0], rtol=rtol, atol=rtol)


def test_equal_steps_give_equal_bits() -> None:
    grads = make_task_grads(3, NUMELS, device="cuda")
    states = [make_state(), make_state()]
    for state in states:
        for _ in range(3):
            F.fused_step_(grads, LAYOUT, state, OPTIONS)
    assert_equal_bits(*states)


def test_nothing_waits_for_the_device() -> None:
    state = make_state()
    LAYOUT.chunk_map(state.ticket.device)  # made once, by a copy
    grads = make_task_grads(3, NUMELS, device="cuda")
    outputs = outputs_for(grads)
    grad_scale = torch.full((1,), 2.0, device="cuda")
    running_sum = torch.zeros(LAYOUT.padded_numel, device="cuda")
    log_max = torch.full((), -float("inf"), dtype=torch.float64, device="cuda")
    many = ParamLayout([2] * 3000)  # a pointer table in device memory
    many.chunk_map(state.ticket.device)
    many_grads = make_task_grads(2, [2] * 3000, device="cuda")
    many_state = make_state(2, layout=many)
    risks = torch.ones(3, dtype=torch.float64, device="cuda")
    with never_waiting_for_the_gpu():
        F.fused_step_(grads, LAYOUT, state, OPTIONS, grad_scale)
        F.combine_(grads, outputs, LAYOUT, state, OPTIONS, grad_scale)
        F.fused_step_combine_(grads, outputs, LAYOUT, state, OPTIONS, grad_scale)
        F.update_task_risks_(risks, [0, 2], LAYOUT, state, OPTIONS)
        F.update_task_weights_([0, 2], state, OPTIONS)
        F.fold_(grads[: len(NUMELS)], LAYOUT, state.log_task_weights[0], running_sum, log_max)
        F.fused_step_(many_grads, many, many_state, OPTIONS)


def test_one_launch_for_the_step_and_one_for_combine() -> None:
    state = make_state()
    grads = make_task_grads(3, NUMELS, device="cuda")
    outputs = outputs_for(grads)
    names = kernels_launched(lambda: step_and_combine(grads, state, outputs))
    assert len(names) == 2, names
    assert "fused_step_kernel" in names[0]
    assert "combine_kernel" in names[1]


def test_one_launch_for_both_phases_where_the_gradients_stay_in_cache() -> None:
    state = make_state()
    grads = make_task_grads(3, NUMELS, device="cuda")
    outputs = outputs_for(grads)
    names = kernels_launched(lambda: step_and_combine_in_one_op(grads, state, outputs))
    assert len(names) == 1, names
    assert "fused_step_combine_kernel" in names[0]


def test_two_launches_where_the_gradients_exceed_half_of_the_cache() -> None:
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    layout = ParamLayout([l2_bytes // 2 // 8 + 1])  # 2 tasks of 4 bytes
    state = make_state(2, layout=layout)
    grads = make_task_grads(2, list(layout.numels), device="cuda")
    outputs = outputs_for(grads, layout)
    names = kernels_launched(lambda: step_and_combine_in_one_op(grads, state, outputs, layout))
    assert len(names) == 2, names
    assert "fused_step_kernel" in names[0]
    assert "combine_kernel" in names[1]


def test_one_launch_equals_two_on_the_device_also_into_a_gradient() -> None:
    states = [make_state(), make_state()]
    for step in range(4):
        grads = make_task_grads(3, NUMELS, device="cuda")
        if step == 2:
            grads[0][7] = float("nan")
        copies = [grad.clone() for grad in grads]
        step_and_combine(grads, states[0], grads[: len(NUMELS)])
        step_and_combine_in_one_op(copies, states[1], copies[: len(NUMELS)])
        assert_states_close(states[1], states[0], rtol=3e-6, atol=3e-6)
        for one, two in zip(copies, grads, strict=True):
            torch.testing.assert_close(one, two, equal_nan=True)
    assert int(states[1].num_skipped_steps) == 1


@BOTH_WAYS
@pytest.mark.parametrize("num_tensors", [10, 400, 3000])
def test_captured_graph_equals_eager_over_100_steps(num_tensors: int, step) -> None:
    # 20, 800 and 6,000 pointers: both sizes of arguments, and a table in device memory.
    layout = ParamLayout([5 + k % 40 for k in range(num_tensors)])
    state, captured = make_state(2, layout=layout), make_state(2, layout=layout)
    grads = make_task_grads(2, list(layout.numels), device="cuda")
    outputs, captured_outputs = outputs_for(grads, layout), outputs_for(grads, layout)
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        step(grads, make_state(2, layout=layout), outputs, layout)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(grads, captured, captured_outputs, layout)
    fresh = torch.Generator(device="cuda").manual_seed(1)
    for _ in range(100):
        for grad in grads:
            grad.normal_(generator=fresh)
        step(grads, state, outputs, layout)
        graph.replay()
        # What a caching allocator hands out again must not be what the graph reads.
        torch.randn(100_000, device="cuda")
    assert_equal_bits(state, captured)
    assert_equal_bits(outputs, captured_outputs)


@BOTH_WAYS
def test_two_streams_do_not_meet(step) -> None:
    grads = [make_task_grads(3, NUMELS, device="cuda") for _ in range(2)]
    expected = [make_state(), make_state()]
    for state, own in zip(expected, grads, strict=True):
        for _ in range(20):
            step(own, state, outputs_for(own))
    states = [make_state(), make_state()]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, state, own in zip(streams, states, grads, strict=True):
            with torch.cuda.stream(stream):
                step(own, state, outputs_for(own))
    torch.cuda.synchronize()
    for state, wanted in zip(states, expected, strict=True):
        assert_equal_bits(state, wanted)


def test_work_goes_to_the_device_of_the_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device on this machine: a second is needed")
    states = [make_state(device=f"cuda:{index}") for index in range(2)]
    grads = make_task_grads(3, NUMELS)
    with torch.cuda.device(0):
        for index, state in enumerate(states):
            own = [grad.to(f"cuda:{index}") for grad in grads]
            step_and_combine(own, state, outputs_for(own))
        assert torch.cuda.current_device() == 0
    assert_equal_bits([t.cpu() for t in states[0]], [t.cpu() for t in states[1]])


def test_gradients_on_another_device_are_refused() -> None:
    state = make_state()
    with pytest.raises(RuntimeError, match="on the device of the state"):
        F.fused_step_(make_task_grads(3, NUMELS), LAYOUT, state, OPTIONS)


def test_ticket_is_zero_after_every_step() -> None:
    state = make_state()
    for _ in range(5):
        grads = make_task_grads(3, NUMELS, device="cuda")
        F.fused_step_(grads, LAYOUT, state, OPTIONS)
        assert int(state.ticket) == 0
        F.fused_step_combine_(grads, outputs_for(grads), LAYOUT, state, OPTIONS)
        assert int(state.ticket) == 0


def test_unaligned_gradients_equal_aligned_ones() -> None:
    flat = [torch.randn(sum(NUMELS) + 1, device="cuda")[1:] for _ in range(3)]
    shifted = [part for task in flat for part in task.split(NUMELS)]
    states = [make_state(), make_state()]
    F.fused_step_(shifted, LAYOUT, states[0], OPTIONS)
    F.fused_step_([grad.clone() for grad in shifted], LAYOUT, states[1], OPTIONS)
    assert_states_close(states[0], states[1], rtol=1e-6, atol=1e-6)
