"""Training on a GPU, through the balancers: the CPU's numbers, no wait for the device, one graph for a whole step.

Ops on a GPU: test_cuda_device.py and test_fused_step.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _asserts import assert_equal_bits, never_waiting_for_the_gpu
from _inputs import Problem, make_problem
from _published import published
from torch import Tensor

from excessmtl_ext import (
    IMTL,
    MGDA,
    MOML,
    ExcessMTL,
    GradNorm,
    GroupDRO,
    SingleTask,
    Uniform,
    _extension,
    memory,
)
from excessmtl_ext.balancer import Balancer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.skipif(
        not _extension.has_op_for("cuda"), reason="the ops were built without CUDA kernels"
    ),
]

NUM_TASKS = 3
NUM_STEPS = 12


def on_device(device: str, dtype: torch.dtype = torch.float32) -> Problem:
    problem = make_problem(NUM_TASKS, dtype)
    return Problem(
        problem.encoder.to(device),
        problem.heads.to(device),
        problem.inputs.to(device),
        problem.targets.to(device),
    )


def features_and_losses(problem: Problem) -> tuple[Tensor, list[Tensor]]:
    features = problem.encoder(problem.inputs)
    return features, [
        ((head(features)[:, 0] - problem.targets[:, task]) ** 2).mean()
        for task, head in enumerate(problem.heads)
    ]


Verb = Callable[[Problem, Balancer], None]


def backward(problem: Problem, balancer: Balancer) -> None:
    balancer.backward(problem.losses())


def backward_from_features(problem: Problem, balancer: Balancer) -> None:
    features, losses = features_and_losses(problem)
    balancer.backward(losses, features=features)


def weighted_loss(problem: Problem, balancer: Balancer) -> None:
    balancer(problem.losses()).backward()


def stream(problem: Problem, balancer: Balancer) -> None:
    for task, loss in enumerate(problem.losses()):
        balancer.accumulate(task, loss, retain_graph=task < NUM_TASKS - 1)
    balancer.finish()


def backward_after_validation(problem: Problem, balancer: Balancer) -> None:
    assert isinstance(balancer, MOML)
    balancer.observe_validation(problem.losses())
    balancer.backward(problem.losses())


def excess_mtl(problem: Problem, **options: Any) -> ExcessMTL:
    if options.get("estimate_from") == "last layer":
        options["estimate_from"] = list(problem.encoder[2].parameters())  # type: ignore[index]
    options = {"robust_step_size": 1.0, "gradient_momentum": 0.9, "fisher": "linear", **options}
    return published(problem.encoder.parameters(), num_tasks=NUM_TASKS, **options)


def baseline(problem: Problem, kind: type[Balancer], **options: Any) -> Balancer:
    return kind(problem.encoder.parameters(), num_tasks=NUM_TASKS, **options)


Make = Callable[[Problem], Balancer]

EXCESS_MTL: dict[str, tuple[Make, Verb]] = {
    "official": (
        functools.partial(excess_mtl, gradient_momentum=0.0, fisher="sqrt"),
        backward,
    ),
    "momentum": (excess_mtl, backward),
    "weighted loss": (excess_mtl, weighted_loss),
    "streaming": (excess_mtl, stream),
    "features": (excess_mtl, backward_from_features),
    "batched": (functools.partial(excess_mtl, batched=True), backward),
    "floor": (
        functools.partial(excess_mtl, min_weight=0.05, head_weighting="task_weights"),
        backward,
    ),
    "every second step": (functools.partial(excess_mtl, update_every=2), backward),
    "rotation": (functools.partial(excess_mtl, tasks_per_step=1), backward),
    "last layer": (functools.partial(excess_mtl, estimate_from="last layer"), backward),
    "estimate from features": (
        functools.partial(excess_mtl, estimate_from="features"),
        backward_from_features,
    ),
}

BASELINES: dict[str, tuple[Make, Verb]] = {
    "Uniform": (functools.partial(baseline, kind=Uniform), backward),
    "SingleTask": (functools.partial(baseline, kind=SingleTask, task=1), backward),
    "GroupDRO": (functools.partial(baseline, kind=GroupDRO), backward),
    "GradNorm": (functools.partial(baseline, kind=GradNorm), backward),
    "MGDA": (functools.partial(baseline, kind=MGDA), backward),
    "MOML": (functools.partial(baseline, kind=MOML), backward_after_validation),
    "IMTL": (functools.partial(baseline, kind=IMTL), backward),
}

ALL = {**EXCESS_MTL, **BASELINES}


def train(problem: Problem, balancer: Balancer, verb: Verb, num_steps: int = NUM_STEPS) -> None:
    optimizer = torch.optim.SGD(problem.parameters(), lr=0.05)
    for _ in range(num_steps):
        optimizer.zero_grad()
        verb(problem, balancer)
        optimizer.step()


@pytest.mark.parametrize("way", ALL)
def test_training_on_the_device_gives_the_numbers_of_the_cpu(way: str) -> None:
    if way == "IMTL":
        pytest.importorskip("torchjd", reason="torchjd is not installed")
    make, verb = ALL[way]
    results = []
    for device in ("cpu", "cuda"):
        problem = on_device(device, torch.float64)
        balancer = make(problem)
        train(problem, balancer, verb)
        results.append([balancer.task_weights, *problem.parameters()])
        assert balancer.task_weights.device.type == device
    for at_home, abroad in zip(*results, strict=True):
        torch.testing.assert_close(abroad.cpu(), at_home, rtol=1e-8, atol=1e-10)
    if isinstance(balancer, ExcessMTL):  # there is something that could have differed
        assert float((results[0][0] - 1 / NUM_TASKS).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_in_float32_stays_near_the_cpu_whatever_holds_the_state(dtype) -> None:
    state_dtype = None if dtype == torch.float32 else dtype
    weights = []
    for device in ("cpu", "cuda"):
        problem = on_device(device)
        balancer = excess_mtl(problem, state_dtype=state_dtype)
        train(problem, balancer, backward, 100)
        weights.append(balancer.task_weights.cpu())
    # A bfloat16 has 8 bits: where two float32 differ in the last place, one may be rounded up and the other down.
    tolerance = 1e-4 if state_dtype is None else 1e-2
    torch.testing.assert_close(weights[1], weights[0], rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("way", [*EXCESS_MTL, "Uniform", "SingleTask", "GroupDRO"])
def test_no_step_waits_for_the_device(way: str) -> None:
    make, verb = ALL[way]
    problem = on_device("cuda")
    balancer = make(problem)
    optimizer = torch.optim.SGD(problem.parameters(), lr=0.05)
    train(problem, balancer, verb, 2 * NUM_TASKS)  # what is made once is made, in rotation too
    with never_waiting_for_the_gpu():
        for _ in range(60):  # the guard against collapse looks at every 50th step
            optimizer.zero_grad()
            verb(problem, balancer)
            optimizer.step()


@pytest.mark.parametrize("way", ["momentum", "estimate from features"])
def test_a_missing_task_and_a_loss_scale_do_not_wait_for_the_device(way: str) -> None:
    make, verb = EXCESS_MTL[way]
    problem = on_device("cuda")
    balancer = make(problem)
    verb(problem, balancer)
    scale = torch.full((), 8.0, device="cuda")
    for given in (scale, 8.0):
        with never_waiting_for_the_gpu():
            features, losses = features_and_losses(problem)
            losses = [loss * scale for loss in losses]
            balancer.backward([losses[0], None, losses[2]], features=features, grad_scale=given)


def test_losses_that_are_handed_over_are_not_fetched() -> None:
    problem = on_device("cuda")
    balancer = GroupDRO(problem.encoder.parameters(), num_tasks=NUM_TASKS, robust_step_size=1.0)
    losses = problem.losses()
    with never_waiting_for_the_gpu():
        balancer.update_weights(losses=losses)
    assert int(balancer.task_weights.argmax()) == int(torch.stack(losses).argmax())


@pytest.mark.parametrize("way", ["official", "momentum", "streaming", "features", "floor"])
def test_a_whole_training_step_replayed_as_a_graph_equals_eager_steps(way: str) -> None:
    make, verb = EXCESS_MTL[way]

    def new() -> tuple[Problem, Balancer, torch.optim.Optimizer]:
        problem = on_device("cuda")
        return problem, make(problem), torch.optim.SGD(problem.parameters(), lr=0.05)

    def step(problem: Problem, balancer: Balancer, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        verb(problem, balancer)
        optimizer.step()

    eager, captured = new(), new()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # recorded, not run
        step(*captured)
    for _ in range(50):
        graph.replay()
    for _ in range(53):
        step(*eager)
    torch.testing.assert_close(captured[1].task_weights, eager[1].task_weights)
    for replayed, expected in zip(captured[0].parameters(), eager[0].parameters(), strict=True):
        torch.testing.assert_close(replayed, expected)
    assert int(captured[1].num_steps) == 53


def test_equal_runs_give_equal_bits() -> None:
    ends = []
    for _ in range(2):
        problem = on_device("cuda")
        balancer = excess_mtl(problem, state_dtype=torch.bfloat16)
        train(problem, balancer, backward)
        ends.append([*balancer.state_tensors().values(), *problem.parameters()])
    assert_equal_bits(*ends)


def test_a_step_runs_on_the_stream_that_is_current() -> None:
    expected, problem = on_device("cuda"), on_device("cuda")
    balancers = [excess_mtl(expected), excess_mtl(problem)]
    train(expected, balancers[0], backward, 3)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Two seconds, so that a kernel on any other stream would run before its gradients are there.
        torch.cuda._sleep(4_000_000_000)
        train(problem, balancers[1], backward, 3)
    assert not stream.query()  # nothing waited for the sleep
    stream.synchronize()
    assert_equal_bits(
        [balancers[1].task_weights, *problem.parameters()],
        [balancers[0].task_weights, *expected.parameters()],
    )


def run_with_scaler(init_scale: float, num_steps: int) -> tuple[Tensor, Problem, float]:
    problem = on_device("cuda")
    balancer = excess_mtl(problem)
    optimizer = torch.optim.SGD(problem.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cuda", init_scale=init_scale, growth_interval=10_000)
    for _ in range(num_steps):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            losses = problem.losses()
        scaler.scale(balancer(losses)).backward()
        scaler.step(optimizer)
        scaler.update()
    return balancer.task_weights, problem, scaler.get_scale()


def test_float16_under_autocast_and_a_scaler_stays_near_float32() -> None:
    problem = on_device("cuda")
    balancer = excess_mtl(problem)
    train(problem, balancer, backward, 60)
    weights, _, scale = run_with_scaler(2.0**10, 60)
    assert scale == 2.0**10  # no step was left out
    assert float((weights - balancer.task_weights).abs().max()) < 0.01
    assert float((weights - 1 / NUM_TASKS).abs().max()) > 0.05


def test_an_overflow_changes_neither_weights_nor_parameters() -> None:
    weights, problem, scale = run_with_scaler(2.0**40, 1)  # no float16 holds a gradient times that
    assert scale == 2.0**39
    assert weights.tolist() == pytest.approx([1 / NUM_TASKS] * NUM_TASKS)
    assert_equal_bits(list(problem.parameters()), list(on_device("cuda").parameters()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.11 imports what it deprecates
@pytest.mark.filterwarnings("ignore:TensorFloat32")  # and advises to round
def test_a_compiled_model_trains_as_an_eager_one() -> None:
    results = []
    for compile_losses in (lambda losses: losses, torch.compile):
        problem = on_device("cuda")
        balancer = excess_mtl(problem)
        losses = compile_losses(problem.losses)
        train(problem, balancer, lambda problem, balancer, of=losses: balancer.backward(of()))
        results.append([balancer.task_weights, *problem.parameters()])
    for compiled, eager in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_the_peak_is_that_of_the_allocator_of_the_device() -> None:
    block = 2 << 20  # bytes: large enough to be a block of its own

    def run() -> Tensor:
        kept = torch.empty(block, dtype=torch.uint8, device="cuda")
        passing = torch.empty(3 * block, dtype=torch.uint8, device="cuda")
        del passing
        return torch.cat([kept, kept])

    assert memory.measured_peak(run, torch.device("cuda")) == 4 * block


@pytest.fixture
def nccl() -> Iterator[dist.ProcessGroup]:
    if not dist.is_nccl_available():
        pytest.skip("torch was built without NCCL")
    dist.init_process_group(
        "nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0)
    )
    group = dist.group.WORLD
    assert group is not None
    yield group
    torch.cuda.synchronize()
    dist.destroy_process_group()


@pytest.mark.parametrize("reduce", ["grads", "risks"])
def test_a_group_of_one_over_nccl_gives_the_numbers_of_a_single_process(
    reduce: str, nccl: dist.ProcessGroup
) -> None:
    """One GPU is all that this test asks for; several ranks are shown over gloo, in test_distributed.py."""
    ends = []
    for options in ({}, {"process_group": nccl, "reduce": reduce}):
        problem = on_device("cuda")
        if options:
            options["model"] = torch.nn.ModuleList([problem.encoder, problem.heads])
        balancer = excess_mtl(problem, **options)
        train(problem, balancer, backward)
        ends.append([balancer.task_weights, *problem.parameters()])
    for alone, in_group in zip(*ends, strict=True):
        torch.testing.assert_close(in_group, alone, rtol=1e-5, atol=1e-7)
