"""Several ranks find the parameters that the tasks of the joined batch share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from _rank_model import TOLERANCE
from _ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from excessmtl_ext import ExcessMTL


class Net(nn.Module):
    """Heads are registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(6, 1) for _ in range(3)])
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh())

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.encoder(x)
        return [head(z) for head in self.heads]


def make_net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + rank))


def losses_of(outputs: list[Tensor]) -> list[Any]:
    return [(out - 1).square().mean() for out in outputs]


def wrapped(kind: str) -> tuple[nn.Module, Net]:
    net = make_net()
    if kind == "ddp":
        return DistributedDataParallel(net), net
    if kind == "ddp with unused":
        return DistributedDataParallel(net, find_unused_parameters=True), net
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(net.encoder, mesh=mesh)
        fully_shard(net, mesh=mesh)
    return net, net


def train(rank: int, num_ranks: int, kind: str, given: str) -> dict[str, Any]:
    model, net = wrapped(kind)
    options: dict[str, Any] = {"process_group": dist.group.WORLD} if kind == "plain" else {}
    if given == "encoder":
        options["model"] = model
    balancer = ExcessMTL(
        model if given == "model" else net.encoder.parameters(), num_tasks=3, **options
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        balancer.backward(losses_of(model(batch(rank, step))))
        optimizer.step()
    whole = [
        parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter  # type: ignore[operator]
        for parameter in net.parameters()
    ]
    return {
        "text": str(balancer).partition("\n")[2],
        "num_shared": len(balancer.shared_parameters or ()),
        "weights": balancer.task_weights,
        "parameters": [parameter.detach().clone() for parameter in whole],
    }


@pytest.mark.parametrize("kind", ["plain", "ddp", "ddp with unused", "fsdp2"])
def test_steps_are_those_of_a_balancer_that_was_given_the_encoder(kind: str):
    results = run_ranks(2, train, kind, "model")
    expected = run_ranks(2, train, kind, "encoder")
    for result in results:
        assert result["num_shared"] == 4
        assert "encoder (4 parameters)" in result["text"]
        assert "Odd" not in result["text"]
        for one, other in zip(result["parameters"], expected[0]["parameters"], strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE)
        torch.testing.assert_close(result["weights"], expected[0]["weights"])


def step_of(rank: int, num_ranks: int, tasks: list[list[int]]) -> list[Any]:
    net = make_net()
    balancer = ExcessMTL(net, num_tasks=3, process_group=dist.group.WORLD)
    losses = losses_of(net(batch(rank, 0)))
    balancer.backward([loss if task in tasks[rank] else None for task, loss in enumerate(losses)])
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return [names[id(parameter)] for parameter in balancer.shared_parameters or ()]


def test_each_rank_may_have_other_tasks():
    found = run_ranks(2, step_of, [[0], [1, 2]])
    assert (
        found[0]
        == found[1]
        == [f"encoder.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
    )


def error_of(rank: int, num_ranks: int, case: str) -> tuple[str, str, bool]:
    net = make_net()
    if case == "other model" and rank == 1:
        net.encoder[2] = nn.Linear(8, 6, bias=False)
    balancer = ExcessMTL(net, num_tasks=3, process_group=dist.group.WORLD)
    losses = losses_of(net(batch(rank, 0)))
    if case == "absent":
        losses[2] = None
    if case == "no scalar" and rank == 1:
        losses[1] = torch.ones(2, requires_grad=True)
    if case == "not the whole model" and rank == 1:
        losses[1] = losses[1] * torch.ones(1, requires_grad=True).sum()
    if case == "found before" and rank == 1:
        balancer.bind_found(list(net.encoder.parameters()))
    try:
        if case == "loaded":
            balancer.load_state_dict(balancer.state_dict())
        else:
            balancer.backward(losses)
    except (RuntimeError, ValueError) as error:
        text = str(error)
    else:
        text = ""
    if case in (
        "absent",
        "no scalar",
        "not the whole model",
        "loaded",
    ):  # the ranks are in step: they go on
        balancer.backward(losses_of(net(batch(rank, 0))))
    return text, str(balancer.awaits_losses), all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("absent", ["task(s) 2 had none so far"] * 2),
        ("no scalar", ["because rank(s) [1] failed", "Expected `losses[1]` to be a scalar"]),
        ("not the whole model", ["because rank(s) [1] failed", "Expected the whole model with"]),
        ("other model", ["Expected the same model and options on every rank"] * 2),
        ("found before", ["or a rank has found them before", "Expected the same options, tasks"]),
        ("loaded", ["Expected prepare(losses) before load_state_dict()"] * 2),
    ],
)
def test_an_error_on_one_rank_is_one_on_all(case: str, expected: list[str]):
    for (text, _, _), part in zip(run_ranks(2, error_of, case), expected, strict=True):
        assert part in text
