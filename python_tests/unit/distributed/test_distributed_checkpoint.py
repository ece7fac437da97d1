"""Checkpoints of several ranks, and parameters that are sharded themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from _inputs import make_problem
from _published import published
from _rank_model import NUM_TASKS, TOLERANCE, Net, losses_of, own_rows
from _ranks import raised_by, run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from excessmtl_ext.distributed import DataParallel, full_state_dict

OPTIONS: dict[str, Any] = {"robust_step_size": 0.3, "gradient_momentum": 0.9}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Run:
    """A small training of one kind: ``plain`` on one process, ``ddp``-like or ``fsdp`` on several."""

    def __init__(self, rank: int, num_ranks: int, kind: str, **options: Any) -> None:
        self.problem = make_problem(NUM_TASKS)
        self.net = Net(self.problem)
        self.rows = own_rows(rank, [20 // num_ranks] * num_ranks)
        ranks: dict[str, Any] = {}
        if kind == "replicated":
            ranks = {"process_group": dist.group.WORLD, "model": self.net}
        if kind.startswith("fsdp"):
            mesh = init_device_mesh("cpu", (num_ranks,))
            for layer in (self.net.encoder[0], self.net.encoder[2]):  # type: ignore[index]
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net.encoder if kind == "fsdp_encoder" else self.net, mesh=mesh)
            ranks = {"model": self.net}
        self.balancer = published(
            self.net.encoder.parameters(), num_tasks=NUM_TASKS, **OPTIONS, **options, **ranks
        )
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            inputs, targets = self.problem.inputs[self.rows], self.problem.targets[self.rows]
            self.optimizer.zero_grad()
            self.balancer.backward(losses_of(self.net(inputs), targets))
            self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """What all ranks must agree on."""
        return {
            "weights": self.balancer.task_weights.clone(),
            "risks": self.balancer.excess_risk.clone(),
            **{name: whole(p.detach()).clone() for name, p in self.net.named_parameters()},
            **{f"{n} grad": whole(p.grad).clone() for n, p in self.net.named_parameters()},  # type: ignore[arg-type]
        }


def run_steps(
    rank: int, num_ranks: int, kind: str, update_every: int = 1
) -> tuple[list[dict[str, Tensor]], list[int]]:
    run = Run(rank, num_ranks, kind, update_every=update_every)
    states = []
    for _ in range(5):
        run.step()
        states.append(run.state())
    return states, list(run.balancer.sq_grad_sum.shape)


@pytest.mark.parametrize(
    ("num_ranks", "kind", "update_every"),
    [
        (2, "fsdp", 1),
        (4, "fsdp", 1),
        (2, "fsdp_encoder", 1),
        (4, "fsdp_encoder", 1),
        (2, "fsdp", 2),
    ],
)
def test_fully_sharded_ranks_equal_one_process_on_the_joined_batch(
    num_ranks: int, kind: str, update_every: int
) -> None:
    expected, [_, columns] = run_steps(0, 1, "plain", update_every)
    for states, [_, own_columns] in run_ranks(num_ranks, run_steps, kind, update_every):
        assert own_columns <= columns / num_ranks + 4 * 32  # four parameters, each padded to 32
        for state, one in zip(states, expected, strict=True):
            for name, value in state.items():
                torch.testing.assert_close(
                    value, one[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
                )


def count_collectives(rank: int, num_ranks: int) -> list[tuple[str, int]]:
    """Collectives of the balancer itself in one step under fully_shard, with their sizes."""
    run = Run(rank, num_ranks, "fsdp")
    run.step()
    seen: list[tuple[str, int]] = []
    assert isinstance(run.balancer.engine, DataParallel)
    ranks = run.balancer.engine.ranks
    all_reduce, all_gather = ranks.all_reduce, ranks.all_gather
    ranks.all_reduce = lambda t, *a: (seen.append(("all_reduce", t.numel())), all_reduce(t, *a))[1]  # type: ignore[method-assign]
    ranks.all_gather = lambda t: (seen.append(("all_gather", t.numel())), all_gather(t))[1]  # type: ignore[method-assign]
    run.step()
    return seen


def test_a_fully_sharded_step_adds_two_all_reduces_of_one_number_per_task() -> None:
    for seen in run_ranks(2, count_collectives):
        # What must agree; whose gradients are not finite; the risks.
        assert seen == [("all_gather", 37), ("all_reduce", NUM_TASKS), ("all_reduce", NUM_TASKS)]


def run_with_missing_labels(rank: int, num_ranks: int, kind: str) -> list[dict[str, Tensor]]:
    """Task 1 has samples on rank 0 alone, task 2 nowhere in the second step."""
    run = Run(rank, num_ranks, kind)
    states = []
    for step in range(3):
        losses: list[Any] = losses_of(
            run.net(run.problem.inputs[run.rows]), run.problem.targets[run.rows]
        )
        counts = [20 // num_ranks] * NUM_TASKS
        if num_ranks == 1:  # rank 0 of two has the first half
            outputs = run.net(run.problem.inputs[:10])
            losses[1] = losses_of(outputs, run.problem.targets[:10])[1]
        elif rank == 1:
            counts[1] = 0
        if step == 1:
            losses[2] = None
        run.optimizer.zero_grad()
        run.balancer.backward(losses, num_samples=counts)
        run.optimizer.step()
        parameters = {name: whole(p.detach()).clone() for name, p in run.net.named_parameters()}
        states.append({"weights": run.balancer.task_weights.clone(), **parameters})
    return states


def test_a_loss_of_no_samples_stands_in_for_a_task_that_a_fully_sharded_rank_lacks() -> None:
    expected = run_with_missing_labels(0, 1, "plain")
    for states in run_ranks(2, run_with_missing_labels, "fsdp"):
        for state, one in zip(states, expected, strict=True):
            for name, value in state.items():
                torch.testing.assert_close(value, one[name], **TOLERANCE)


def save(rank: int, num_ranks: int, kind: str, folder: str) -> dict[str, Tensor]:
    """Three steps, a checkpoint, two more steps."""
    run = Run(rank, num_ranks, kind)
    run.step(3)
    state = {"net": run.net.state_dict(), "balancer": run.balancer.state_dict()}
    dcp.save(state, checkpoint_id=f"{folder}/dcp")
    full = {
        "net": {name: whole(value) for name, value in run.net.state_dict().items()},
        "balancer": full_state_dict(run.balancer),
    }
    if rank == 0:
        torch.save(full, f"{folder}/full.pt")
    run.step(2)
    return run.state()


def resume(rank: int, num_ranks: int, kind: str, folder: str, source: str) -> dict[str, Tensor]:
    run = Run(rank, num_ranks, kind)
    if source == "dcp":
        state: dict[str, Any] = {"net": run.net.state_dict(), "balancer": run.balancer.state_dict()}
        dcp.load(state, checkpoint_id=f"{folder}/dcp")
    else:
        state = torch.load(f"{folder}/full.pt", weights_only=True)
        for name, value in run.net.state_dict().items():
            if isinstance(value, DTensor):
                whole_value = state["net"][name]
                local = torch.distributed.tensor.distribute_tensor(
                    whole_value, value.device_mesh, value.placements
                )
                state["net"][name] = local
    run.net.load_state_dict(state["net"])
    run.balancer.load_state_dict(state["balancer"])
    run.step(2)
    return run.state()


@pytest.mark.parametrize(
    ("kind", "source", "before", "after"),
    [
        ("replicated", "dcp", 2, 4),
        ("replicated", "dcp", 4, 2),
        ("replicated", "full", 4, 2),
        ("fsdp", "dcp", 2, 4),
        ("fsdp", "dcp", 4, 2),
        ("fsdp", "full", 2, 4),
    ],
)
def test_a_checkpoint_goes_on_with_another_number_of_ranks(
    kind: str, source: str, before: int, after: int, tmp_path: Path
) -> None:
    expected = run_ranks(before, save, kind, str(tmp_path))[0]
    for state in run_ranks(after, resume, kind, str(tmp_path), source):
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name], **TOLERANCE)


@pytest.mark.parametrize("kind", ["replicated", "fsdp"])
def test_a_full_checkpoint_of_ranks_goes_on_in_one_process_and_back(
    kind: str, tmp_path: Path
) -> None:
    expected = run_ranks(2, save, kind, str(tmp_path))[0]
    alone = resume(0, 1, "plain", str(tmp_path), "full")
    for name, value in alone.items():
        torch.testing.assert_close(value, expected[name], **TOLERANCE)
    run = Run(0, 1, "plain")
    run.step(3)
    state = {"net": run.net.state_dict(), "balancer": run.balancer.state_dict()}
    torch.save(state, tmp_path / "full.pt")
    run.step(2)
    for state in run_ranks(2, resume, kind, str(tmp_path), "full"):
        for name, value in state.items():
            torch.testing.assert_close(value, run.state()[name], **TOLERANCE)


def resume_equally(rank: int, num_ranks: int, kind: str, folder: str) -> bool:
    undisturbed = save(rank, num_ranks, kind, folder)
    resumed = resume(rank, num_ranks, kind, folder, "dcp")
    return all(torch.equal(value, resumed[name]) for name, value in undisturbed.items())


@pytest.mark.parametrize("kind", ["replicated", "fsdp"])
def test_a_checkpoint_on_as_many_ranks_goes_on_to_the_bit(kind: str, tmp_path: Path) -> None:
    assert run_ranks(2, resume_equally, kind, str(tmp_path)) == [True, True]


def update_from_parts(rank: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Weights from gradients of one's own: cut as fully_shard cuts them, and whole in one process."""
    run, plain = Run(rank, num_ranks, "fsdp"), Run(0, 1, "plain")
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        grads = [
            [torch.randn(p.shape, generator=generator) for p in plain.net.encoder.parameters()]
            for _ in range(NUM_TASKS)
        ]
        plain.balancer.update_weights(grads)
        cut = [
            [
                distribute_tensor(grad, parameter.device_mesh, parameter.placements)
                for grad, parameter in zip(row, run.net.encoder.parameters(), strict=True)
            ]
            for row in grads
        ]
        run.balancer.update_weights(cut)
    return run.balancer.task_weights, plain.balancer.task_weights


