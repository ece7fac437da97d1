"""Faults injected while training: what each does to the state, to the weights and to the steps after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from _published import published
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from excessmtl_ext import (
    FAMO,
    IMTL,
    MGDA,
    MOML,
    Balancer,
    DualBalancing,
    DynamicWeightAverage,
    ExcessMTL,
    FixedWeights,
    GradNorm,
    GroupDRO,
    InverseNorm,
    SingleTask,
    SmoothTchebycheff,
    UncertaintyWeights,
    Uniform,
)
from excessmtl_ext.bounded_moves import RAMP_STEPS
from excessmtl_ext.models import lenet, mlp

NUM_TASKS = 3
FAULTY = 1  # the task that every fault strikes
NUM_CLASSES = 4

METHODS: dict[str, Callable[..., Balancer]] = {
    "excessmtl": lambda p, **o: published(p, robust_step_size=0.3, **o),
    "official": lambda p, **o: ExcessMTL.from_preset("official", p, **o),
    "paper": lambda p, **o: ExcessMTL.from_preset("paper", p, num_warmup_steps=2, **o),
    "momentum": lambda p, **o: published(
        p, **{"gradient_momentum": 0.98, "fisher": "linear", "robust_step_size": 3.0, **o}
    ),
    "recommended": ExcessMTL,
    "uniform": Uniform,
    "single task": lambda p, **o: SingleTask(p, task=FAULTY if o["num_tasks"] == 3 else 0, **o),
    "groupdro": lambda p, **o: GroupDRO(p, robust_step_size=0.1, **o),
    "gradnorm": GradNorm,
    "mgda": MGDA,
    "imtl-g": lambda p, **o: IMTL(p, variant="G", **o),
    "imtl-l": lambda p, **o: IMTL(p, variant="L", robust_step_size=0.1, **o),
    "imtl": lambda p, **o: IMTL(p, robust_step_size=0.1, **o),
    "moml": MOML,
    "fixed": lambda p, **o: FixedWeights(p, weights=[2.0] * o["num_tasks"], **o),
    "uncertainty": UncertaintyWeights,
    "dwa": DynamicWeightAverage,
    "famo": FAMO,
    "stch": SmoothTchebycheff,
    "dbmtl": DualBalancing,
    "inverse-norm": InverseNorm,
    "uniform, sized": lambda p, **o: Uniform(p, combine="per_tensor", **o),
    "groupdro, sized": lambda p, **o: GroupDRO(p, robust_step_size=0.1, combine="per_tensor", **o),
}
EXCESS = ("excessmtl", "official", "paper", "momentum", "recommended")
# What a method looks at, and so what it can notice. MOML looks at validation gradients, which test_moml.py spoils.
SIZED = ("uniform, sized", "groupdro, sized")
SEES_GRADIENTS = (*EXCESS, "gradnorm", "mgda", "imtl-g", "imtl", "dbmtl", "inverse-norm", *SIZED)
LOSSES_ONLY = ("groupdro", "uncertainty", "dwa", "famo", "stch")
SEES_LOSSES = (*LOSSES_ONLY, "groupdro, sized", "gradnorm", "imtl-l", "imtl", "dbmtl")
HAS_NO_MEMORY = ("uniform", "single task", "moml", "fixed")  # nothing that a bad step could spoil
WITHOUT_WEIGHT_TO_KEEP = ("mgda", "imtl-g", "imtl", "moml")  # an absent task counts as uniform

every_method = pytest.mark.parametrize("name", METHODS)
every_network = pytest.mark.parametrize("network", ["lenet", "mlp"])

Fault = Callable[[list[Tensor]], list[Any]]


@dataclass
class Run:
    """A network, its balancer and its optimizer, and the loop that the documentation asks for."""

    network: str
    model: nn.Module
    balancer: Balancer
    optimizer: torch.optim.Optimizer

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(number)
        if self.network == "lenet":
            inputs = torch.randn(3, 1, 16, 16, generator=generator)
            return inputs, torch.randint(NUM_CLASSES, (3, NUM_TASKS), generator=generator)
        inputs = torch.randn(8, 5, generator=generator)
        return inputs, torch.randn(8, NUM_TASKS, generator=generator)

    def losses(self, number: int) -> list[Tensor]:
        inputs, targets = self.batch(number)
        outputs = self.model(inputs)
        if self.network == "lenet":
            return [cross_entropy(out, targets[:, task]) for task, out in enumerate(outputs)]
        return [mse_loss(out[:, 0], targets[:, task]) for task, out in enumerate(outputs)]

    def step(self, number: int, fault: Fault = lambda losses: losses) -> bool:
        """One step on batch ``number``; returns whether the optimizer took it: not with NaN or inf in a gradient."""
        self.optimizer.zero_grad()
        if isinstance(self.balancer, MOML):
            self.balancer.observe_validation(self.losses(1000 + number))
        self.balancer.backward(fault(self.losses(number)))
        is_finite = all(
            bool(p.grad.isfinite().all()) for p in self.model.parameters() if p.grad is not None
        )
        if is_finite:
            self.optimizer.step()
        if is_finite and isinstance(self.balancer, FAMO):
            self.balancer.after_step(self.losses(number))
        return is_finite

    def weigh(self, number: int, fault: Fault = lambda losses: losses) -> None:
        """The balancer's part of a step, on a network that rests; MOML validates on the same losses."""
        if isinstance(self.balancer, MOML):
            self.balancer.observe_validation(fault(self.losses(number)))
        self.balancer.backward(fault(self.losses(number)))

    def end_weighing(self) -> None:
        """Tells FAMO that the losses have not moved."""
        if isinstance(self.balancer, FAMO):
            self.balancer.after_step(self.balancer.losses_before)

    def parameters(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.balancer.state_tensors().items()}

    def assert_sound(self, name: str) -> None:
        """No NaN in the parameters, and weights of the promised sum."""
        assert all(bool(p.isfinite().all()) for p in self.model.parameters())
        weights = self.balancer.task_weights
        assert bool(weights.isfinite().all())
        assert weights.sum().item() == pytest.approx(self.balancer.weight_total, rel=1e-9)
        if not name.startswith("imtl"):  # those of IMTL-G may be negative
            assert bool((weights >= 0).all())


