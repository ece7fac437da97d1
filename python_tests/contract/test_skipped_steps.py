"""A step that does not count changes nothing, to the bit, in any method and mode, wherever the NaN or infinity is."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _published import published
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from excessmtl_ext import ExcessMTL, reference
from excessmtl_ext import functional as F

NUM_TASKS = 3
SIZES = (7, 33, 5)

METHODS: dict[str, Callable[..., ExcessMTL]] = {
    "recommended": lambda p, **o: ExcessMTL(p, **o),
    "official": lambda p, **o: ExcessMTL.from_preset("official", p, **o),
    "paper": lambda p, **o: ExcessMTL.from_preset("paper", p, num_warmup_steps=2, **o),
    "momentum": lambda p, **o: published(
        p, **{"gradient_momentum": 0.9, "fisher": "linear", "robust_step_size": 1.0, **o}
    ),
    "recommended, bfloat16": lambda p, **o: ExcessMTL(p, state_dtype=torch.bfloat16, **o),
    "official, bfloat16": lambda p, **o: ExcessMTL.from_preset(
        "official", p, state_dtype=torch.bfloat16, **o
    ),
}
MODES: dict[str, dict[str, Any]] = {
    "backward": {},
    "scalar": {},
    "given lists": {},
    "given matrix": {},
    "batched": {"batched": True},
    "features": {"estimate_from": "features"},
    "split": {"estimate_from": "features", "head_weighting": "none"},
    "subset": {},
    "rotation": {"tasks_per_step": 2},
    "rotation of a subset": {"tasks_per_step": 1},
    "update_every": {"update_every": 2},
    "raise": {"nonfinite": "raise"},
}
VALUES = (float("nan"), float("inf"), float("-inf"), 1e30)


class Spoiled(torch.autograd.Function):
    """The input as it is, with one element of its gradient replaced."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, at: int, bad: float) -> Tensor:
        ctx.at, ctx.bad = at, bad
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        spoiled = grads[0].clone()
        spoiled.view(-1)[ctx.at % spoiled.numel()] = ctx.bad
        return spoiled, None, None


class Run:
    """A small network under a balancer in one mode."""

    def __init__(self, method: str, mode: str) -> None:
        torch.manual_seed(0)
        self.mode = mode
        layers = [nn.Linear(SIZES[0], SIZES[1]), nn.Tanh(), nn.Linear(SIZES[1], SIZES[2])]
        self.encoder = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(SIZES[2], 1) for _ in range(NUM_TASKS))
        options = dict(MODES[mode])
        if "subset" in mode:
            options["estimate_from"] = list(layers[2].parameters())
        self.balancer = METHODS[method](self.encoder.parameters(), num_tasks=NUM_TASKS, **options)
        self.optimizer = torch.optim.AdamW(
            [*self.encoder.parameters(), *self.heads.parameters()], lr=1e-2
        )

    def step(self, number: int, bad: tuple[int, int, float] | None = None) -> bool:
        """One step on batch ``number``; ``bad``: (task, element, value). Returns whether it counted."""
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randn(8, SIZES[0], generator=generator)
        targets = torch.randn(NUM_TASKS, 8, 1, generator=generator)
        features = self.encoder(inputs)
        copies = self.balancer.split(features) if self.mode == "split" else [features] * NUM_TASKS
        losses = []
        for task, head in enumerate(self.heads):
            out = head(copies[task])
            if bad is not None and task == bad[0]:
                out = Spoiled.apply(out, bad[1], bad[2])
            losses.append(mse_loss(out, targets[task]))
        self.optimizer.zero_grad()
        balancer = self.balancer
        try:
            self._verb(losses, features)
        except FloatingPointError:
            assert balancer.nonfinite == "raise"
            return False
        counts = not bool(balancer.found_nonfinite.any())
        if counts:
            self.optimizer.step()
        return counts

    def _verb(self, losses: list[Tensor], features: Tensor) -> None:
        balancer, mode = self.balancer, self.mode
        if mode in ("batched", "features"):
            balancer.backward(losses, features=features)
        elif mode == "split":
            torch.stack(losses).sum().backward()
        elif mode == "scalar":
            balancer(losses).backward()
        elif mode.startswith("given"):
            shared = list(self.encoder.parameters())
            rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
            grads = [list(row) for row in rows]
            if mode == "given matrix":
                grads = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
            weights = balancer.update_weights(grads)
            if not bool(balancer.found_nonfinite.any()):
                (torch.stack(losses) * weights).sum().backward()
        else:
            balancer.backward(losses)

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.balancer.state_tensors().items()}


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        if name not in ("found_nonfinite", "num_skipped_steps", "ticket"):
            assert actual[name].dtype == tensor.dtype, name
            assert torch.equal(actual[name], tensor), name


