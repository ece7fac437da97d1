"""Training runs of several processes: the numbers of one, written once, and errors that end all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from _ranks import raised_by, run_ranks
from torch import Tensor, nn

from excessmtl_ext.data import Task, TensorSplit
from excessmtl_ext.training import Progress, TrainConfig, TrainingInterrupted, train
from excessmtl_ext.training.run import loop
from excessmtl_ext.training.run.device import local_device
from excessmtl_ext.training.run.metrics import evaluate
from excessmtl_ext.training.run.ranks import RunRanks
from excessmtl_ext.training.run.record import read_table
from excessmtl_ext.training.run.workloads import find_workload

# 385 samples in batches of 64: 7 steps an epoch, and the last batch is one sample, which rank 0 has.
CONFIG = TrainConfig(
    dataset="digits",
    method="excessmtl-recommended",
    epochs=2,
    batch_size=64,
    lr=1e-3,
    noise=0.8,
    num_train=385,
    task_weight_interval=1,
)
COMPARED = ("metrics.csv", "task_weights.csv", "metrics.json", "config.json")
KINDS = ("ddp", "fsdp")

# Sums over ranks round differently from sums over a batch; measured 1e-7 after 24 steps.
RELATIVE_TOLERANCE = 1e-5


def of_kind(kind: str, **changes: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, distributed=kind, **changes)


def train_rank(
    rank: int, num_ranks: int, config: TrainConfig, folder: str
) -> tuple[dict[str, Any], list[Progress]]:
    reported: list[Progress] = []
    return train(config, folder, report=reported.append), reported


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_write_the_metrics_of_one_process(tmp_path: Path, kind: str) -> None:
    alone = train(CONFIG, tmp_path / "alone")
    results = run_ranks(2, train_rank, of_kind(kind), str(tmp_path / kind))
    assert results[0] == results[1]  # metrics and progress, to the bit
    for name in ("metrics.csv", "task_weights.csv"):
        expected = read_table(tmp_path / "alone" / name)
        rows = read_table(tmp_path / kind / name)
        assert len(rows) == len(expected)
        for row, one in zip(rows, expected, strict=True):
            assert row == pytest.approx(one, rel=RELATIVE_TOLERANCE)
    assert results[0][0]["selected"] == pytest.approx(alone["selected"], rel=RELATIVE_TOLERANCE)
    best = torch.load(tmp_path / kind / "best_model.pt", weights_only=True)["model"]
    for name, value in torch.load(tmp_path / "alone" / "best_model.pt")["model"].items():
        torch.testing.assert_close(best[name], value, rtol=1e-4, atol=1e-6)
    assert sorted(path.name for path in (tmp_path / kind).iterdir()) == sorted(
        path.name for path in (tmp_path / "alone").iterdir()
    )


def data_of_rank(
    rank: int, num_ranks: int, config: TrainConfig
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Corrupted samples, all training labels of the noisy task, and this rank's parts of the first epoch."""
    data = find_workload(config.dataset).load(config)
    ranks = RunRanks(dist.group.WORLD if num_ranks > 1 else None)
    parts = [ranks.part(batch) for batch in torch.arange(len(data.train)).split(config.batch_size)]
    assert isinstance(data.train, TensorSplit)
    return data.corrupted["bottom_right"], data.train.targets[1], parts


def test_ranks_corrupt_the_same_labels_and_share_every_batch() -> None:
    corrupted, labels, batches = data_of_rank(0, 1, CONFIG)
    first, second = run_ranks(2, data_of_rank, CONFIG)
    for result in (first, second):
        assert torch.equal(result[0], corrupted)
        assert torch.equal(result[1], labels)
    for batch, *parts in zip(batches, first[2], second[2], strict=True):
        assert torch.equal(torch.cat(parts), batch)
        assert len(parts[0]) - len(parts[1]) in (0, 1)


# ---- stop, kill and resume


def stop_and_go_on(rank: int, num_ranks: int, kind: str, folder: str) -> list[float]:
    """A run whose losses carry noise from torch's generator; stopped twice at the wish of rank 1 alone."""
    config, draws = of_kind(kind), []
    ordinary_losses = loop.task_losses

    def noisy_losses(*args: Any) -> list[Tensor | None]:
        factor = 1 + 0.1 * torch.rand(())
        draws.append(float(factor))
        return [None if loss is None else loss * factor for loss in ordinary_losses(*args)]

    with mock.patch.object(loop, "task_losses", noisy_losses):
        train(config, f"{folder}/undisturbed")
        undisturbed, draws[:] = list(draws), []
        for num_steps in (3, 6):
            calls = iter(range(100))
            with pytest.raises(TrainingInterrupted):
                train(
                    config,
                    f"{folder}/stopped",
                    resume=True,
                    should_stop=lambda calls=calls, n=num_steps: rank == 1 and next(calls) >= n,
                )
        train(config, f"{folder}/stopped", resume=True)
    assert draws == undisturbed
    return draws


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_stop_together_and_resume_to_the_same_bytes(tmp_path: Path, kind: str) -> None:
    first, second = run_ranks(2, stop_and_go_on, kind, str(tmp_path))
    assert not set(first) & set(second)  # each rank has random numbers of its own
    for name in COMPARED:
        undisturbed, stopped = tmp_path / "undisturbed" / name, tmp_path / "stopped" / name
        assert undisturbed.read_bytes() == stopped.read_bytes(), name