def make_run(name: str, network: str, **options: Any) -> Run:
    torch.manual_seed(0)
    if network == "lenet":
        model = lenet([NUM_CLASSES] * NUM_TASKS, image_size=16)
    else:
        model = mlp([5], [1] * NUM_TASKS, hidden=(16, 8))
    balancer = METHODS[name](model.encoder.parameters(), num_tasks=NUM_TASKS, **options)
    return Run(network, model, balancer, torch.optim.Adam(model.parameters(), lr=1e-2))


class Spoiled(torch.autograd.Function):
    """The loss as it is, with a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def in_gradient(factor: float) -> Fault:
    return lambda losses: [
        Spoiled.apply(loss, factor) if task == FAULTY else loss for task, loss in enumerate(losses)
    ]


def in_loss(factor: float) -> Fault:
    return lambda losses: [
        loss * factor if task == FAULTY else loss for task, loss in enumerate(losses)
    ]


def is_absent(losses: list[Tensor]) -> list[Tensor | None]:
    return [None if task == FAULTY else loss for task, loss in enumerate(losses)]


@contextmanager
def one_element(run: Run, value: float) -> Iterator[None]:
    """Puts ``value`` into one element of one shared parameter's gradient, in the pass of the faulty task."""
    passes = 0
    has_pass_per_task = "task_grads" in run.balancer.requires

    def spoil(grad: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if passes != (1 + FAULTY if has_pass_per_task else 1):
            return grad
        spoiled = grad.clone()
        spoiled.view(-1)[3] = value
        return spoiled

    weight = next(run.model.encoder.parameters())
    if isinstance(
        run.balancer, MOML
    ):  # the passes that it observes come first, and are not the ones to spoil
        passes = -NUM_TASKS
    handle = weight.register_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


NONFINITE = {
    "nan in one element": (None, float("nan")),
    "inf in one element": (None, float("inf")),
    "nan in one task": (in_gradient, float("nan")),
    "inf in one task": (in_gradient, float("inf")),
    "nan in the loss": (in_loss, float("nan")),
    "inf in the loss": (in_loss, float("inf")),
}


def strike(run: Run, kind: str, number: int) -> bool:
    where, value = NONFINITE[kind]
    if where is None:
        with one_element(run, value):
            return run.step(number)
    return run.step(number, where(value))


@pytest.mark.parametrize(
    ("network", "kind"),
    [("mlp", kind) for kind in NONFINITE]
    + [("lenet", kind) for kind in ("nan in one element", "inf in one task", "nan in the loss")],
)
@every_method
def test_a_nonfinite_gradient_costs_one_step_and_nothing_else(name, network, kind):
    struck, spared = make_run(name, network), make_run(name, network)
    for number in range(3):
        struck.step(number)
        spared.step(number)
    state, parameters = struck.state(), struck.parameters()

    assert not strike(struck, kind, 99)
    assert all(map(torch.equal, struck.parameters(), parameters))
    is_seen = name in SEES_GRADIENTS or (name in SEES_LOSSES and "loss" in kind)
    if is_seen:
        assert struck.balancer.found_nonfinite.tolist() == [False, True, False]
        assert int(struck.balancer.num_skipped_steps) == 1
        for key, before in state.items():
            if key not in ("found_nonfinite", "num_skipped_steps", "ticket"):
                assert torch.equal(getattr(struck.balancer, key), before), key

    for number in range(3, 6):
        assert struck.step(number)
        spared.step(number)
    struck.assert_sound(name)
    if is_seen or name in HAS_NO_MEMORY:
        assert all(map(torch.equal, struck.parameters(), spared.parameters()))


# ---- absent tasks


@every_method
def test_a_task_absent_for_ever_leaves_the_others_as_if_it_did_not_exist(name):
    run = make_run(name, "mlp")
    others = METHODS[name](run.model.encoder.parameters(), num_tasks=NUM_TASKS - 1)
    alone = Run("mlp", run.model, others, run.optimizer)
    for number in range(20):
        run.weigh(number, is_absent)
        alone.weigh(number, lambda losses: [losses[0], losses[2]])
        run.end_weighing()
        alone.end_weighing()
        if name != "single task":  # it trains the absent one
            share = run.balancer.weight_total / others.weight_total * 2 / 3
            actual = run.balancer.task_weights[[0, 2]]
            if (
                name == "recommended"
            ):  # an absent task is no constant mass there: the others keep their ratio
                share = actual.sum() / others.weight_total
            torch.testing.assert_close(actual, others.task_weights * share, rtol=1e-9, atol=0)
    run.assert_sound(name)
    if name in EXCESS:
        assert int(run.balancer.num_task_steps[FAULTY]) == 0
        assert not run.balancer.sq_grad_sum[FAULTY].any()
        assert not run.balancer.baseline_excess_risk[FAULTY].any()


@every_method
def test_a_task_absent_for_a_thousand_steps_comes_back_as_it_left(name):
    shared = nn.Parameter(torch.zeros(5))
    balancer = METHODS[name]([shared], num_tasks=NUM_TASKS)
    generator = torch.Generator().manual_seed(0)

    def weigh(absent: bool) -> None:
        rows = torch.randn(NUM_TASKS, 5, generator=generator)
        if "task_grads" in balancer.requires or isinstance(balancer, MOML):
            grads = [[] if absent and task == FAULTY else [rows[task]] for task in range(NUM_TASKS)]
            balancer.update_weights(grads, losses=rows.square().sum(1))
        else:
            losses = [(row * shared).sum() + row.square().sum() for row in rows]
            balancer.backward(is_absent(losses) if absent else losses)
            if isinstance(balancer, FAMO):
                balancer.after_step([0.9 * loss for loss in losses])

    if isinstance(balancer, MOML):
        balancer.update_weights(torch.ones(NUM_TASKS, 5))
    for _ in range(3):
        weigh(absent=False)
    before = {key: tensor.clone() for key, tensor in balancer.state_tensors().items()}
    for _ in range(1000):
        weigh(absent=True)
    if (
        name == "recommended"
    ):  # weights follow from all tasks' shares: they stay within their bounds
        spread = balancer.task_weights.log().max() - balancer.task_weights.log().min()
        assert spread.item() <= balancer.max_log_ratio + 1e-12
    else:
        kept = 1 / 3 if name in WITHOUT_WEIGHT_TO_KEEP else before["task_weights"][FAULTY].item()
        assert balancer.task_weights[FAULTY].item() == pytest.approx(kept, rel=1e-10)
    assert balancer.task_weights.sum().item() == pytest.approx(balancer.weight_total, rel=1e-12)
    if name in EXCESS:
        for key in ("sq_grad_sum", "grad_mean", "baseline_excess_risk", "num_task_steps"):
            assert torch.equal(getattr(balancer, key)[FAULTY], before[key][FAULTY]), key
    weigh(absent=False)
    assert bool(balancer.task_weights.isfinite().all())
    if name in EXCESS:
        assert balancer.num_task_steps.tolist() == [1004, 4, 1004]


@pytest.mark.parametrize("first", ["absent", "without a gradient"])
@every_method
def test_a_task_that_begins_late_is_measured_from_its_own_beginning(name, first):
    """Absent, or with a gradient of zero, for ten steps and longer than any warm-up: no risk over a baseline of 0."""
    run = make_run(name, "mlp")
    for number in range(10):
        assert run.step(number, is_absent if first == "absent" else in_gradient(0.0))
        run.assert_sound(name)
    before = run.balancer.task_weights.clone()
    run.weigh(10)
    run.assert_sound(name)
    if name in EXCESS:
        assert run.balancer.baseline_excess_risk[FAULTY] > 0
        ratio = run.balancer.task_weights / before
        moved = (ratio[FAULTY] / ratio[0]).log().item()
        if name == "recommended":  # its share counts from the next step on
            assert abs(moved) <= run.balancer.max_log_ratio / RAMP_STEPS
            return
        assert run.balancer.relative_excess_risk[FAULTY].item() == pytest.approx(1.0)
        difference = 1.0 - run.balancer.relative_excess_risk[0].item()
        assert moved == pytest.approx(run.balancer.robust_step_size * difference, abs=1e-9)


# ---- losses that are finite and wrong


@pytest.mark.parametrize("factor", [1e30, 1e-30])
@every_network
@every_method
def test_a_loss_that_explodes_or_vanishes_leaves_everything_finite(name, network, factor):
    run = make_run(name, network)
    for number in range(3):
        run.step(number)
    before = run.state()
    run.optimizer.zero_grad()
    run.weigh(3, in_loss(factor))
    if name in EXCESS and factor > 1:  # its squares are beyond float32: counted as not finite
        assert run.balancer.found_nonfinite.tolist() == [False, True, False]
        assert torch.equal(run.balancer.task_weights, before["task_weights"])
    weights = run.balancer.task_weights
    assert bool(weights.isfinite().all())
    assert weights.sum().item() == pytest.approx(run.balancer.weight_total)
    run.optimizer.zero_grad()
    for number in range(4, 8):
        assert run.step(number)
    run.assert_sound(name)


@pytest.mark.parametrize("name", EXCESS)
def test_a_task_whose_loss_vanishes_for_a_while_recovers_its_weight(name):
    """Its risk falls to 0 and its weight with it; back at its scale, the weight rises again."""
    struck, spared = make_run(name, "mlp"), make_run(name, "mlp")
    for number in range(40):
        struck.weigh(number, in_gradient(1.0 if number < 3 else 1e-30))
        spared.weigh(number)
    low = struck.balancer.task_weights[FAULTY].clone()
    if name != "recommended":  # no size of a loss decides there
        assert low < 0.99 * spared.balancer.task_weights[FAULTY]
    for number in range(40, 60):
        struck.weigh(number, in_gradient(100.0))
    if name == "recommended":
        log_weights = struck.balancer.task_weights.log()
        assert log_weights.max() - log_weights.min() <= struck.balancer.max_log_ratio + 1e-12
    else:
        assert struck.balancer.task_weights[FAULTY] > low
    struck.assert_sound(name)


@pytest.mark.parametrize("name", EXCESS)
@every_network
def test_a_batch_of_noise_moves_the_weights_by_what_the_equation_says(name, network):
    run = make_run(name, network)
    for number in range(8):
        run.step(number)
    before = run.balancer.task_weights.log()
    inputs, targets = run.batch(8)
    outputs = run.model(inputs)
    noise = torch.Generator().manual_seed(1)
    run.optimizer.zero_grad()
    if network == "lenet":
        wrong = torch.randint(NUM_CLASSES, targets.shape, generator=noise)
        losses = [cross_entropy(out, wrong[:, task]) for task, out in enumerate(outputs)]
    else:
        wrong = 3 * torch.randn(targets.shape, generator=noise)
        losses = [mse_loss(out[:, 0], wrong[:, task]) for task, out in enumerate(outputs)]
    run.balancer.backward(losses)
    if name == "recommended":  # weights follow from the relative risks, step by step anew
        moved = run.balancer.task_weights.log()
        expected = run.balancer.max_log_ratio * run.balancer.relative_excess_risk
    else:
        moved = run.balancer.task_weights.log() - before
        expected = run.balancer.robust_step_size * run.balancer.relative_excess_risk
    torch.testing.assert_close(moved - moved[0], expected - expected[0], rtol=1e-6, atol=1e-9)
    assert int(run.balancer.num_skipped_steps) == 0
    run.assert_sound(name)


@every_network
@every_method
def test_a_float16_overflow_backs_the_scaler_off_and_changes_no_parameter(name, network):
    run = make_run(name, network)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1000)
    tiny = 1e-4  # float16 ends at 65,504: these losses fit under the scale, those times 1e4 do not

    def step(number: int, factor: float) -> None:
        run.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            losses = [loss * factor for loss in run.losses(number)]
        if isinstance(run.balancer, MOML):
            run.balancer.observe_validation(run.losses(number))
        scaler.scale(run.balancer(losses)).backward()
        scaler.step(run.optimizer)
        scaler.update()

    for number in range(3):
        step(number, tiny)
    before, parameters = run.state(), run.parameters()
    assert scaler.get_scale() == 2.0**20
    step(3, 1e4)
    assert scaler.get_scale() == 2.0**19
    assert all(map(torch.equal, run.parameters(), parameters))
    if name in SEES_GRADIENTS:
        assert int(run.balancer.num_skipped_steps) == 1
        assert torch.equal(run.balancer.task_weights, before["task_weights"])
    for number in range(4, 6):
        step(number, tiny)
    assert scaler.get_scale() == 2.0**19
    assert not all(map(torch.equal, run.parameters(), parameters))
    run.assert_sound(name)