def check(method: str, mode: str, draw: random.Random) -> None:
    struck, spared = Run(method, mode), Run(method, mode)
    num_before = 2 * draw.randrange(0, 4)  # update_every: the next step moves the weights
    for number in range(num_before):
        assert struck.step(number)
        assert spared.step(number)
    before = struck.state()
    # In a rotation only the tasks whose turn it is are looked at.
    waiting = getattr(struck.balancer.engine, "rotation", None)
    tasks = waiting.waiting[: waiting.tasks_per_step] if waiting is not None else range(NUM_TASKS)
    for _ in range(draw.randrange(1, 4)):
        bad = (draw.choice(list(tasks)), draw.randrange(8), draw.choice(VALUES))
        calls = struck.balancer.num_calls
        assert not struck.step(100, bad), bad
        assert bool(struck.balancer.found_nonfinite[bad[0]])
        struck.balancer.num_calls = calls  # update_every counts every call
    skipped = struck.state()
    for name, tensor in before.items():  # the first gradients size the state, with zeros
        if tensor.shape != skipped[name].shape:
            assert num_before == 0 and tensor.numel() == 0, name
            before[name] = torch.zeros_like(skipped[name])
    assert_same_state(skipped, before)
    for number in range(num_before, num_before + 4):
        assert struck.step(number)
        assert spared.step(number)
    assert_same_state(struck.state(), spared.state())
    for ours, theirs in zip(
        struck.optimizer.param_groups[0]["params"],
        spared.optimizer.param_groups[0]["params"],
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_a_skipped_step_leaves_every_bit_of_the_state(method: str, mode: str) -> None:
    check(method, mode, random.Random(f"{method} {mode}"))


@pytest.mark.parametrize("seed", range(40))
def test_a_drawn_step_that_is_skipped_leaves_every_bit_of_the_state(seed: int) -> None:
    draw = random.Random(seed)
    check(draw.choice(list(METHODS)), draw.choice(list(MODES)), draw)


@pytest.mark.parametrize("method", METHODS)
def test_a_streamed_step_leaves_the_faulty_task_and_the_weights(method: str) -> None:
    """The tasks before it have been taken in by then, and their gradients are gone."""
    run = Run(method, "backward")
    for number in range(3):
        assert run.step(number)
    before = run.state()
    inputs = torch.randn(8, SIZES[0], generator=torch.Generator().manual_seed(9))
    for task, head in enumerate(run.heads):
        out = head(run.encoder(inputs))
        if task == 1:
            out = Spoiled.apply(out, 3, float("nan"))
        run.balancer.accumulate(task, mse_loss(out, torch.zeros_like(out)))
    run.balancer.finish()
    after = run.state()
    assert run.balancer.found_nonfinite.tolist() == [False, True, False]
    assert int(run.balancer.num_skipped_steps) == 1
    for name in ("task_weights", "log_task_weights", "num_steps", "risk_share_sum"):
        assert torch.equal(after[name], before[name]), name
    for name in (
        "sq_grad_sum",
        "grad_mean",
        "baseline_excess_risk",
        "excess_risk",
        "num_task_steps",
    ):
        assert torch.equal(after[name][1], before[name][1]), name
    assert run.step(3)


def assert_equal_bits_of_rows(actual: F.StepState, expected: F.StepState) -> None:
    for name, ours, theirs in zip(F.StepState._fields, actual, expected, strict=True):
        if name not in ("found_nonfinite", "num_skipped_steps", "ticket"):
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.98])
@pytest.mark.parametrize("ops", [F, reference], ids=["ops", "reference"])
def test_gradients_beyond_what_a_sum_keeps_leave_no_trace(ops, momentum, grad):
    """2^24 times the sum: taking the square out again would leave 0."""
    layout = F.ParamLayout([5, 1000, 40_000])
    options = F.StepOptions(fisher="linear", gradient_momentum=momentum)
    dtype = torch.float64 if grad == torch.float64 else torch.float32
    state = F.init_state(2, layout, dtype=dtype, has_momentum=momentum > 0)
    generator = torch.Generator().manual_seed(0)
    small = [torch.randn(n, generator=generator).mul(1e-3).to(grad) for n in layout.numels * 2]
    ops.fused_step_(small, layout, state, options)
    before = F.StepState(*[tensor.clone() for tensor in state])
    for k, at in ((0, 0), (4, 999), (5, 39_999)):
        large = [g * 1e5 for g in small]
        large[k][at] = float("nan")
        outputs = [torch.zeros(n, dtype=grad) for n in layout.numels]
        ops.fused_step_combine_(large, outputs, layout, state, options)
        assert_equal_bits_of_rows(state, before)
        assert state.found_nonfinite.tolist() == [k < 3, k >= 3]
        assert all(bool(output.isnan().all()) for output in outputs)
    assert int(state.num_skipped_steps) == 3


