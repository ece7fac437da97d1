"""What differs between ranks is an error on all of them, before anything moves; what is frozen rests on all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _ranks import raised_by, run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from excessmtl_ext import ExcessMTL


class Net(nn.Module):
    def __init__(
        self, num_tasks: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(num_tasks))
        self.to(dtype)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.encoder(x.to(self.heads[0].weight))
        return [(head(features) - 1.0).square().mean() for head in self.heads]


def batch(step: int, rank: int, num_ranks: int) -> Tensor:
    whole = torch.randn(8, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return whole.chunk(num_ranks)[rank]


# ---- differences


def step_differently(rank: int, num_ranks: int, kind: str) -> tuple[tuple[str, str], bool, bool]:
    is_other = rank == 1
    num_tasks = 3 if kind == "num_tasks" and is_other else 2
    dtype = torch.float32 if kind == "dtype" and is_other else torch.float64
    net = Net(num_tasks, dtype, seed=int(kind == "seed" and is_other))
    parameters = list(net.encoder.parameters())
    if kind == "order":
        torch.manual_seed(3)
        for each in (net.encoder[0].bias, net.encoder[2].bias):
            nn.init.normal_(each)
        if is_other:
            parameters[1], parameters[3] = parameters[3], parameters[1]
    options: dict[str, Any] = {"max_log_ratio": 1.0} if kind == "options" and is_other else {}
    balancer = ExcessMTL(
        parameters,
        num_tasks=num_tasks,
        process_group=dist.group.WORLD,
        model=None if kind == "model" and is_other else net,
        **options,
    )
    if kind == "state":
        balancer.backward(net(batch(0, rank, num_ranks)))
        if is_other:
            state = balancer.state_dict()
            state["log_task_weights"] = torch.tensor([0.9, 0.1]).double().log()
            balancer.load_state_dict(state)
        else:
            balancer.load_state_dict(balancer.state_dict())
        net.zero_grad()
    losses: Any = net(batch(1, rank, num_ranks))
    if kind == "names":
        names = ("a", "b") if rank == 0 else ("b", "a")
        losses = dict(zip(names, losses, strict=True))
    before = [tensor.clone() for tensor in balancer.state_tensors().values()]
    error = raised_by(lambda: balancer.backward(losses))
    after = balancer.state_tensors().values()
    is_whole = all(map(torch.equal, before, after))
    return error, is_whole, all(each.grad is None for each in net.parameters())


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("num_tasks", "same options, tasks, parameter sizes"),
        ("dtype", "same options, tasks, parameter sizes and types"),
        ("model", "`model` on all or none"),
        ("options", "same options"),
        ("names", "same order of tasks"),
        ("seed", "same shared parameters and weights"),
        ("order", "same shared parameters and weights"),
        ("state", "same shared parameters and weights"),
    ],
)
def test_a_difference_is_an_error_on_every_rank_before_anything_moves(kind: str, told: str) -> None:
    for (name, message), is_whole, has_no_grad in run_ranks(2, step_differently, kind):
        assert name == "RuntimeError"
        assert told in message
        assert is_whole
        assert has_no_grad


# ---- errors and interrupts


class Interrupted(torch.autograd.Function):
    """A node in whose backward pass Ctrl-C is pressed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise KeyboardInterrupt


def fail_on_one(rank: int, num_ranks: int, kind: str) -> tuple[str, bool, int]:
    net = Net()
    balancer = ExcessMTL(
        net.encoder.parameters(), num_tasks=2, process_group=dist.group.WORLD, model=net
    )
    balancer.backward(net(batch(0, rank, num_ranks)))
    before = [tensor.clone() for tensor in balancer.state_tensors().values()]
    losses = net(batch(1, rank, num_ranks))
    grads = [[torch.ones_like(each) for each in net.encoder.parameters()] for _ in range(2)]
    if rank == 1:
        losses[0] = Interrupted.apply(losses[0]) if kind == "interrupt" else losses[0]
        grads[1][0] = grads[1][0][:-1]
    error = "nothing"
    try:
        if kind == "interrupt":
            balancer.backward(losses)
        else:
            balancer.update_weights(grads)
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
    is_whole = all(map(torch.equal, before, balancer.state_tensors().values()))
    balancer.backward(net(batch(2, rank, num_ranks)))  # the ranks are in step again
    return error, is_whole, balancer.num_calls


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("interrupt", "KeyboardInterrupt"),
        ("size", "ValueError: Expected `task_grads` of task 1, parameter 0 to have 12 elements"),
    ],
)
def test_an_interrupt_or_a_wrong_size_on_one_rank_is_told_on_all(kind: str, own: str) -> None:
    others, failed = run_ranks(2, fail_on_one, kind)
    assert failed[0].startswith(own)
    assert "rank(s) [1] failed" in others[0]
    assert all(is_whole and num_calls == 2 for _, is_whole, num_calls in (others, failed))