def test_update_weights_takes_gradients_that_are_cut_as_the_parameters() -> None:
    for ours, expected in run_ranks(2, update_from_parts):
        torch.testing.assert_close(ours, expected, **TOLERANCE)
        assert ours.std() > 1e-3  # they did move


def refuse(rank: int, num_ranks: int) -> list[str]:
    run = Run(rank, num_ranks, "fsdp")
    problem = make_problem(NUM_TASKS)
    losses: list[Any] = losses_of(run.net(run.problem.inputs[run.rows]), problem.targets[run.rows])
    if rank == 0:
        losses[0] = None
    own_heads = Run(rank, num_ranks, "fsdp", head_weighting="task_weights")
    plain = torch.zeros(3, requires_grad=True)
    return [
        raised_by(lambda: run.balancer.backward(losses))[1],
        raised_by(own_heads.step)[1],
        raised_by(lambda: published([*run.net.encoder.parameters(), plain], num_tasks=NUM_TASKS))[
            1
        ],
        raised_by(
            lambda: published(run.net.encoder.parameters(), num_tasks=NUM_TASKS, reduce="risks")
        )[1],
    ]


def test_what_fully_sharded_parameters_cannot_do_is_an_error_on_every_rank() -> None:
    for absent, heads, plain, risks in run_ranks(2, refuse):
        assert "task 0 has no loss on rank 0" in absent
        assert "head_weighting='task_weights' does not work with fully_shard" in heads
        assert "Expected `shared_parameters` on one device mesh" in plain
        assert "reduce='grads' with fully_shard" in risks
