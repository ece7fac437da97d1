"""A module that holds the balancer, through torch's model and optimizer state dicts, on two ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from _inputs import make_problem
from _rank_model import Net, losses_of, own_rows
from _ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from excessmtl_ext import ExcessMTL

NUM_TASKS = 3
FROM_RANK_0 = "whole, from rank 0"
SLOW = pytest.mark.slow


class Trained(nn.Module):
    """A network, and the balancer beside it."""

    def __init__(self, rank: int, num_ranks: int, kind: str) -> None:
        super().__init__()
        self.problem = make_problem(NUM_TASKS)
        self.rows = own_rows(rank, [20 // num_ranks] * num_ranks)
        self.net = Net(self.problem)
        ranks: dict[str, Any] = {"model": self.net}
        if kind == "replicated":
            ranks["process_group"] = dist.group.WORLD
        else:
            mesh = init_device_mesh("cpu", (num_ranks,))
            for layer in (self.net.encoder[0], self.net.encoder[2]):  # type: ignore[index]
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net.encoder if kind == "fsdp_encoder" else self.net, mesh=mesh)
        self.balancer = ExcessMTL(self.net.encoder.parameters(), num_tasks=NUM_TASKS, **ranks)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)

    def train_for(self, num_steps: int) -> None:
        for _ in range(num_steps):
            inputs, targets = self.problem.inputs[self.rows], self.problem.targets[self.rows]
            self.optimizer.zero_grad()
            self.balancer.backward(losses_of(self.net(inputs), targets))
            self.optimizer.step()

    def numbers(self) -> list[Tensor]:
        """Returns copies of everything this rank holds."""
        states = self.optimizer.state.values()
        held = [
            *self.net.parameters(),
            *(each for state in states for each in state.values()),
            *self.balancer.state_tensors().values(),
        ]
        return [_local(each.detach()).clone() for each in held]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def goes_on(rank: int, num_ranks: int, kind: str, how: str, folder: str) -> list[str]:
    """Trains, saves, trains on; a fresh module loads and trains on. Returns what differs."""
    trained = Trained(rank, num_ranks, kind)
    trained.train_for(3)
    fresh = Trained(rank, num_ranks, kind)
    options = StateDictOptions(full_state_dict="whole" in how)
    state = {
        "model": get_model_state_dict(trained, options=options),
        "optimizer": get_optimizer_state_dict(trained, trained.optimizer, options=options),
    }
    names = set(trained.balancer.state_dict())
    if how == "folder":
        assert {f"balancer.{name}" for name in names} <= set(state["model"])
        dcp.save(state, checkpoint_id=folder)
        state = {
            "model": get_model_state_dict(fresh),
            "optimizer": get_optimizer_state_dict(fresh, fresh.optimizer),
        }
        dcp.load(state, checkpoint_id=folder)
    if how == FROM_RANK_0:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    if how != "folder":
        state = copy.deepcopy(state)  # optimizers keep the tensors they load
    set_model_state_dict(fresh, state["model"], options=options)
    set_optimizer_state_dict(fresh, fresh.optimizer, state["optimizer"], options=options)
    trained.train_for(2)
    fresh.train_for(2)
    pairs = zip(trained.numbers(), fresh.numbers(), strict=True)
    return [str(index) for index, (left, right) in enumerate(pairs) if not torch.equal(left, right)]


@pytest.mark.parametrize("how", ["folder", "whole", pytest.param(FROM_RANK_0, marks=SLOW)])
@pytest.mark.parametrize("kind", ["replicated", "fsdp", pytest.param("fsdp_encoder", marks=SLOW)])
def test_a_module_that_holds_the_balancer_goes_on_to_the_bit(
    kind: str, how: str, tmp_path: Path
) -> None:
    assert run_ranks(2, goes_on, kind, how, str(tmp_path / "dcp")) == [[], []]
