"""``balancer.split``: every trainer that calls ``backward`` itself takes the same steps as the plain loop."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from _paths import TESTS
from _ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from excessmtl_ext import ExcessMTL, TaskSplit

NUM_STEPS, BATCH, LR = 4, 16, 0.1


class Model(nn.Module):
    """Three tasks on one encoder; returns the sum of the losses that ``tasks`` names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8))
        self.split = TaskSplit(ExcessMTL(num_tasks=3))
        self.heads = nn.ModuleList([nn.Linear(8, 1) for _ in range(3)])

    def forward(
        self, inputs: Tensor, labels: Tensor, tasks: tuple[int, ...] = (0, 1, 2)
    ) -> dict[str, Tensor]:
        copies = self.split(self.encoder(inputs))
        losses = [
            (self.heads[task](copies[task])[:, 0] - labels[:, task]).square().mean()
            for task in tasks
        ]
        return {"loss": torch.stack(losses).sum()}

    @property
    def balancer(self) -> ExcessMTL:
        assert isinstance(self.split.balancer, ExcessMTL)
        return self.split.balancer


class Rows(Dataset[dict[str, Tensor]]):
    """The same rows for everybody, in order."""

    def __init__(self, start: int = 0, step: int = 1) -> None:
        generator = torch.Generator().manual_seed(1)
        size = NUM_STEPS * BATCH
        inputs = torch.randn(size, 6, generator=generator)
        labels = torch.randn(size, 3, generator=generator) * torch.arange(1, 4)
        self.inputs, self.labels = inputs[start::step], labels[start::step]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": self.inputs[index], "labels": self.labels[index]}


Result = tuple[list[Tensor], list[Tensor]]


def result_of(model: Model) -> Result:
    """Weights and risks; parameters."""
    balancer = model.balancer
    assert int(balancer.num_steps) == NUM_STEPS
    parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    state = [balancer.task_weights, balancer.excess_risk, balancer.pass_weights()]
    return [each.detach().clone() for each in state], [p.detach().clone() for p in parameters]


