"""Weight gradients from inputs unfolded once equal those of the passes, which remain where something interferes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _published import published
from _ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from excessmtl_ext import ExcessMTL, GradNorm
from excessmtl_ext.passes.stacked import LEAST_RATIO, StackedLayers

NUM_TASKS = 3
SMALL = (16, 4, 4)
"""An image of so few positions that every 3 x 3 convolution over sixteen channels is chosen."""


def deep(*layers: nn.Module) -> nn.Sequential:
    """``layers`` behind one whose input needs no gradient and before the heads."""
    return nn.Sequential(nn.Conv2d(16, 16, 1), *layers, nn.Flatten())


def losses_of(
    encoder: nn.Module, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0
):
    """Features, and one loss per task."""
    torch.manual_seed(seed)
    features = encoder(torch.randn(batch, *SMALL, dtype=dtype))
    heads = [nn.Linear(features.shape[1], 2, dtype=dtype) for _ in range(NUM_TASKS)]
    return features, [head(features).square().mean() for head in heads]


Run = Callable[[ExcessMTL, Tensor, list[Tensor]], None]


def plainly(balancer: ExcessMTL, features: Tensor, losses: list[Tensor]) -> None:
    """``backward(losses)``."""
    balancer.backward(losses)


def with_features(balancer: ExcessMTL, features: Tensor, losses: list[Tensor]) -> None:
    """``backward(losses, features=features)``."""
    balancer.backward(losses, features=features)


def streaming(balancer: ExcessMTL, features: Tensor, losses: list[Tensor]) -> None:
    """Task by task."""
    for task, loss in enumerate(losses):
        balancer.accumulate(task, loss, retain_graph=task != len(losses) - 1)
    balancer.finish()


def scalar(balancer: ExcessMTL, features: Tensor, losses: list[Tensor]) -> None:
    """``balancer(losses).backward()``."""
    balancer(losses).backward()


def absent(balancer: ExcessMTL, features: Tensor, losses: list[Tensor]) -> None:
    """Without the second task."""
    balancer.backward([losses[0], None, losses[2]])


RUNS = (plainly, with_features, streaming, scalar, absent)


def both(
    make: Callable[[], nn.Module],
    run: Run = plainly,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[ExcessMTL, nn.Module]:
    """Takes three steps with and without ``batched="stacked"`` and compares gradients and weights.

    Returns:
        The balancer and the encoder with it.
    """
    torch.manual_seed(1)
    encoders = [make().to(dtype)]
    encoders.append(copy.deepcopy(encoders[0]))
    balancers = [
        published(encoder.parameters(), num_tasks=NUM_TASKS, batched=batched, **options)
        for encoder, batched in zip(encoders, (False, "stacked"), strict=True)
    ]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for seed in range(3):
        for encoder, balancer in zip(encoders, balancers, strict=True):
            encoder.zero_grad()
            run(balancer, *losses_of(encoder, dtype=dtype, seed=seed))
        plain, stacked = (dict(encoder.named_parameters()) for encoder in encoders)
        for name, parameter in plain.items():
            mine, theirs = stacked[name].grad, parameter.grad
            assert (mine is None) == (theirs is None), name
            if mine is not None and theirs is not None:
                assert mine.stride() == theirs.stride()
                scale = max(float(theirs.abs().max()), 1e-30)
                assert float((mine - theirs).abs().max()) <= tolerance * scale, name
        torch.testing.assert_close(balancers[0].task_weights, balancers[1].task_weights)
    return balancers[1], encoders[1]


def counts(balancer: ExcessMTL) -> tuple[int, int]:
    """Weights whose gradients were computed beside the passes, and all."""
    found = re.search(r"(\d+) of (\d+) weight gradients", balancer.backward_mode)
    assert found, balancer.backward_mode
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("run", RUNS)
def test_a_deep_convolution_has_the_gradients_of_ordinary_passes(run: Run, dtype: torch.dtype):
    balancer, _ = both(
        lambda: deep(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()), run, dtype
    )
    assert counts(balancer) == (1, 2)
    assert "of a layer whose input needs no gradient" in str(balancer.report())


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(16, 16, 3),
        lambda: nn.Conv2d(16, 16, 3, bias=False),
        lambda: nn.Conv2d(16, 16, 3, stride=2, padding=1),
        lambda: nn.Conv2d(16, 16, (3, 2), stride=(1, 2), padding=(1, 0)),
        lambda: nn.Conv2d(16, 16, 3, dilation=2, padding=2, stride=2),
        lambda: nn.Conv2d(16, 16, 3, padding="same", dilation=(1, 2)),
        lambda: nn.Conv2d(16, 16, 2, padding="same"),
        lambda: nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        lambda: nn.Conv2d(16, 16, 4),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_every_kind_of_convolution(layer: Callable[[], nn.Module]):
    balancer, _ = both(lambda: deep(layer()))
    assert counts(balancer)[1] == 2


def test_a_convolution_over_lines():
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(2), nn.Conv1d(16, 32, 3, stride=4), nn.Conv1d(32, 8, 3, 2), nn.Flatten()
        )

    balancer, _ = both(make)
    assert counts(balancer) == (1, 2)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.Conv2d(16, 16, 3, groups=2), "transposed or in groups"),
        (lambda: nn.ConvTranspose2d(16, 16, 3, stride=2), "transposed or in groups"),
        (lambda: nn.Conv2d(16, 16, 1), "too many output positions"),
        (lambda: nn.Conv2d(16, 16, 3).to(memory_format=torch.channels_last), "layout"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 4)), "of no convolution"),
        (lambda: nn.Sequential(nn.Flatten(2), nn.Linear(16, 4)), "of no convolution"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(16, 16, 3)), "of no convolution"),
        (lambda: Twice(nn.Conv2d(16, 16, 3, padding=1)), "used more than once"),
        (lambda: Functional(), "used more than once"),
        (lambda: Checkpointed(nn.Conv2d(16, 16, 3)), "recomputed or kept elsewhere"),
        (
            lambda: Checkpointed(nn.Conv2d(16, 16, 3), use_reentrant=True),
            "a backward pass of its own",
        ),
        (lambda: Offloaded(nn.Conv2d(16, 16, 3)), "recomputed or kept elsewhere"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
def test_an_ordinary_pass_where_something_stands_in_the_way(
    layer: Callable[[], nn.Module], reason: str
):
    balancer, _ = both(lambda: deep(layer()))
    assert counts(balancer)[0] == 0
    assert reason in balancer.backward_mode


class Twice(nn.Module):
    """A layer that is used twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(self.layer(inputs))