# ---- errors


class BrokenSplit:
    """Cannot read the third batch."""

    def __init__(self, split: Any) -> None:
        self.split, self.num_read = split, 0

    def __len__(self) -> int:
        return len(self.split)

    def to(self, device: torch.device) -> BrokenSplit:
        return self

    def batch(self, indices: Tensor, *, epoch: int | None = None) -> Any:
        self.num_read += 1
        if self.num_read == 3:
            raise FileNotFoundError("no such frame")
        return self.split.batch(indices, epoch=epoch)


def fail(rank: int, num_ranks: int, where: str, folder: str) -> tuple[str, str]:
    config = of_kind("ddp", epochs=1)
    workload = find_workload(config.dataset)
    if where == "resume":  # rank 0 alone looks into the folder
        train(config, folder)
        return raised_by(lambda: train(config, folder))
    if where == "data" and rank == 1:

        def load(config: TrainConfig) -> Any:
            raise FileNotFoundError("no MNIST here")

        workload = dataclasses.replace(workload, load=load)
    if where == "batch" and rank == 1:
        data = workload.load(config)
        broken = dataclasses.replace(data, train=BrokenSplit(data.train))  # type: ignore[arg-type]
        workload = dataclasses.replace(workload, load=lambda config: broken)
    with mock.patch.object(loop, "find_workload", lambda dataset: workload):
        return raised_by(lambda: train(config, folder))


@pytest.mark.parametrize(
    ("where", "failing", "message"),
    [
        ("data", 1, ("FileNotFoundError", "no MNIST here")),
        ("batch", 1, ("FileNotFoundError", "no such frame")),
        ("resume", 0, ("FileExistsError", "Pass --resume")),
    ],
)
def test_an_error_on_one_rank_ends_the_run_on_all(
    tmp_path: Path, where: str, failing: int, message: tuple[str, str]
) -> None:
    results = run_ranks(2, fail, where, str(tmp_path / "run"))
    assert results[failing][0] == message[0]
    assert message[1] in results[failing][1]
    other = 1 - failing
    assert results[other] == (
        "OtherRankFailed",
        f"Rank {other} stops because rank(s) [{failing}] failed.",
    )


def test_a_distributed_run_says_how_it_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError, match="Start it as: torchrun --nproc-per-node 2 --no-python excessmtl"
    ):
        train(of_kind("ddp"), tmp_path)
    with pytest.raises(ValueError, match=r"Expected `method` to be one of excessmtl, .*'uniform'"):
        train(of_kind("ddp", method="uniform"), tmp_path)
    with pytest.raises(ValueError, match="Expected `distributed` to be 'ddp', 'fsdp' or None"):
        of_kind("horovod")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"each would train the same\. Pass --distributed"):
        train(CONFIG, tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device(torch.device("cuda")) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="Expected `device` without a number"):
        local_device(torch.device("cuda", 0))
    assert not list(tmp_path.iterdir())


# ---- evaluation


TASKS = (
    Task("class", 4),
    Task("value", 1, "regression"),
    Task("pixels", 3, "segmentation"),
    Task("depth", 1, "depth"),
    Task("normals", 3, "normals"),
)


class Split:
    """Ten samples with a target of every kind, in three batches; the value is missing in the last."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.inputs = torch.randn(10, 3, 4, 4, generator=generator)
        self.targets = [
            torch.randint(4, (10,), generator=generator),
            torch.randn(10, generator=generator),
            torch.randint(-1, 3, (10, 4, 4), generator=generator),
            torch.rand(10, 1, 4, 4, generator=generator).sub_(0.2).clamp_(min=0),
            nn.functional.normalize(torch.randn(10, 3, 4, 4, generator=generator), dim=1),
        ]

    def batches(self, batch_size: int) -> Iterator[Any]:
        for indices in torch.arange(10).split(batch_size):
            targets: list[Tensor | None] = [target[indices] for target in self.targets]
            if 9 in indices:
                targets[1] = None
            yield self.inputs[indices], targets


class Model(nn.Module):
    def forward(self, inputs: Tensor) -> list[Tensor]:
        columns = inputs.flatten(1)
        return [columns[:, :4], columns[:, :1], inputs * 2, inputs[:, :1].abs(), inputs + 0.1]


def evaluate_on(rank: int, num_ranks: int) -> dict[str, float]:
    ranks = RunRanks(dist.group.WORLD) if num_ranks > 1 else None
    return evaluate(Model(), Split(), TASKS, batch_size=4, ranks=ranks)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_evaluate_every_sample_once_and_agree(num_ranks: int) -> None:
    alone = evaluate_on(0, 1)
    results = run_ranks(num_ranks, evaluate_on)
    assert results[0] == pytest.approx(alone, rel=1e-12)
    assert all(result == results[0] for result in results)