# ---- DistributedDataParallel


def without_model(rank: int, num_ranks: int) -> tuple[str, str]:
    ddp = DistributedDataParallel(Net())
    balancer = ExcessMTL(ddp.module.encoder.parameters(), num_tasks=2)
    return raised_by(lambda: balancer.backward(ddp(batch(0, rank, num_ranks))))


def test_a_wrapped_model_that_the_balancer_was_not_told_of_is_an_error_that_says_so() -> None:
    for name, message in run_ranks(2, without_model):
        assert name == "RuntimeError"
        assert "model=ddp" in message


class Owner(Net):
    """A network with its balancer inside, all of which is wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.balancer: ExcessMTL | None = None
        self.register_buffer("steps", torch.zeros(()))  # so that there is something to broadcast

    def forward(self, x: Tensor) -> list[Tensor]:
        self.steps += 1
        return super().forward(x)


def weights_of_owner(rank: int, num_ranks: int, is_inside: bool) -> tuple[list[float], Tensor]:
    net = Owner()
    ddp = DistributedDataParallel(net)
    balancer = ExcessMTL(net.encoder.parameters(), num_tasks=2, model=ddp, robust_step_size=0.5)
    if is_inside:
        net.balancer = balancer
    for step in range(3):
        net.zero_grad()
        balancer.backward(ddp(batch(step, rank, num_ranks)))
    return balancer.task_weights.tolist(), balancer.sq_grad_sum


def test_the_broadcast_of_buffers_leaves_the_state_of_a_rank_alone() -> None:
    inside, outside = (run_ranks(2, weights_of_owner, is_inside) for is_inside in (True, False))
    for (weights, sums), (own_weights, own_sums) in zip(inside, outside, strict=True):
        assert weights == own_weights
        assert torch.equal(sums, own_sums)
    assert not torch.equal(inside[0][1], inside[1][1])  # each has its part


# ---- frozen parameters


def freeze(net: Net, what: str) -> None:
    net.encoder[0].requires_grad_(what != "layer")
    net.encoder[2].bias.requires_grad_(what != "bias")


def grads_with_frozen(
    rank: int, num_ranks: int, is_wrapped: bool, is_midway: bool, what: str, options: dict[str, Any]
) -> list[tuple[list[Tensor | None], Tensor]]:
    found = []
    for is_alone in (False, True):
        net = Net()
        if not is_midway:
            freeze(net, what)
        if is_alone:
            balancer = ExcessMTL(net.encoder.parameters(), num_tasks=2, **options)
            forward: Callable[[Tensor], list[Tensor]] = net
        else:
            forward = DistributedDataParallel(net) if is_wrapped else net
            group = {} if is_wrapped else {"process_group": dist.group.WORLD}
            balancer = ExcessMTL(
                net.encoder.parameters(), num_tasks=2, model=forward, **group, **options
            )
        for step in range(4):
            if step == 2:
                freeze(net, what)
            net.zero_grad()
            part = (0, 1) if is_alone else (rank, num_ranks)
            balancer.backward(forward(batch(step, *part)))
        grads = [each.grad for each in net.parameters()]
        found.append((grads, balancer.task_weights.clone()))
    return found


@pytest.mark.parametrize("options", [{}, {"update_every": 2}, {"robust_step_size": 0.5}], ids=str)
@pytest.mark.parametrize("what", ["layer", "bias"])
@pytest.mark.parametrize(
    ("is_wrapped", "is_midway"), [(True, False), (False, False), (False, True)]
)
def test_frozen_parameters_rest_on_ranks_as_in_one_process(
    is_wrapped: bool, is_midway: bool, what: str, options: dict[str, Any]
) -> None:
    for (grads, weights), (expected, alone) in run_ranks(
        2, grads_with_frozen, is_wrapped, is_midway, what, options
    ):
        torch.testing.assert_close(weights, alone, rtol=1e-6, atol=1e-9)
        for grad, each in itertools.zip_longest(grads, expected):
            assert (grad is None) == (each is None)
            if grad is not None:
                torch.testing.assert_close(grad, each, rtol=1e-6, atol=1e-9)