class Functional(nn.Module):
    """A convolution whose weight is read elsewhere, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16, 3, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.conv2d(inputs, self.weight) * self.weight.square().mean()


class Checkpointed(nn.Module):
    """A layer that is run again in the backward pass."""

    def __init__(self, layer: nn.Module, *, use_reentrant: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.use_reentrant = use_reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        return checkpoint(self.layer, inputs, use_reentrant=self.use_reentrant)  # type: ignore[return-value]


class Offloaded(nn.Module):
    """A layer whose saved tensors go through hooks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return self.layer(inputs)


def test_a_hook_of_the_weight_takes_the_ordinary_pass_and_a_hook_of_its_output_is_heeded():
    def make() -> nn.Module:
        encoder = deep(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3))
        return Hooked(encoder)

    balancer, encoder = both(make)
    assert counts(balancer) == (1, 3)
    assert "1 with a hook" in balancer.backward_mode
    assert isinstance(encoder, Hooked)
    assert encoder.num_calls > 0


class Hooked(nn.Module):
    """Doubles the gradient of one weight, halves that of the other layer's output, and looks at that one's module."""

    def __init__(self, encoder: nn.Sequential) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        first, hooked, plain, flat = self.encoder
        assert isinstance(hooked, nn.Conv2d)
        if not hooked.weight._backward_hooks:
            hooked.weight.register_hook(lambda grad: grad * 2.0)
            plain.register_full_backward_hook(self._count)
        outputs = plain(hooked(first(inputs)))
        outputs.register_hook(lambda grad: grad * 0.5)
        return flat(outputs)

    def _count(self, *_: object) -> None:
        self.num_calls += 1


