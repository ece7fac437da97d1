"""kill -9 at a random step, on one process and on two: the run that goes on ends with the same bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _inputs import make_problem
from _published import published
from _rank_model import NUM_TASKS, Net, losses_of, own_rows
from _ranks import CONTEXT, run_ranks
from torch.nn.parallel import DistributedDataParallel

from excessmtl_ext.distributed import full_state_dict
from excessmtl_ext.training import TrainConfig, TrainingInterrupted, train
from excessmtl_ext.training.run.record import write_atomically

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
ONE_AND_MORE = [
    KILL_STEPS[0],
    *(pytest.param(step, marks=pytest.mark.slow) for step in KILL_STEPS[1:]),
]


def train_and_die(folder: str, step: int | None) -> None:
    torch.set_num_threads(1)

    def report(progress: Any) -> None:
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    train(CONFIG, folder, resume=True, report=report)


def run_and_wait(folder: Path, step: int | None) -> int | None:
    process = CONTEXT.Process(target=train_and_die, args=(str(folder), step), daemon=True)
    process.start()
    process.join()
    return process.exitcode


def assert_same_files(first: Path, second: Path) -> None:
    for name in ("metrics.csv", "task_weights.csv", "metrics.json", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_process") / "run"
    assert run_and_wait(folder, None) == 0
    return folder


@pytest.mark.parametrize("step", ONE_AND_MORE)
def test_a_process_killed_at_a_random_step_ends_with_the_same_bytes(
    undisturbed: Path, tmp_path: Path, step: int
) -> None:
    killed = tmp_path / "killed"
    assert run_and_wait(killed, step) == -signal.SIGKILL
    assert not (killed / "metrics.json").exists()
    assert run_and_wait(killed, None) == 0
    assert_same_files(killed, undisturbed)


# ---- at every point at which a file changes


class Killer:
    """Kills this process right before or right after the change of a file number ``point``; counts them all."""

    CHANGES = ("fsync", "replace", "unlink", "mkdir", "ftruncate", "pwrite")

    def __init__(self, point: int | None) -> None:
        self.point = point
        self.num_points = 0
        self.durable: dict[str, int] = {}  # bytes of a file that have reached the disk
        for name in self.CHANGES:
            setattr(os, name, self._with_points(name, getattr(os, name)))

    def _with_points(self, name: str, change: Any) -> Any:
        def changed(first: Any, *arguments: Any, **keywords: Any) -> Any:
            self._pass(first if name == "fsync" else None)
            result = change(first, *arguments, **keywords)
            if name == "fsync":
                self.durable[name_of(first)] = os.fstat(first).st_size
            elif name == "replace":
                self.durable[str(arguments[0])] = self.durable.pop(str(first), 0)
            elif name == "unlink":
                self.durable.pop(str(first), None)
            self._pass(None)
            return result

        return changed

    def _pass(self, descriptor: int | None) -> None:
        if self.num_points == self.point:
            if descriptor is not None and stat.S_ISREG(os.fstat(descriptor).st_mode):
                size = os.fstat(descriptor).st_size
                kept = min(self.durable.get(name_of(descriptor), 0), size)
                os.truncate(descriptor, kept + (size - kept) * 2 // 3)  # a write cut short
            os.kill(os.getpid(), signal.SIGKILL)
        self.num_points += 1


def name_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def stop_within_the_first_epoch(config: TrainConfig, folder: str) -> None:
    asked = iter(range(NUM_STEPS))
    with contextlib.suppress(TrainingInterrupted):
        train(config, folder, resume=True, should_stop=lambda: next(asked) == 2)


def resumed_after_kills(folder: str, stops_first: bool, points: list[int] | None) -> None:
    """Kills a run at each of the points, resumes it, and writes which files differ from an undisturbed run's."""
    torch.set_num_threads(1)
    config = dataclasses.replace(CONFIG, epochs=2, num_train=100)
    undisturbed = Path(folder) / "undisturbed"
    train(config, undisturbed)

    def forked(run: Path, point: int | None) -> int:
        """Returns how many points there were, or -1 where the run was killed."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            killer = Killer(point)
            train(config, run, resume=True)
            os.write(writer, str(killer.num_points).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            counted = pipe.read()
        os.waitpid(pid, 0)
        return int(counted) if counted else -1

    def begun(name: str) -> Path:
        run = Path(folder) / name
        if stops_first:
            stop_within_the_first_epoch(config, str(run))
        return run

    num_points = forked(begun("counted"), None)
    different: dict[int, list[str]] = {}
    for point in range(num_points) if points is None else [p for p in points if p < num_points]:
        run = begun(f"killed_{point}")
        assert forked(run, point) == -1, point
        train(config, run, resume=True)
        names = [
            name
            for name in ("metrics.csv", "task_weights.csv", "metrics.json", "config.json")
            if (run / name).read_bytes() != (undisturbed / name).read_bytes()
        ]
        models = [
            torch.load(each / "best_model.pt", weights_only=True) for each in (run, undisturbed)
        ]
        if any(
            not torch.equal(models[0]["model"][n], models[1]["model"][n])
            for n in models[1]["model"]
        ):
            names.append("best_model.pt")
        names += [path.name for path in run.iterdir() if path.name.endswith(".tmp")]
        if names:
            different[point] = names
        shutil.rmtree(run)
    (Path(folder) / "result.json").write_text(json.dumps([num_points, different]))


@pytest.mark.parametrize("stops_first", [False, True], ids=["from the start", "resumed"])
@pytest.mark.parametrize(
    "points",
    [random.Random(11).sample(range(80), 8), pytest.param(None, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_a_run_killed_at_any_change_of_a_file_ends_with_the_same_bytes(
    tmp_path: Path, stops_first: bool, points: list[int] | None
) -> None:
    process = CONTEXT.Process(
        target=resumed_after_kills, args=(str(tmp_path), stops_first, points), daemon=True
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    num_points, different = json.loads((tmp_path / "result.json").read_text())
    assert num_points > 60
    assert different == {}


def train_rank_and_die(
    rank: int, num_ranks: int, config: TrainConfig, folder: str, step: int | None
) -> None:
    def report(progress: Any) -> None:
        if rank == 1 and progress.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    train(config, folder, resume=True, report=report)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_of_two_ranks_killed_at_random_steps_ends_with_the_same_bytes(
    tmp_path: Path, kind: Any
) -> None:
    config = dataclasses.replace(CONFIG, distributed=kind)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run_ranks(2, train_rank_and_die, config, str(undisturbed), None)
    for step in sorted(KILL_STEPS)[:: 1 if kind == "ddp" else 2]:
        with pytest.raises(AssertionError, match="Rank 0"):  # its peer is gone
            run_ranks(2, train_rank_and_die, config, str(killed), step)
        assert not (killed / "metrics.json").exists()
    run_ranks(2, train_rank_and_die, config, str(killed), None)
    assert_same_files(killed, undisturbed)


# ---- the command


EPOCHS = 4
EPOCH_TO_DIE_IN = 3

# The command as torchrun starts it. Once, the worker of rank 1 says in which process it is, and waits to be killed.
COMMAND = """
import os, sys
from pathlib import Path
from excessmtl_ext.training.cli import main
from excessmtl_ext.training.run import loop

