"""Gradients that are dense in any order are taken as they lie, and states are saved contiguous."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _published import published
from torch import Tensor, nn

from excessmtl_ext import ExcessMTL, compiled_step
from excessmtl_ext.dense_order import order_of, reordered
from excessmtl_ext.state import padded_numel

NUM_TASKS = 3


def channels_last(*shape: int) -> Tensor:
    """A random tensor whose channels are the fastest dimension."""
    return torch.randn(shape).to(memory_format=torch.channels_last)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "channels_last": lambda: channels_last(4, 3, 2, 5),
    "one pixel": lambda: channels_last(4, 3, 1, 1),
    "one channel": lambda: channels_last(4, 1, 3, 3),
    "3-d": lambda: torch.randn(2, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d),
    "transposed": lambda: torch.randn(3, 5).t(),
    "any": lambda: torch.randn(2, 3, 4, 5).permute(3, 0, 2, 1),
    "contiguous": lambda: torch.randn(2, 3, 4),
    "number": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
}
GAPS: dict[str, Callable[[], Tensor]] = {
    "every second": lambda: torch.randn(4, 6)[:, ::2],
    "expanded": lambda: torch.randn(4, 1).expand(4, 3),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_a_dense_tensor_is_seen_contiguous_and_comes_back(make: Callable[[], Tensor]) -> None:
    tensors = [torch.randn(7).as_strided((2, 3), (1, 2)), make()]
    order = order_of(tensors)
    assert order is not None
    seen = order.seen(tensors)
    for each, tensor in zip(seen, tensors, strict=True):
        assert each is not None
        assert each.is_contiguous()
        assert each.data_ptr() == tensor.data_ptr()
    assert order.seen([None, tensors[1]])[0] is None
    for each, tensor in zip(order.undone([t for t in seen if t is not None]), tensors, strict=True):
        assert each.stride() == tensor.stride()
        assert torch.equal(each, tensor)


@pytest.mark.parametrize("make", GAPS.values(), ids=GAPS)
def test_a_tensor_with_gaps_or_overlaps_is_seen_as_it_is(make: Callable[[], Tensor]) -> None:
    assert order_of([make()]) is None


def test_contiguous_parameters_have_no_order() -> None:
    assert order_of([torch.randn(2, 3), channels_last(4, 3, 1, 1)]) is None


def test_state_is_brought_into_an_order_and_back() -> None:
    tensors = [make() for make in LAYOUTS.values()]
    order = order_of(tensors)
    other = order_of([torch.randn(t.shape) if t.dim() == 4 else t for t in tensors])
    assert order is not None
    assert other is not None
    flat = torch.randn(2, sum(padded_numel(t.numel()) for t in tensors))
    there = reordered(flat, None, order)
    assert not torch.equal(there, flat)
    assert torch.equal(reordered(there, order, None), flat)
    assert torch.equal(reordered(there, order, other), reordered(flat, None, other))
    start = 0
    for tensor, seen in zip(tensors, order.seen(tensors), strict=True):
        assert seen is not None
        part = slice(start, start + tensor.numel())
        start += padded_numel(tensor.numel())
        values = flat[0, part].view(tensor.shape)
        place = torch.empty_like(tensor).copy_(values)
        expected = order_of([tensor])
        mine = place if expected is None else expected.seen([place])[0]
        assert mine is not None
        assert torch.equal(there[0, part], mine.reshape(-1))


def network(dtype: torch.dtype) -> nn.Sequential:
    """Convolutions, a norm and a bias."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),  # of a bias before a norm the gradient is rounding
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 2),
        nn.Flatten(),
    ).to(dtype)