# ---- parameters that change under the balancer


@every_method
def test_parameters_whose_storage_is_replaced_train_as_before(name):
    plain, replaced = make_run(name, "mlp"), make_run(name, "mlp")
    for number in range(4):
        plain.step(number)
        replaced.step(number)
        for parameter in replaced.model.parameters():
            parameter.data = parameter.data.clone()
    assert all(map(torch.equal, plain.parameters(), replaced.parameters()))
    assert all(map(torch.equal, plain.state().values(), replaced.state().values()))


@pytest.mark.parametrize("name", [name for name in METHODS if name in SEES_GRADIENTS])
def test_replaced_parameter_objects_are_an_error_and_change_nothing(name):
    """The losses depend on new objects that the balancer was not given."""
    run = make_run(name, "mlp")
    run.step(0)
    before = run.state()
    for layer in run.model.encoder:
        for key, parameter in list(layer.named_parameters()):
            setattr(layer, key, nn.Parameter(parameter.detach().clone()))
    with pytest.raises(
        ValueError, match="that the parameters given to the balancer are the model's"
    ):
        run.balancer.backward(run.losses(1))
    assert all(map(torch.equal, run.state().values(), before.values()))


@every_method
def test_one_replaced_parameter_counts_as_a_heads(name):
    """Nothing tells it from a head that serves all tasks: it gets their plain sum."""
    run = make_run(name, "mlp")
    run.step(0)
    layer = run.model.encoder[1]
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    run.model.zero_grad()
    plain = run.losses(1)
    total = plain[FAULTY] if name == "single task" else sum(plain)
    (expected,) = torch.autograd.grad(total, [layer.weight])
    run.weigh(1)
    if name != "official":  # which weighs heads
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-4, atol=1e-6)
    run.assert_sound(name)


@every_network
@every_method
def test_a_parameter_frozen_midway_rests_and_the_others_train_on(name, network):
    run = make_run(name, network)
    for number in range(3):
        run.step(number)
    first, *rest = run.model.encoder.parameters()
    frozen, others = first.detach().clone(), [p.detach().clone() for p in rest]
    first.requires_grad_(False)
    run.optimizer = torch.optim.Adam([p for p in run.model.parameters() if p.requires_grad])
    first.grad = None
    before = run.state()
    for number in range(3, 6):
        assert run.step(number)
        assert first.grad is None
    run.assert_sound(name)
    assert torch.equal(first, frozen)
    assert not any(map(torch.equal, rest, others))
    if name in EXCESS:
        numel = first.numel()
        for key in ("sq_grad_sum", "grad_mean"):
            now, then = getattr(run.balancer, key), before[key]
            assert torch.equal(now[:, :numel], then[:, :numel])
            assert then.numel() == 0 or not torch.equal(now, then)
    first.requires_grad_(True)
    run.step(6)
    assert first.grad is not None
    run.assert_sound(name)