note = Path(sys.argv.pop(1))
ordinary_step = loop._Run._train_step

def step_that_waits(self, indices):
    if self.state.step == {step} and os.environ["RANK"] == "1" and note.exists():
        with note.open("w") as pipe:
            pipe.write(str(os.getpid()))
        with note.open() as pipe:
            pipe.read()
    ordinary_step(self, indices)

loop._Run._train_step = step_that_waits
main()
"""


def start_torchrun(folder: Path, log: Path, note: Path) -> subprocess.Popen[bytes]:
    """As a user starts it, but for the port, which is to be a free one."""
    script = folder.parent / "command.py"
    script.write_text(COMMAND.format(step=6 * EPOCH_TO_DIE_IN - 2))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += [str(script), str(note), "train", "digits", "--distributed", "ddp"]
    words += ["--method", CONFIG.method, "--epochs", str(EPOCHS), "--batch-size", "50"]
    words += ["--noise", "0.8", "--num-train", "300", "--device", "cpu", "--resume"]
    words += ["--output", str(folder)]
    with log.open("ab") as file:
        return subprocess.Popen(
            words, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def close_when_over(process: subprocess.Popen[bytes], note: Path) -> None:
    """Ends the wait for a worker that never comes, because torchrun has failed."""
    process.wait()
    with contextlib.suppress(OSError):  # nobody waits
        os.close(os.open(note, os.O_WRONLY | os.O_NONBLOCK))


@pytest.mark.slow
def test_torchrun_of_which_a_worker_is_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, distributed="ddp", epochs=EPOCHS, task_weight_interval=10)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run_ranks(2, train_rank_and_die, config, str(undisturbed), None)
    log, note = tmp_path / "log", tmp_path / "note"
    os.mkfifo(note)
    process = start_torchrun(killed, log, note)
    threading.Thread(target=close_when_over, args=(process, note), daemon=True).start()
    try:
        pid = note.read_text()  # waits until the worker is there
        assert pid, log.read_text()
        os.kill(int(pid), signal.SIGKILL)
        assert process.wait() != 0  # torchrun ends the other worker
        assert (killed / "checkpoint.pt").exists()
        assert not (killed / "metrics.json").exists()
        note.unlink()
        process = start_torchrun(killed, log, note)
        assert process.wait() == 0, log.read_text()
    finally:
        process.kill()
    assert_same_files(killed, undisturbed)
    assert log.read_text().count("Figure: ") == 1  # one of the two shows what came out


SAVE_EVERY = 4


def train_ranks(rank: int, num_ranks: int, folder: str, kill_at: int | None) -> None:
    """Two ranks, a checkpoint every fourth step, written by rank 0, and a row of weights after every step."""
    path, table = Path(folder, "checkpoint.pt"), Path(folder, "weights.csv")
    net = Net(make_problem(NUM_TASKS))
    model = DistributedDataParallel(net)
    balancer = published(
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


@pytest.mark.parametrize("step", ONE_AND_MORE)
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