def loop(
    model: Model,
    forward: Callable[..., Any] | None = None,
    rows: Dataset[Any] | None = None,
    batch: int = BATCH,
    *,
    autocast: bool = False,
    scaler: torch.amp.GradScaler | None = None,
) -> Result:
    """A loop as anybody writes it; it names no balancer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for given in DataLoader(rows or Rows(), batch_size=batch):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = (model if forward is None else forward)(**given)["loss"]
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return result_of(model)


@pytest.fixture(scope="module")
def expected() -> Result:
    return loop(Model())


def check(found: Result, expected: Result, tolerance: float = 1e-5) -> None:
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def test_the_weights_have_something_to_decide(expected: Result) -> None:
    weights = expected[0][2]
    assert float(weights.amax() / weights.amin()) > 1.5


# ---- trainers of others; Accelerate and transformers share the rows among the processes themselves


def lightning(folder: str, num_ranks: int) -> Result:
    import lightning.pytorch as pl

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.model(**batch)["loss"]  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LR)

    module = Module()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=num_ranks,
        strategy="ddp" if num_ranks > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=False,  # its own one shuffles
    )
    rows = Rows(trainer.global_rank, num_ranks)
    trainer.fit(module, DataLoader(rows, batch_size=BATCH // num_ranks))
    return result_of(module.model)


def accelerate(folder: str, num_ranks: int) -> Result:
    import accelerate as hf_accelerate

    accelerator = hf_accelerate.Accelerator(cpu=True)
    assert accelerator.num_processes == num_ranks
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loader = DataLoader(Rows(), batch_size=BATCH // num_ranks)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        optimizer.zero_grad()
        accelerator.backward(prepared(**batch)["loss"])
        optimizer.step()
    return result_of(model)


def arguments(folder: str, num_ranks: int) -> Any:
    import transformers as hf

    made = hf.TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        ddp_backend="gloo" if num_ranks > 1 else None,
        optim="sgd",
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        num_train_epochs=1,
        per_device_train_batch_size=BATCH // num_ranks,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    assert made.world_size == num_ranks
    return made


def transformers(folder: str, num_ranks: int) -> Result:
    import transformers as hf

    model = Model()
    hf.Trainer(model=model, args=arguments(folder, num_ranks), train_dataset=Rows()).train()
    return result_of(model)


class DomainRows(Rows):
    """A class and a domain for every row; every eight rows have each domain equally often."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        labels = (self.labels[index, 0] > 0).long()
        return {"inputs": self.inputs[index], "labels": labels, "domain_id": index % 4 // 2}


class Classifier(nn.Module):
    """Two classes, and no word of domains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.head = nn.Linear(16, 2)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.encoder(inputs))}


def domain_trainer(folder: str, num_ranks: int) -> Result:
    from excessmtl_ext.integrations.domain_trainer import DomainTrainer

    model = Classifier()
    balancer = ExcessMTL(num_tasks=2, feature_dim=-1)
    trainer = DomainTrainer(
        model=model,
        args=arguments(folder, num_ranks),
        train_dataset=DomainRows(),
        eval_dataset=DomainRows(),
        balancer=balancer,
        head=model.head,
    )
    trainer.train()
    found = trainer.evaluate()
    losses = torch.tensor([found["eval_loss/0"], found["eval_loss/1"]])
    state = [balancer.task_weights, balancer.excess_risk, losses]
    return [each.clone() for each in state], [p.detach().clone() for p in model.parameters()]


TRAINERS: dict[str, Callable[[str, int], Result]] = {
    "lightning": lightning,
    "accelerate": accelerate,
    "transformers": transformers,
    "domain_trainer": domain_trainer,
}


def skip_without(name: str) -> None:
    needed = {"lightning": ["lightning.pytorch"], "accelerate": ["accelerate"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what their own imports say
        for package in needed.get(name, ["accelerate", "transformers"]):
            pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.filterwarnings("ignore")
def test_a_trainer_takes_the_steps_of_the_plain_loop(
    name: str, expected: Result, tmp_path: Any
) -> None:
    skip_without(name)
    found = TRAINERS[name](str(tmp_path), 1)
    if name != "domain_trainer":  # another model; its own tests have its loop
        check(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.filterwarnings("ignore")
def test_a_trainer_on_two_processes_takes_the_steps_of_the_joined_batch(
    name: str, expected: Result, tmp_path: Any
) -> None:
    skip_without(name)
    if name == "domain_trainer":
        expected = TRAINERS[name](str(tmp_path), 1)
        assert abs(float(expected[0][0][0]) - 0.5) > 1e-3
    paths = [str(each) for each in (TESTS, TESTS / "contract")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         __file__, name, str(tmp_path)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        check(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected)


# ---- one process


def test_autocast_with_a_grad_scaler() -> None:
    """A scale of a power of two changes no bit of bfloat16, and no scale changes the weights while it stays."""
    scaled = loop(Model(), autocast=True, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    plain = loop(Model(), autocast=True)
    check((scaled[0][:1] + scaled[0][2:], scaled[1]), (plain[0][:1] + plain[0][2:], plain[1]))


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_compiled_model_and_loss(expected: Result) -> None:
    model = Model()
    check(loop(model, torch.compile(model, fullgraph=True)), expected)


# ---- two ranks


def ddp_rank(rank: int, num_ranks: int) -> Result:
    model = Model()
    ddp = DistributedDataParallel(model)
    return loop(model, ddp, Rows(rank, num_ranks), BATCH // num_ranks)


def fsdp_rank(rank: int, num_ranks: int) -> Result:
    from torch.distributed.fsdp import fully_shard

    model = Model()
    fully_shard(model.encoder)
    fully_shard(model)
    return loop(model, None, Rows(rank, num_ranks), BATCH // num_ranks)


def absent_task_rank(rank: int, num_ranks: int) -> Result:
    """Rank 1 has no labels of task 1."""
    model = Model()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    tasks = (0, 1, 2) if rank == 0 else (0, 2)
    return loop(
        model,
        lambda **given: ddp(**given, tasks=tasks),
        Rows(rank, num_ranks),
        BATCH // num_ranks,
    )


@pytest.mark.parametrize("function", [ddp_rank, fsdp_rank])
def test_two_ranks_take_the_steps_of_the_joined_batch(
    function: Callable[[int, int], Result], expected: Result
) -> None:
    for found in run_ranks(2, function):
        check(found, expected)


def test_a_rank_without_a_task_takes_part() -> None:
    """Its gradient counts as zero, as in DistributedDataParallel."""
    first, second = run_ranks(2, absent_task_rank)
    for mine, other in zip(first, second, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert torch.equal(a, b)
    model = Model()

    def joined(inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        copies = model.split(model.encoder(inputs))
        losses = [
            (head(z)[:, 0] - labels[:, task]).square()
            for task, (head, z) in enumerate(zip(model.heads, copies, strict=True))
        ]
        has_labels = torch.arange(len(inputs)) % 2 == 0  # those of rank 0
        return {"loss": losses[0].mean() + (losses[1] * has_labels).mean() + losses[2].mean()}

    check(first, loop(model, joined))


if __name__ == "__main__":  # a rank of torchrun
    trainer, output = sys.argv[1:]
    torch.save(TRAINERS[trainer](output, 2), f"{output}/{os.environ['RANK']}.pt")
