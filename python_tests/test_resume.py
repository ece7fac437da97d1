"""kill -9 at a random step, on one process and on two: the run that goes on ends with the same bytes."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _inputs import make_problem
from _ranks import CONTEXT, run_ranks
from test_distributed import NUM_TASKS, Net, losses_of, own_rows
from torch.nn.parallel import DistributedDataParallel

from excessmtl_ext import ExcessMTL
from excessmtl_ext.distributed import full_state_dict
from excessmtl_ext.training import TrainConfig, train
from excessmtl_ext.training.run_record import write_atomically

# 300 samples in batches of 50: 6 steps an epoch.
CONFIG = TrainConfig(
    dataset="digits",
    method="excessmtl-recommended",
    epochs=3,
    batch_size=50,
    lr=1e-3,
    noise=0.8,
    num_train=300,
    task_weight_interval=1,
)
NUM_STEPS = 18
KILL_STEPS = random.Random(7).sample(range(1, NUM_STEPS), 3)


def train_and_die(folder: str, step: int | None) -> None:
    torch.set_num_threads(1)

    def report(progress: Any) -> None:
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    train(CONFIG, folder, resume=True, report=report)


def run_and_wait(folder: Path, step: int | None) -> int | None:
    process = CONTEXT.Process(target=train_and_die, args=(str(folder), step), daemon=True)
    process.start()
    process.join(120)
    assert not process.is_alive()
    return process.exitcode


@pytest.mark.parametrize("step", KILL_STEPS)
def test_a_process_killed_at_a_random_step_ends_with_the_same_bytes(
    tmp_path: Path, step: int
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert run_and_wait(undisturbed, None) == 0
    assert run_and_wait(killed, step) == -signal.SIGKILL
    assert not (killed / "metrics.json").exists()
    assert run_and_wait(killed, None) == 0
    for name in ("metrics.csv", "task_weights.csv", "metrics.json", "config.json"):
        assert (killed / name).read_bytes() == (undisturbed / name).read_bytes(), name


SAVE_EVERY = 4


def train_ranks(rank: int, num_ranks: int, folder: str, kill_at: int | None) -> None:
    """Two ranks, a checkpoint every fourth step, written by rank 0, and a row of weights after every step."""
    path, table = Path(folder, "checkpoint.pt"), Path(folder, "weights.csv")
    net = Net(make_problem(NUM_TASKS))
    model = DistributedDataParallel(net)
    balancer = ExcessMTL(
        net.encoder.parameters(), num_tasks=NUM_TASKS, robust_step_size=0.3, model=model
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    first = 0
    if path.exists():
        checkpoint = torch.load(path, weights_only=True)
        first = checkpoint["step"]
        net.load_state_dict(checkpoint["net"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        balancer.load_state_dict(checkpoint["balancer"])
        if rank == 0:
            rows = table.read_text().splitlines(keepends=True)[:first]
            table.write_text("".join(rows))
    for step in range(first, NUM_STEPS):
        if kill_at == step and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(20, 6, generator=generator)
        targets = torch.randn(20, NUM_TASKS, generator=generator)
        rows_here = own_rows(rank, [8, 12])
        optimizer.zero_grad()
        losses = losses_of(model(inputs[rows_here]), targets[rows_here])
        balancer.backward(losses, num_samples=len(inputs[rows_here]))
        optimizer.step()
        if rank == 0:
            with table.open("a") as file:
                file.write(",".join(map(repr, balancer.task_weights.tolist())) + "\n")
        if (step + 1) % SAVE_EVERY == 0:
            content = {
                "step": step + 1,
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "balancer": full_state_dict(balancer),  # every rank: it is collective
            }
            if rank == 0:
                write_atomically(path, lambda file, content=content: torch.save(content, file))
            dist.barrier()


@pytest.mark.parametrize("step", KILL_STEPS)
def test_two_ranks_of_which_one_is_killed_end_with_the_same_bytes(
    tmp_path: Path, step: int
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    undisturbed.mkdir()
    killed.mkdir()
    run_ranks(2, train_ranks, str(undisturbed), None)
    with pytest.raises(AssertionError, match="Rank 0"):  # its peer is gone
        run_ranks(2, train_ranks, str(killed), step)
    run_ranks(2, train_ranks, str(killed), None)
    assert (killed / "weights.csv").read_bytes() == (undisturbed / "weights.csv").read_bytes()
    assert len((killed / "weights.csv").read_text().splitlines()) == NUM_STEPS
