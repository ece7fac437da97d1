"""PyTorch Lightning: a balancer in a LightningModule, under both kinds of optimization."""

from __future__ import annotations

import csv
import warnings

import pytest
import torch
from _asserts import assert_equal_bits
from _inputs import Problem, make_problem
from _published import published
from torch.utils.data import DataLoader, TensorDataset

from excessmtl_ext import Balancer, ExcessMTL, GroupDRO, Uniform

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its own imports say
    pytest.importorskip("lightning", reason="lightning is not installed")
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger

from excessmtl_ext.integrations.lightning import TaskWeightLogger

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*dataloader.*num_workers"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

METHODS = {
    "ExcessMTL": lambda p: published(p, num_tasks=3, robust_step_size=0.5),
    "official": lambda p: ExcessMTL.from_preset("official", p, num_tasks=3, robust_step_size=0.5),
    "GroupDRO": lambda p: GroupDRO(p, num_tasks=3, robust_step_size=0.1),
}


class Automatic(pl.LightningModule):
    def __init__(self, problem: Problem, balancer: Balancer) -> None:
        super().__init__()
        self.encoder, self.heads = problem.encoder, problem.heads
        self.balancer = balancer

    def losses(self, batch):
        inputs, targets = batch
        features = self.encoder(inputs)
        return [
            (head(features)[:, 0] - targets[:, task]).square().mean()
            for task, head in enumerate(self.heads)
        ]

    def training_step(self, batch, batch_idx):
        return self.balancer(self.losses(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Manual(Automatic):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.balancer(self.losses(batch)))
        optimizer.step()


class OwnBackward(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.balancer.backward(self.losses(batch))
        optimizer.step()


def loader(problem: Problem) -> DataLoader:
    return DataLoader(TensorDataset(problem.inputs, problem.targets), batch_size=5)


def fit(
    module: pl.LightningModule, problem: Problem, folder, ckpt_path=None, **options
) -> pl.Trainer:
    settings = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        **options,
    }
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, loader(problem), ckpt_path=ckpt_path)
    return trainer


def own_loop(make) -> tuple[Problem, Balancer]:
    problem = make_problem()
    balancer = make(problem.encoder.parameters())
    optimizer = torch.optim.SGD(problem.parameters(), lr=0.05)
    for _ in range(2):
        for batch in loader(problem):
            optimizer.zero_grad()
            balancer.backward(Automatic(problem, balancer).losses(batch))
            optimizer.step()
    return problem, balancer


@pytest.mark.parametrize("kind", [Automatic, Manual, OwnBackward], ids=lambda k: k.__name__)
@pytest.mark.parametrize("make", METHODS.values(), ids=list(METHODS))
def test_the_trainer_trains_as_a_loop_of_ones_own(kind, make, tmp_path):
    problem = make_problem()
    module = kind(problem, make(problem.encoder.parameters()))
    fit(module, problem, tmp_path)
    expected, balancer = own_loop(make)
    assert_equal_bits(problem.parameters(), expected.parameters())
    assert torch.equal(module.balancer.task_weights, balancer.task_weights)
    assert module.balancer.num_steps.item() == 8


def test_accumulated_batches_count_as_steps_and_do_not_scale_the_risk(tmp_path):
    """Lightning divides the loss by 2; the balancer undoes that for its weights and leaves it in the gradients."""
    problem = make_problem()
    make = METHODS["ExcessMTL"]
    module = Automatic(problem, make(problem.encoder.parameters()))
    fit(module, problem, tmp_path, accumulate_grad_batches=2)
    assert module.balancer.num_steps.item() == 8
    undivided = make_problem()
    reference = make(undivided.encoder.parameters())
    optimizer = torch.optim.SGD(undivided.parameters(), lr=0.05)
    for _ in range(2):
        for index, batch in enumerate(loader(undivided)):
            losses = Automatic(undivided, reference).losses(batch)
            reference.backward(losses, grad_scale=0.5)
            if index % 2 == 1:
                optimizer.step()
                optimizer.zero_grad()
    assert torch.equal(module.balancer.task_weights, reference.task_weights)
    assert_equal_bits(problem.parameters(), undivided.parameters())


