"""Parameters that do not require grad rest: no state, no gradient, and the others train as if they were not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _asserts import assert_equal_bits
from torch import Tensor, nn

from excessmtl_ext import MGDA, Balancer, ExcessMTL, GradNorm, GroupDRO, Uniform


class Adapted(nn.Module):
    """A frozen layer with a trained adapter of low rank beside it (LoRA)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, width) / width)
        self.up = nn.Parameter(torch.randn(width, 2) / width)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(Adapted(6), nn.Tanh(), Adapted(6), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(3))

    def losses(self, seed: int) -> list[Tensor]:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
        return [(head(self.encoder(x)) - 1).square().mean() for head in self.heads]

    def trained(self) -> list[nn.Parameter]:
        return [each for each in self.encoder.parameters() if each.requires_grad]

    def grads(self) -> list[Tensor]:
        return [each.grad for each in self.parameters() if each.grad is not None]


MAKERS: dict[str, Callable[[Net, list[nn.Parameter]], Balancer]] = {
    "default": lambda net, p: ExcessMTL(p, num_tasks=3),
    "official": lambda net, p: ExcessMTL.from_preset("official", p, num_tasks=3),
    "batched": lambda net, p: ExcessMTL(p, num_tasks=3, batched=True),
    "rotation": lambda net, p: ExcessMTL(p, num_tasks=3, tasks_per_step=1),
    "update_every": lambda net, p: ExcessMTL(p, num_tasks=3, update_every=2),
    "subset": lambda net, p: ExcessMTL(
        p, num_tasks=3, estimate_from=[e for e in net.encoder[2].parameters() if e.requires_grad]
    ),
    "mgda": lambda net, p: MGDA(p, num_tasks=3),
    "gradnorm": lambda net, p: GradNorm(p, num_tasks=3),
    "group_dro": lambda net, p: GroupDRO(p, num_tasks=3),
    "uniform": lambda net, p: Uniform(p, num_tasks=3),
}
EVERY_METHOD = pytest.mark.parametrize("name", MAKERS)


def run(net: Net, balancer: Balancer, num_steps: int = 3) -> None:
    for seed in range(num_steps):
        net.zero_grad()
        balancer.backward(net.losses(seed))


@EVERY_METHOD
def test_frozen_parameters_given_with_the_rest_change_nothing(name: str) -> None:
    first, second = Net(), Net()
    all_of_them = MAKERS[name](first, list(first.encoder.parameters()))
    trained = MAKERS[name](second, second.trained())
    run(first, all_of_them)
    run(second, trained)
    assert_equal_bits(
        [*all_of_them.state_tensors().values(), *first.grads()],
        [*trained.state_tensors().values(), *second.grads()],
    )
    assert all(each.base.weight.grad is None for each in (first.encoder[0], first.encoder[2]))


def test_state_is_held_for_what_trains_only() -> None:
    net = Net()
    balancer = ExcessMTL(net.encoder.parameters(), num_tasks=3)
    num_trained = sum(each.numel() for each in net.trained())
    assert num_trained == 4 * 12
    assert balancer.layout is not None
    assert balancer.layout.num_params == num_trained
    assert balancer.tensor_mean_square.shape == (3, 4)


def test_all_frozen_is_an_error_that_says_so() -> None:
    net = Net()
    net.encoder.requires_grad_(False)
    with pytest.raises(ValueError, match="but all 8 are frozen"):
        ExcessMTL(net.encoder.parameters(), num_tasks=3)
    with pytest.raises(ValueError, match="`estimate_from` to require grad, but all 1 are frozen"):
        net = Net()
        ExcessMTL(net.encoder.parameters(), num_tasks=3, estimate_from=[net.encoder[0].base.weight])


@EVERY_METHOD
def test_all_frozen_midway_is_an_error_that_says_so_and_changes_nothing(name: str) -> None:
    net = Net()
    balancer = MAKERS[name](net, net.trained())
    run(net, balancer)
    before = [tensor.clone() for tensor in balancer.state_tensors().values()]
    net.encoder.requires_grad_(False)
    with pytest.raises(ValueError, match="but all 4 are frozen"):
        balancer.backward(net.losses(9))
    assert_equal_bits(list(balancer.state_tensors().values()), before)