@pytest.mark.parametrize("ops", [F, reference], ids=["ops", "reference"])
def test_rows_are_not_written_where_another_rank_is_at_fault(ops):
    layout = F.ParamLayout([5, 100])
    options = F.StepOptions()
    state = F.init_state(2, layout)
    grads = [torch.randn(n) for n in layout.numels * 2]
    sums = torch.full((2,), -1.0, dtype=torch.float64)
    rows = (state.sq_grad_sum, state.grad_mean, sums, state.ticket)
    flags = torch.tensor([False, True])
    ops.accumulate_excess_risk_(grads, layout, *rows, options, known_nonfinite=flags)
    assert sums[0] == 0
    assert sums[1].isnan()
    assert not state.sq_grad_sum.any()
    ops.accumulate_excess_risk_(
        grads, layout, *rows, options, known_nonfinite=torch.zeros(2, dtype=torch.bool)
    )
    assert bool((sums > 0).all())
    assert bool(state.sq_grad_sum.any(1).all())


@pytest.mark.parametrize("scale", [None, 1024.0, 2.0**-80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_found_is_what_the_ops_skip(dtype, scale):
    """A square counts without the loss scale: 1e19 ends float32, whatever the gradient was multiplied by."""
    layout = F.ParamLayout([3, 40])
    factor = 1.0 if scale is None else scale
    grad_scale = None if scale is None else torch.tensor(scale)
    for value in (0.0, 1e18, 1.8e19, 1.9e19, 1e30, float("inf"), float("nan")):
        grads = [torch.zeros(n) for n in layout.numels * 2]
        grads[3][39] = value * factor
        state = F.init_state(2, layout, dtype=dtype)
        found = F.find_nonfinite(grads, 2, dtype, grad_scale)
        F.fused_step_(grads, layout, state, F.StepOptions(), grad_scale)
        assert state.found_nonfinite.tolist() == found.tolist()
        if grads[3].isfinite().all():
            assert found.tolist() == [False, dtype == torch.float32 and value > 1.85e19]