def test_gradients_that_a_node_hands_over_changed_are_seen_changed():
    """A hook in front of the layer's own node runs before the product is made."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(16, 16, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            outputs = self.layer(inputs)
            assert outputs.grad_fn is not None
            outputs.grad_fn.register_prehook(lambda grads: (grads[0] * 3.0,))
            return outputs

    balancer, _ = both(lambda: deep(Scaled()))
    assert counts(balancer) == (1, 2)


def test_frozen_weights_and_weights_of_heads_are_left_alone():
    def make() -> nn.Module:
        encoder = deep(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3))
        encoder[1].weight.requires_grad = False
        return encoder

    balancer, encoder = both(make)
    assert counts(balancer) == (1, 2)
    assert isinstance(encoder, nn.Sequential)
    assert encoder[1].weight.grad is None


def test_a_parameter_frozen_after_the_forward_pass():
    encoder = deep(nn.Conv2d(16, 16, 3)).double()
    balancer = published(encoder.parameters(), num_tasks=NUM_TASKS, batched="stacked")
    balancer.backward(losses_of(encoder)[1])
    _, losses = losses_of(encoder)
    heads = [leaf for loss in losses for leaf in leaves(loss) if leaf.dim() == 1]
    next(leaf for leaf in heads if leaf.numel() == 2).requires_grad = False
    encoder.zero_grad()
    balancer.backward(losses)
    assert "frozen after the forward pass" in balancer.backward_mode
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def leaves(loss: Tensor) -> list[Tensor]:
    """The leaves below ``loss``."""
    found, stack = [], [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None:
            variable = getattr(node, "variable", None)
            found += [] if variable is None else [variable]
            stack += [parent for parent, _ in node.next_functions]
    return found


def test_autocast_takes_ordinary_passes_and_keeps_its_dtypes():
    encoder = deep(nn.Conv2d(16, 16, 3))
    balancer = published(encoder.parameters(), num_tasks=NUM_TASKS, batched="stacked")
    with torch.autocast("cpu", torch.bfloat16):
        _, losses = losses_of(encoder, dtype=torch.float32)
    balancer.backward(losses)
    assert counts(balancer)[0] == 0
    grads = []
    for is_enabled in (False, True):
        encoder.zero_grad()
        balancer.reset()
        _, losses = losses_of(encoder, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
            balancer.backward(losses)
        assert counts(balancer) == (1, 2)
        grads.append([parameter.grad for parameter in encoder.parameters()])
    for inside, outside in zip(*grads, strict=True):
        torch.testing.assert_close(inside, outside)


def test_a_step_that_is_not_finite_is_skipped():
    encoder = deep(nn.Conv2d(16, 16, 3)).double()
    balancer = published(encoder.parameters(), num_tasks=NUM_TASKS, batched="stacked")
    balancer.backward(losses_of(encoder)[1])
    before = [tensor.clone() for tensor in balancer.state_tensors().values()]
    _, losses = losses_of(encoder)
    balancer.backward([losses[0] * float("nan"), *losses[1:]])
    assert balancer.found_nonfinite.tolist() == [True, False, False]
    after = dict(balancer.state_tensors())
    changed = [
        name
        for (name, now), was in zip(after.items(), before, strict=True)
        if not torch.equal(now, was)
    ]
    assert set(changed) <= {"found_nonfinite", "num_skipped_steps"}


def test_tasks_with_forward_passes_of_their_own_take_ordinary_passes():
    encoder = deep(nn.Conv2d(16, 16, 3)).double()
    twin = copy.deepcopy(encoder)
    for each, batched in ((encoder, "stacked"), (twin, False)):
        balancer = published(each.parameters(), num_tasks=NUM_TASKS, batched=batched)
        balancer.backward([losses_of(each, seed=task)[1][task] for task in range(NUM_TASKS)])
        if batched:
            assert "used more than once" in balancer.backward_mode
    for mine, theirs in zip(encoder.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_failing_pass_leaves_no_hook_behind():
    encoder = deep(nn.Conv2d(16, 16, 3), nn.ReLU()).double()
    balancer = published(encoder.parameters(), num_tasks=NUM_TASKS, batched="stacked")
    features, losses = losses_of(encoder)
    handle = features.register_hook(fail)
    with pytest.raises(ZeroDivisionError):
        balancer.backward(losses, retain_graph=True)
    handle.remove()
    assert all(parameter.grad is None for parameter in encoder.parameters())
    balancer.backward(losses)
    assert counts(balancer) == (1, 2)


def fail(grad: Tensor) -> None:
    """Raises."""
    raise ZeroDivisionError


def test_the_layers_hold_nothing_once_the_passes_are_over():
    encoder = deep(nn.Conv2d(16, 16, 3))
    _, losses = losses_of(encoder, dtype=torch.float32)
    with StackedLayers(losses, list(encoder.parameters())) as layers:
        assert [layer.index for layer in layers.layers] == [2]
        assert layers.inputs is not None
        assert not any(leaf is encoder[1].weight for leaf in layers.inputs)
    assert layers.layers == []


def test_the_rule_is_one_about_shapes():
    """144 inputs of a position: chosen while the batch has at most a quarter as many output positions."""
    encoder = deep(nn.Conv2d(16, 4, 3)).double()
    most = 144 // LEAST_RATIO // 4
    for batch, chosen in ((most, 1), (most + 1, 0)):
        balancer = published(encoder.parameters(), num_tasks=NUM_TASKS, batched="stacked")
        balancer.backward(losses_of(encoder, batch=batch)[1])
        assert counts(balancer)[0] == chosen


def test_other_methods_take_it_too():
    encoder = deep(nn.Conv2d(16, 16, 3)).double()
    balancer = GradNorm(encoder.parameters(), num_tasks=NUM_TASKS, batched="stacked")
    balancer.backward(losses_of(encoder)[1])
    assert "1 of 2 weight gradients" in balancer.backward_mode


def rank_step(rank: int, num_ranks: int, batched: str, *, wraps: bool) -> list[Tensor]:
    """Gradients and weights after two steps on this rank's half of a batch, or on all of it."""
    torch.manual_seed(0)
    encoder = deep(nn.Conv2d(16, 16, 3)).double()
    model = nn.ModuleList([encoder, *(nn.Linear(64, 2).double() for _ in range(NUM_TASKS))])
    whole = Whole(model)
    ranks = {}
    called: nn.Module = whole
    if num_ranks > 1:
        called = DistributedDataParallel(whole) if wraps else whole
        ranks = {"process_group": dist.group.WORLD, "model": called}
    balancer = published(encoder.parameters(), num_tasks=NUM_TASKS, batched=batched, **ranks)
    for _ in range(2):
        whole.zero_grad()
        inputs = torch.randn(4, *SMALL, dtype=torch.float64)
        share = inputs.chunk(num_ranks)[rank]
        balancer.backward([each.square().mean() for each in called(share)])
    if batched == "stacked":
        assert counts(balancer) == (1, 2)
    return [balancer.task_weights, *(p.grad for p in whole.parameters() if p.grad is not None)]


class Whole(nn.Module):
    """An encoder and its heads."""

    def __init__(self, parts: nn.ModuleList) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, inputs: Tensor) -> list[Tensor]:
        encoder, *heads = self.parts
        features = encoder(inputs)
        return [head(features) for head in heads]


@pytest.mark.parametrize("wraps", [True, False], ids=["DDP", "plain"])
def test_ranks_have_the_gradients_of_one_process(wraps: bool):
    expected = rank_step(0, 1, "auto", wraps=False)
    for each in run_ranks(2, partial(rank_step, wraps=wraps), "stacked"):
        for mine, theirs in zip(each, expected, strict=True):
            torch.testing.assert_close(mine, theirs)