def test_bfloat16_autocast_and_gradient_clipping_work(tmp_path):
    problem = make_problem()
    module = Automatic(problem, METHODS["ExcessMTL"](problem.encoder.parameters()))
    fit(module, problem, tmp_path, precision="bf16-mixed", gradient_clip_val=0.1)
    assert module.balancer.num_steps.item() == 8
    assert module.balancer.task_weights.std() > 0
    assert all(parameter.isfinite().all() for parameter in problem.parameters())


def test_a_checkpoint_resumes_bit_for_bit(tmp_path):
    whole = make_problem()
    uninterrupted = Automatic(whole, METHODS["ExcessMTL"](whole.encoder.parameters()))
    fit(uninterrupted, whole, tmp_path)

    half = make_problem()
    first = Automatic(half, METHODS["ExcessMTL"](half.encoder.parameters()))
    fit(first, half, tmp_path, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")

    problem = make_problem(seed=3)
    problem.inputs, problem.targets = whole.inputs, whole.targets
    resumed = Automatic(problem, METHODS["ExcessMTL"](problem.encoder.parameters()))
    fit(resumed, problem, tmp_path, ckpt_path=str(tmp_path / "half.ckpt"))
    assert resumed.balancer.num_steps.item() == 8
    assert torch.equal(resumed.balancer.task_weights, uninterrupted.balancer.task_weights)
    assert_equal_bits(problem.parameters(), whole.parameters())


@pytest.mark.parametrize("kind", [Automatic, Manual], ids=lambda k: k.__name__)
def test_the_callback_logs_the_weights_of_every_step_that_is_due(kind, tmp_path):
    problem = make_problem()
    module = kind(problem, METHODS["ExcessMTL"](problem.encoder.parameters()))
    logger = CSVLogger(tmp_path)
    fit(
        module,
        problem,
        tmp_path,
        logger=logger,
        callbacks=[TaskWeightLogger(["a", "b", "c"])],
        log_every_n_steps=2,
    )
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7]
    last = [float(rows[-1][f"task_weight/{name}"]) for name in "abc"]
    assert last == pytest.approx(module.balancer.task_weights.tolist(), rel=1e-6)
    assert last != pytest.approx([float(rows[0][f"task_weight/{name}"]) for name in "abc"])
    assert 1 <= float(rows[-1]["effective_num_tasks"]) <= 3


def test_accumulated_batches_are_logged_once_per_optimizer_step(tmp_path):
    problem = make_problem()
    module = Automatic(problem, METHODS["ExcessMTL"](problem.encoder.parameters()))
    logger = CSVLogger(tmp_path)
    options = {"accumulate_grad_batches": 2, "callbacks": [TaskWeightLogger()]}
    fit(module, problem, tmp_path, logger=logger, **options)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [0, 1, 2, 3]


def test_a_skipped_step_can_be_kept_from_the_optimizer(tmp_path):
    """The hook that the migration page shows."""

    class Guarded(Automatic):
        def training_step(self, batch, batch_idx):
            losses = self.losses(batch)
            return self.balancer([*losses[:2], losses[2] * (float("nan") if batch_idx == 2 else 1)])

        def on_before_optimizer_step(self, optimizer):
            if self.balancer.found_nonfinite.any():
                optimizer.zero_grad()

    problem = make_problem()
    module = Guarded(problem, METHODS["ExcessMTL"](problem.encoder.parameters()))
    fit(module, problem, tmp_path)
    assert module.balancer.num_skipped_steps.item() == 2
    assert module.balancer.num_steps.item() == 6
    assert all(parameter.isfinite().all() for parameter in problem.parameters())


def test_a_module_without_a_balancer_is_refused_before_training(tmp_path):
    problem = make_problem()
    module = Automatic(problem, Uniform(problem.encoder.parameters(), num_tasks=3))
    del module.balancer
    with pytest.raises(ValueError, match="Expected one balancer among the submodules of Automatic"):
        fit(module, problem, tmp_path, callbacks=[TaskWeightLogger()])


def test_names_that_do_not_fit_are_refused_before_training(tmp_path):
    problem = make_problem()
    module = Automatic(problem, Uniform(problem.encoder.parameters(), num_tasks=3))
    with pytest.raises(ValueError, match="3 different names"):
        fit(module, problem, tmp_path, callbacks=[TaskWeightLogger(["a"])])
    assert module.balancer.num_steps.item() == 0
