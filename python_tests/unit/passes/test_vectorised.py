"""One vectorised pass of the encoder equals T passes, is chosen by measurement, and gives way where it must."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from _inputs import make_problem
from _published import published
from test_cut import FORWARDS, MAKES, Forward, one_tensor, own_inputs, train
from torch import Tensor, nn

from excessmtl_ext import GradNorm
from excessmtl_ext.passes import vectorised
from excessmtl_ext.passes.vectorised import HOPELESS, NUM_TIMED_STEPS, NUM_UNTIMED_STEPS

MEASURED_STEPS = 2 * (NUM_UNTIMED_STEPS + NUM_TIMED_STEPS)


@pytest.mark.parametrize("batched", [True, "auto"])
@pytest.mark.parametrize("how", ["list", "absent", "scalar"])
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("make", ["excess", "weighted_heads", "mgda"])
def test_batched_passes_change_no_result(make, forward, how, batched):
    plain, plain_grads, plain_weights = train(MAKES[make], forward, how, with_features=False)
    fast, fast_grads, fast_weights = train(
        MAKES[make], forward, how, with_features=True, batched=batched
    )
    torch.testing.assert_close(fast.task_weights, plain.task_weights)
    torch.testing.assert_close(fast_weights, plain_weights)
    for mine, theirs in zip(fast_grads, plain_grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "layers",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.LayerNorm(8), nn.GELU()),
        lambda: nn.Sequential(
            nn.Flatten(2),
            nn.TransformerEncoderLayer(64, 4, 32, dropout=0.0, batch_first=True),
            nn.Flatten(),
        ),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Dropout(0.5)),
    ],
    ids=["conv", "norm", "attention", "dropout"],
)
def test_common_layers_can_be_batched(layers):
    grads = {}
    for batched in (False, True):
        torch.manual_seed(0)
        encoder = layers().double()
        inputs = torch.randn(5, 3, 8, 8, dtype=torch.float64)
        features = encoder(inputs)
        heads = [nn.Linear(features[0].numel(), 2).double() for _ in range(3)]
        losses = [head(features.flatten(1)).square().mean() for head in heads]
        balancer = published(encoder.parameters(), num_tasks=3, batched=batched)
        balancer.backward(losses, features=features)
        expected = (
            "one vectorised pass (batched=True)" if batched else "one pass per task (batched=False)"
        )
        assert balancer.backward_mode == expected
        grads[batched] = [parameter.grad for parameter in encoder.parameters()]
    for mine, theirs in zip(grads[True], grads[False], strict=True):
        torch.testing.assert_close(mine, theirs)


class WithoutRule(torch.autograd.Function):
    """A layer that torch cannot vectorise."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2.0

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.from_numpy(grad.numpy() * 2.0)


@pytest.mark.parametrize("batched", [True, "auto"])
def test_a_layer_that_cannot_be_batched_falls_back_and_says_so(batched):
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3, batched=batched)
    twin = make_problem()
    plain = published(twin.encoder.parameters(), num_tasks=3)
    for _ in range(3):
        for p, b, options in ((problem, balancer, True), (twin, plain, False)):
            features = WithoutRule.apply(p.encoder(p.inputs))
            assert isinstance(features, Tensor)
            losses = [head(features).square().mean() for head in p.heads]
            b.backward(losses, features=features if options else None)
    assert balancer.backward_mode.startswith("one pass per task (a layer cannot be batched: ")
    for mine, theirs in zip(problem.grads(), twin.grads(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("forward", "given", "reason"),
    [
        (one_tensor, False, "no features were given"),
        (own_inputs, True, "a task has features of its own"),
    ],
)
def test_the_reason_for_ordinary_passes_is_told(forward: Forward, given, reason):
    balancer, _, _ = train(MAKES["excess"], forward, "list", with_features=given, batched=True)
    assert balancer.backward_mode == f"one pass per task ({reason})"
    assert reason in str(balancer.report())


def test_a_hook_on_a_shared_parameter_sees_the_gradient_of_one_task():
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3, batched=True)
    shapes = []
    problem.encoder[0].weight.register_hook(lambda grad: shapes.append(grad.shape))
    features, losses = one_tensor(problem)
    balancer.backward(losses, features=features)
    assert shapes == [problem.encoder[0].weight.shape] * 3
    assert balancer.backward_mode == "one pass per task (a shared parameter has a hook)"