def losses_of(encoder: nn.Module, seed: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Features, and one loss per task."""
    torch.manual_seed(seed)
    features = encoder(torch.randn(2, 3, 6, 6, dtype=dtype))
    heads = [torch.randn(features.shape[1], 2, dtype=dtype) for _ in range(NUM_TASKS)]
    return features, [(features @ head).square().mean() for head in heads]


OPTIONS = {
    "published": {},
    "default": {
        "robust_step_size": None,
        "combine": None,
        "fisher": "linear",
        "gradient_momentum": 0.98,
        "eps": 1e-30,
    },
    "momentum": {"fisher": "linear", "gradient_momentum": 0.9},
    "weighted heads": {"head_weighting": "task_weights"},
    "every second": {"update_every": 2},
    "raise": {"nonfinite": "raise"},
    "stacked": {"batched": "stacked"},
}


class Pair:
    """A contiguous network and the same one in channels_last, each with a balancer."""

    def __init__(self, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        self.dtype = dtype
        self.tolerance: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-10}
        if dtype is torch.float32:
            self.tolerance = {"rtol": 1e-4, "atol": 1e-6}
        plain = network(dtype)
        self.encoders = [plain, copy.deepcopy(plain).to(memory_format=torch.channels_last)]
        self.balancers = [
            published(encoder.parameters(), num_tasks=NUM_TASKS, **options)
            for encoder in self.encoders
        ]

    def step(self, seed: int, how: str = "plain", *, keeps: bool = False) -> None:
        for encoder, balancer in zip(self.encoders, self.balancers, strict=True):
            if not keeps:
                encoder.zero_grad()
            take(balancer, how, *losses_of(encoder, seed, self.dtype))

    def check(self) -> None:
        plain, ordered = self.encoders
        for mine, theirs in zip(ordered.parameters(), plain.parameters(), strict=True):
            assert mine.grad is not None
            torch.testing.assert_close(mine.grad, theirs.grad, **self.tolerance)
        saved = [balancer.state_dict() for balancer in self.balancers]
        for name, tensor in saved[0].items():
            torch.testing.assert_close(
                saved[1][name], tensor, msg=lambda m, n=name: f"{n}: {m}", **self.tolerance
            )


def take(balancer: ExcessMTL, how: str, features: Tensor, losses: list[Tensor]) -> None:
    """Takes a step."""
    if how == "streaming":
        for task, loss in enumerate(losses):
            balancer.accumulate(task, loss, retain_graph=task < NUM_TASKS - 1)
        balancer.finish()
    elif how == "given":
        shared = balancer.shared_parameters
        assert shared is not None
        rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
        balancer.update_weights([list(row) for row in rows])
        balancer.backward(losses)
    elif how == "absent":
        balancer.backward([losses[0], None, losses[2]])
    elif how == "nan":
        balancer.backward([losses[0], losses[1] * float("nan"), losses[2]])
    else:
        balancer.backward(losses, features=features if how == "features" else None)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_channels_last_steps_are_those_of_the_contiguous_network(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    pair = Pair(dtype, **options)
    for seed in range(4):
        pair.step(seed)
        pair.check()
    pair.step(4, keeps=True)
    pair.check()


@pytest.mark.parametrize("how", ["features", "absent", "streaming", "given", "nan"])
def test_kinds_of_steps_take_turns(how: str) -> None:
    pair = Pair()
    for seed, each in enumerate(("plain", how, "plain", how, how, "plain")):
        pair.step(seed, each)
        if each != "nan":
            pair.check()


def test_grad_keeps_its_strides_and_no_gradient_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    from excessmtl_ext import functional

    pair = Pair()
    ordered = pair.encoders[1]
    seen: list[Tensor] = []
    step = functional.fused_step_combine_

    def noted(grads: list[Tensor], *args: object, **kwargs: object) -> None:
        seen.extend(grads)
        step(grads, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(functional, "fused_step_combine_", noted)
    for keeps in (False, True):
        seen.clear()
        pair.step(0, keeps=keeps)
        assert seen
        assert all(map(Tensor.is_contiguous, seen))
        for parameter in ordered.parameters():
            assert parameter.grad is not None
            assert parameter.grad.stride() == parameter.stride()
            parameter.grad.detach_()
    first = next(ordered.parameters()).grad
    assert first is not None
    assert not first.is_contiguous()


def test_the_memory_format_may_change_between_steps_and_across_a_checkpoint() -> None:
    pair = Pair(gradient_momentum=0.9, fisher="linear")
    pair.step(0)
    ordered = pair.encoders[1]
    for parameter in ordered.parameters():
        parameter.data = parameter.data.contiguous()
    pair.step(1)
    pair.check()
    ordered.to(memory_format=torch.channels_last)
    pair.step(2)
    pair.check()
    plain, other = pair.balancers
    other.load_state_dict(copy.deepcopy(plain.state_dict()))  # into the order it is in
    pair.step(3)
    pair.check()
    fresh = published(
        ordered.parameters(), num_tasks=NUM_TASKS, gradient_momentum=0.9, fisher="linear"
    )
    fresh.load_state_dict(other.state_dict())
    pair.balancers[1] = fresh
    pair.step(4)
    pair.check()


def test_a_saved_state_stays_what_it_was() -> None:
    pair = Pair()
    pair.step(0)
    saved = pair.balancers[1].state_dict()
    before = {name: tensor.clone() for name, tensor in saved.items() if name == "sq_grad_sum"}
    pair.step(1)
    assert torch.equal(saved["sq_grad_sum"], before["sq_grad_sum"])
    again = copy.deepcopy(pair.balancers[1])
    assert torch.equal(
        again.state_dict()["sq_grad_sum"], pair.balancers[1].state_dict()["sq_grad_sum"]
    )


@pytest.mark.skipif(not compiled_step.can_trace(), reason="this torch cannot trace a backward pass")
def test_a_compiled_step_goes_on_in_the_contiguous_order() -> None:
    pair = Pair()
    pair.step(0)
    ordered, balancer = pair.encoders[1], pair.balancers[1]
    torch.manual_seed(1)
    inputs = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    heads = [torch.randn(45, 2, dtype=torch.float64) for _ in range(NUM_TASKS)]

    def losses(images: Tensor) -> list[Tensor]:
        return [(ordered(images) @ head).square().mean() for head in heads]

    compiled = balancer.compiled(losses, backend="aot_eager")
    ordered.zero_grad()
    for _ in range(2):
        compiled(inputs)
    assert balancer.order is None
    assert compiled.is_compiled
    pair.encoders[0].zero_grad()
    for _ in range(2):
        features = pair.encoders[0](inputs)
        pair.balancers[0].backward([(features @ head).square().mean() for head in heads])
    pair.check()


def test_reset_starts_over_in_any_order() -> None:
    pair = Pair()
    pair.step(0)
    for balancer in pair.balancers:
        balancer.reset()
    pair.step(1)
    pair.check()