@EVERY_METHOD
def test_one_frozen_midway_rests_and_the_others_train_on(name: str) -> None:
    net = Net()
    balancer = MAKERS[name](net, net.trained())
    run(net, balancer)
    net.encoder[0].down.requires_grad_(False)
    if name != "subset":
        net.encoder[2].up.requires_grad_(False)
    run(net, balancer, 4)
    assert net.encoder[0].down.grad is None
    assert net.encoder[0].up.grad is not None
    assert bool(balancer.task_weights.isfinite().all())
    assert balancer.num_calls == 7


@pytest.mark.parametrize("options", [{"update_every": 2}, {"batched": True}], ids=str)
def test_one_frozen_midway_rests_where_one_pass_serves_all_tasks(options: dict[str, Any]) -> None:
    net = Net()
    shared = net.trained()
    balancer = ExcessMTL(shared, num_tasks=3, head_weighting="task_weights", **options)
    run(net, balancer, num_steps=1)
    shared[0].requires_grad_(False)
    shared[0].grad = None
    net.zero_grad()
    inputs = torch.randn(8, 6)
    z = net.encoder(inputs)
    balancer.backward([(head(z) - 1).square().mean() for head in net.heads], features=z)
    assert shared[0].grad is None
    assert all(each.grad is not None and bool(each.grad.any()) for each in shared[1:])
    assert balancer.backward_mode.startswith("one vectorised") == ("batched" in options)


def test_one_of_the_subset_frozen_midway_rests() -> None:
    net = Net()
    balancer = MAKERS["subset"](net, net.trained())
    run(net, balancer)
    size = net.encoder[2].down.numel()
    before = balancer.sq_grad_sum.clone()
    net.encoder[2].down.requires_grad_(False)
    run(net, balancer, 2)
    assert_equal_bits([balancer.sq_grad_sum[:, :size]], [before[:, :size]])
    assert bool((balancer.sq_grad_sum[:, 32 : 32 + size] > before[:, 32 : 32 + size]).any())
    assert net.encoder[2].down.grad is None


def test_one_that_is_unfrozen_later_is_told_and_changes_nothing() -> None:
    net = Net()
    balancer = ExcessMTL(net.encoder.parameters(), num_tasks=3)
    run(net, balancer)
    net.encoder[0].base.bias.requires_grad_(True)
    before = [tensor.clone() for tensor in balancer.state_tensors().values()]
    with pytest.raises(ValueError, match=r"shared parameter 3, of shape \[6\], to stay frozen"):
        balancer.backward(net.losses(9))
    assert_equal_bits(list(balancer.state_tensors().values()), before)


def test_given_gradients_may_have_places_for_the_frozen() -> None:
    net = Net()
    balancer, twin = (ExcessMTL(net.encoder.parameters(), num_tasks=3) for _ in range(2))
    for seed in range(3):
        rows: list[list[Any]] = []
        for loss in net.losses(seed):
            grads = iter(torch.autograd.grad(loss, net.trained(), retain_graph=True))
            rows.append(
                [next(grads) if each.requires_grad else None for each in net.encoder.parameters()]
            )
        balancer.update_weights(rows)
        twin.update_weights([[grad for grad in row if grad is not None] for row in rows])
    assert_equal_bits(list(balancer.state_tensors().values()), list(twin.state_tensors().values()))


def test_the_last_layer_of_gradnorm_is_counted_in_what_was_given() -> None:
    net = Net()
    places = {id(each): place for place, each in enumerate(net.encoder.parameters())}
    chosen = [places[id(net.encoder[2].down)], places[id(net.encoder[2].up)]]
    first = GradNorm(net.encoder.parameters(), num_tasks=3, last_layer=chosen)
    second = GradNorm(net.trained(), num_tasks=3, last_layer=[2, 3])
    run(net, first)
    run(net, second)
    assert_equal_bits([first.task_weights], [second.task_weights])