class Clock:
    """Time stands still but for what the test says a pass takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[bool, float]) -> None:
        self.now = 0.0
        self.ran: list[bool] = []
        monkeypatch.setattr(vectorised, "_clock", lambda device: self.now)
        for batched, name in ((True, "walk_encoder_batched"), (False, "walk_encoder")):
            walk = getattr(vectorised.Cut, name)

            def timed(cut, *args, walk=walk, batched=batched, **options):
                self.ran.append(batched)
                self.now += seconds[batched]
                return walk(cut, *args, **options)

            monkeypatch.setattr(vectorised.Cut, name, timed)


@pytest.mark.parametrize("faster", [True, False])
def test_auto_tries_both_and_keeps_the_faster(monkeypatch, faster):
    clock = Clock(monkeypatch, {faster: 1.0, not faster: 1.5})
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3, batched="auto")
    for _ in range(MEASURED_STEPS + 3):
        features, losses = one_tensor(problem)
        balancer.backward(losses, features=features)
    assert clock.ran == [False, True] * (MEASURED_STEPS // 2) + [faster] * 3
    kind = "one vectorised pass" if faster else "one pass per task"
    vectorised, per_task = (1e3, 1.5e3) if faster else (1.5e3, 1e3)
    told = f"{kind} (measured: {vectorised:.3g} ms vectorised, {per_task:.3g} ms per task)"
    assert balancer.backward_mode == told
    assert told in str(balancer.report())


def test_auto_gives_a_hopeless_pass_up_after_its_first_timed_step(monkeypatch):
    clock = Clock(monkeypatch, {True: HOPELESS + 0.5, False: 1.0})
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3, batched="auto")
    for _ in range(MEASURED_STEPS):
        features, losses = one_tensor(problem)
        balancer.backward(losses, features=features)
    assert clock.ran.count(True) == NUM_UNTIMED_STEPS + 1


def test_reset_measures_again(monkeypatch):
    clock = Clock(monkeypatch, {True: 1.0, False: 1.5})
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3, batched="auto")
    for _ in range(MEASURED_STEPS):
        features, losses = one_tensor(problem)
        balancer.backward(losses, features=features)
    balancer.reset()
    assert balancer.backward_mode == "none (no step so far)"
    features, losses = one_tensor(problem)
    balancer.backward(losses, features=features)
    assert clock.ran[-1] is False


def test_the_gradient_left_behind_does_not_keep_those_of_all_tasks_alive():
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3, batched=True)
    features, losses = one_tensor(problem)
    balancer.backward(losses, features=features)
    assert balancer.backward_mode == "one vectorised pass (batched=True)"
    for parameter in problem.encoder.parameters():
        assert parameter.grad is not None
        assert parameter.grad.untyped_storage().nbytes() == parameter.numel() * 4


@pytest.mark.parametrize("value", ["yes", None, 1])
def test_wrong_batched_raises(value):
    with pytest.raises(
        ValueError, match="Expected `batched` to be True, False, 'auto' or 'stacked'"
    ):
        published(make_problem().encoder.parameters(), num_tasks=3, batched=value)
    with pytest.raises(
        ValueError, match="Expected `batched` to be True, False, 'auto' or 'stacked'"
    ):
        GradNorm(make_problem().encoder.parameters(), num_tasks=3, batched=value)


def bytecodes_of_a_step(num_tasks: int, num_layers: int, how: str) -> int:
    """Bytecode instructions that the interpreter executes in a step; what runs in built-ins and in torch is none."""
    encoder = nn.Sequential(*[nn.Linear(4, 4) for _ in range(num_layers)])
    heads = [nn.Linear(4, 1) for _ in range(num_tasks)]
    balancer = published(encoder.parameters(), num_tasks=num_tasks, batched=how == "batched")
    inputs = torch.randn(3, 4)
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    for step in range(3):
        features = encoder(inputs)
        losses = [head(features).square().mean() for head in heads]
        before = sys.gettrace()
        gc.disable()  # or the finalisers of what other tests left would count
        if step == 2:  # the first ones size state and try the vectorised pass
            sys.settrace(trace)
        try:
            balancer.backward(losses, features=None if how == "plain" else features)
        finally:
            sys.settrace(before)
            gc.enable()
    return count


@pytest.mark.parametrize("how", ["plain", "features", "batched"])
def test_no_python_loop_of_a_step_grows_with_tasks_times_parameters(how):
    counts = {
        (num_tasks, num_layers): bytecodes_of_a_step(num_tasks, num_layers, how)
        for num_tasks, num_layers in ((4, 2), (8, 2), (16, 2), (4, 10), (8, 10))
    }
    # An affine function of T and of L: its mixed difference is zero, and the cost of a task is constant.
    assert counts[8, 10] - counts[4, 10] == counts[8, 2] - counts[4, 2]
    assert counts[16, 2] - counts[8, 2] == 2 * (counts[8, 2] - counts[4, 2])
