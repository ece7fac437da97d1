"""One training run. The balancer is the only thing that varies between methods."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from excessmtl_ext import Balancer
from excessmtl_ext.data import Batch, MultiTaskData, Split, Task
from excessmtl_ext.data.seeding import seeded_generator
from excessmtl_ext.models import EncoderHeads
from excessmtl_ext.training.config import TrainConfig
from excessmtl_ext.training.methods import METHODS, make_balancer
from excessmtl_ext.training.metrics import evaluate, task_losses
from excessmtl_ext.training.run_record import METRICS, TASK_WEIGHTS, TIMES, RunRecord
from excessmtl_ext.training.workloads import find_workload

SELECTION_METRIC = "validation/mean_score"

# Share of the training data that a method with validation losses (MOML) takes out of the training, with clean labels:
# He et al. 2024, Fig. 5.
HELD_OUT_SHARE = 0.2


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: Steps done.
        num_steps: Steps in all.
        epoch: Epochs done.
        latest: The last row of metrics.csv; empty before the first evaluation.
    """

    step: int
    num_steps: int
    epoch: int
    latest: dict[str, float]


class TrainingInterrupted(Exception):
    """A run stopped because it was asked to. Its checkpoint is saved; resuming gives the undisturbed numbers."""


def train(
    config: TrainConfig,
    output: str | Path,
    *,
    resume: bool = False,
    report: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Trains one model and leaves the run's files in ``output``.

    Every random choice is drawn from a stream of its own seed, and a checkpoint holds the state of the model, of the
    optimizer, of the balancer and of torch's generators, the position within the epoch and the epoch's running sums.
    A resumed run therefore writes the very bytes that an undisturbed one does, on the same machine.

    Args:
        config: What to run.
        output: Folder for the run's files, see `RunRecord`.
        resume: Go on with the run in ``output``.
        report: Called before the first step and after each.
        should_stop: Asked before each step; True saves a checkpoint and ends the run.

    Returns:
        The content of metrics.json: the metrics of the epoch that did best on validation, and of the last.

    Raises:
        TrainingInterrupted: ``should_stop`` returned True.
        FloatingPointError: no step of an epoch had finite gradients.
        FileExistsError: ``output`` holds a run and ``resume`` is False.
        ValueError: the config is not that of the run in ``output``, or a value in it is out of range.
        FileNotFoundError: the data are missing.
    """
    device = _find_device(config.device)
    data = find_workload(config.dataset).load(config)
    cuda_devices = [device] if device.type == "cuda" else []
    # The caller's generators and cuDNN settings are not ours to change.
    with (
        torch.random.fork_rng(devices=cuda_devices),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        run = _Run(config, data, device, Path(output), resume=resume)
        return run.train(report or (lambda progress: None), should_stop or (lambda: False))


class _Run:
    """The state of a run between two steps, and the loop over it."""

    def __init__(
        self,
        config: TrainConfig,
        data: MultiTaskData,
        device: torch.device,
        output: Path,
        *,
        resume: bool,
    ) -> None:
        torch.manual_seed(config.seed)
        self.device = device
        self.tasks: tuple[Task, ...] = data.tasks
        # Worker processes read from the CPU's copy; their batches are moved.
        self.train_split = data.train if config.num_workers else data.train.to(device)
        self.validation_split = data.validation.to(device)
        self.test_split = data.test.to(device)
        # Initialised on the CPU: the same parameters on every device.
        workload = find_workload(config.dataset)
        self.model: EncoderHeads = workload.build_model(data, config).to(device)
        self.balancer: Balancer = make_balancer(
            config.method,
            self.model.encoder.parameters(),
            num_tasks=len(self.tasks),
            robust_step_size=config.robust_step_size,
            task=config.task,
            task_names=[task.name for task in self.tasks],
            options=config.method_options,
        ).to(device)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        self.config = dataclasses.replace(
            config,
            num_train=len(self.train_split),
            robust_step_size=getattr(self.balancer, "robust_step_size", None),
        )
        # A task trained alone is selected by its own score: the others' heads are never trained.
        self.selection_metric = (
            f"validation/{config.task}_score"
            if METHODS[config.method].requires_task
            else SELECTION_METRIC
        )
        self.train_indices = torch.arange(len(self.train_split))
        self.held_out: _HeldOut | None = None
        if "validation_losses" in self.balancer.requires:
            order = torch.randperm(
                len(self.train_split), generator=seeded_generator(config.seed, "held_out")
            )
            num_held_out = max(1, int(HELD_OUT_SHARE * len(order)))
            self.train_indices = order[num_held_out:].sort().values
            self.held_out = _HeldOut(data.clean_train.to(device), order[:num_held_out], config)
        self.steps_per_epoch = -(-len(self.train_indices) // config.batch_size)
        self.num_steps = config.epochs * self.steps_per_epoch

        self.step = 0
        self.best_score = -float("inf")
        # Sums over the epoch, one row each: losses times samples, samples, weights, risks, relative risks.
        self.epoch_sums = torch.zeros(5, len(self.tasks), dtype=torch.float64, device=device)
        self.num_finite_steps = 0
        self.num_skipped_steps = 0
        self.weight_rows: list[tuple[int, Tensor]] = []
        self.seconds = 0.0

        self.record = RunRecord(
            output,
            {**dataclasses.asdict(self.config), "balancer": repr(self.balancer)},
            resume=resume,
        )
        if self.record.checkpoint is not None:
            self._restore(self.record.checkpoint)
        self.latest = self.record.read_metrics()[-1] if self.step >= self.steps_per_epoch else {}

    def train(
        self, report: Callable[[Progress], None], should_stop: Callable[[], bool]
    ) -> dict[str, Any]:
        """Runs from the present step to the last, and writes what is to be reported."""
        report(self._progress())
        while self.step < self.num_steps:
            epoch, first_step = divmod(self.step, self.steps_per_epoch)
            batches = self._batches(epoch, first_step)
            started = time.perf_counter()
            for batch in batches:
                if should_stop():
                    self.seconds += time.perf_counter() - started
                    self._save()
                    raise TrainingInterrupted(
                        f"Stopped after step {self.step} of {self.num_steps}."
                    )
                self._train_step(batch)
                report(self._progress())
            self.seconds += time.perf_counter() - started
            self._end_epoch(epoch + 1)
            report(self._progress())
        return self._finish()

    def _batches(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """Yields the batches of an epoch from ``first_step`` on, the same for any number of workers."""
        order = torch.randperm(
            len(self.train_indices),
            generator=seeded_generator(self.config.seed, "batch_order", epoch),
        )
        indices = self.train_indices[order].split(self.config.batch_size)[first_step:]
        if not self.config.num_workers:
            yield from (self.train_split.batch(batch, epoch=epoch) for batch in indices)
            return
        loader = DataLoader(
            _BatchesOfSplit(self.train_split, indices, epoch),
            batch_size=None,
            num_workers=self.config.num_workers,
        )
        yield from (batch.to(self.device) for batch in loader)

    def _train_step(self, batch: Batch) -> None:
        losses = task_losses(self.model(batch.inputs), batch.targets, self.tasks)
        if self.held_out is not None:
            clean = self.held_out.batch(self.step)
            clean_losses = task_losses(self.model(clean.inputs), clean.targets, self.tasks)
            self.balancer.observe_validation(clean_losses)  # type: ignore[operator]
        self.optimizer.zero_grad()
        self.balancer.backward(losses)
        self.step += 1
        # Adam would carry a NaN in its running means for ever. No method looks at the gradients of the heads, and
        # some look at no gradient: the largest element tells, which no sum of squares can overflow.
        zero = torch.zeros((), device=self.device)
        values = torch.stack([zero if loss is None else loss.detach() for loss in losses])
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        largest = torch.nn.utils.get_total_norm(grads, norm_type=float("inf"))
        is_finite = values.isfinite().all() & largest.isfinite()
        if bool(self.balancer.found_nonfinite.any() | ~is_finite):
            self.num_skipped_steps += 1
        else:
            self.optimizer.step()
            self._add_to_epoch(values, losses, batch.targets)
        if self.step % self.config.task_weight_interval == 0:
            self.weight_rows.append((self.step, self.balancer.task_weights.clone()))

    def _add_to_epoch(
        self,
        values: Tensor,
        losses: Sequence[Tensor | None],
        targets: Sequence[Tensor | None],
    ) -> None:
        counts = [
            0 if loss is None or target is None else len(target)
            for loss, target in zip(losses, targets, strict=True)
        ]
        num_samples = torch.tensor(counts, dtype=torch.float64, device=self.device)
        rows = [values * num_samples, num_samples, self.balancer.task_weights]
        rows += [getattr(self.balancer, name) for name in self._risk_names()]
        for total, row in zip(self.epoch_sums, rows, strict=False):
            total += row
        self.num_finite_steps += 1

    def _risk_names(self) -> list[str]:
        """The risks that the balancer estimates, none for most methods."""
        names = ("excess_risk", "relative_excess_risk")
        return [name for name in names if hasattr(self.balancer, name)]

    def _end_epoch(self, epoch: int) -> None:
        """Evaluates, writes the epoch's rows, keeps the model if it is the best, and saves a checkpoint."""
        if self.num_finite_steps == 0:
            raise FloatingPointError(
                f"Expected finite gradients, but no step of epoch {epoch} had any: the run has diverged. "
                "Start it again with a smaller --lr."
            )
        loss_sums, num_samples, weight_sums, *risk_sums = self.epoch_sums.tolist()
        row: dict[str, float] = {"epoch": epoch, "step": self.step}
        for task, total, number in zip(self.tasks, loss_sums, num_samples, strict=True):
            row[f"train/{task.name}_loss"] = total / number if number else float("nan")
        row["train/skipped_steps"] = self.num_skipped_steps
        for name, split in (("validation", self.validation_split), ("test", self.test_split)):
            for metric, value in evaluate(self.model, split, self.tasks).items():
                row[f"{name}/{metric}"] = value
        weights = self.balancer.task_weights.tolist()
        for index, task in enumerate(self.tasks):
            row[f"balancer/{task.name}_weight"] = weights[index]
            row[f"balancer/{task.name}_mean_weight"] = weight_sums[index] / self.num_finite_steps
            for risk, sums in zip(self._risk_names(), risk_sums, strict=False):
                row[f"balancer/{task.name}_{risk}"] = sums[index] / self.num_finite_steps
        self.record.append(METRICS, list(row), [list(row.values())])
        self.record.append(TIMES, ["epoch", "train_seconds"], [[epoch, self.seconds]])
        self._write_weight_rows()
        self.epoch_sums.zero_()
        self.num_finite_steps = self.num_skipped_steps = 0
        self.seconds = 0.0
        self.latest = row
        if row[self.selection_metric] > self.best_score:
            self.best_score = row[self.selection_metric]
            self.record.save_best_model({"epoch": epoch, "model": self.model.state_dict()})
        self._save()

    def _write_weight_rows(self) -> None:
        columns = ["step", *(task.name for task in self.tasks)]
        rows = [[step, *weights.tolist()] for step, weights in self.weight_rows]
        self.record.append(TASK_WEIGHTS, columns, rows)
        self.weight_rows.clear()

    def _finish(self) -> dict[str, Any]:
        rows = self.record.read_metrics()
        # The first of equals: the cheapest model.
        selected = max(rows, key=lambda row: (row[self.selection_metric], -row["epoch"]))
        weights = self.balancer.task_weights.tolist()
        metrics = {
            "selection": self.selection_metric,
            "tasks": [
                {"name": task.name, "kind": task.kind, "is_noisy": task.is_noisy}
                for task in self.tasks
            ],
            "selected": selected,
            "final": rows[-1],
            "final_task_weights": {
                task.name: weight for task, weight in zip(self.tasks, weights, strict=True)
            },
            "noisy_tasks": [task.name for task in self.tasks if task.is_noisy],
            "num_skipped_steps": int(sum(row["train/skipped_steps"] for row in rows)),
        }
        self.record.write_final_metrics(metrics)
        return metrics

    def _progress(self) -> Progress:
        epoch = self.step // self.steps_per_epoch
        return Progress(self.step, self.num_steps, epoch, self.latest)

    def _save(self) -> None:
        cuda_state = None
        if self.device.type == "cuda":
            cuda_state = torch.cuda.get_rng_state(self.device)
        self.record.save_checkpoint(
            {
                "step": self.step,
                "best_score": self.best_score,
                "epoch_sums": self.epoch_sums,
                "num_finite_steps": self.num_finite_steps,
                "num_skipped_steps": self.num_skipped_steps,
                "weight_rows": [list(row) for row in self.weight_rows],
                "seconds": self.seconds,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "balancer": self.balancer.state_dict(),
                "cpu_generator": torch.get_rng_state(),
                "cuda_generator": cuda_state,
            }
        )

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        self.step = checkpoint["step"]
        if self.step > self.num_steps:
            done = -(-self.step // self.steps_per_epoch)
            raise ValueError(
                f"Expected `epochs` of at least {done}, which the run in {self.record.folder} has begun, "
                f"but got {self.config.epochs}."
            )
        self.best_score = checkpoint["best_score"]
        self.epoch_sums.copy_(checkpoint["epoch_sums"])
        self.num_finite_steps = checkpoint["num_finite_steps"]
        self.num_skipped_steps = checkpoint["num_skipped_steps"]
        self.weight_rows = [(step, weights) for step, weights in checkpoint["weight_rows"]]
        self.seconds = checkpoint["seconds"]
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.balancer.load_state_dict(checkpoint["balancer"])
        torch.set_rng_state(checkpoint["cpu_generator"])
        if checkpoint["cuda_generator"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_generator"], self.device)


class _BatchesOfSplit(Dataset[Batch]):
    """The batches of one epoch as worker processes read them."""

    def __init__(self, split: Split, indices: Sequence[Tensor], epoch: int) -> None:
        self.split, self.indices, self.epoch = split, indices, epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Batch:
        return self.split.batch(self.indices[index], epoch=self.epoch)


class _HeldOut:
    """Clean batches that a method sees and the optimizer does not, one per step, in a seeded order per pass."""

    def __init__(self, clean_train: Split, indices: Tensor, config: TrainConfig) -> None:
        self.clean_train, self.indices, self.seed = clean_train, indices, config.seed
        self.batch_size = min(config.batch_size, len(indices))

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step, so that a resumed run sees the same."""
        steps_per_pass = len(self.indices) // self.batch_size
        number, position = divmod(step, steps_per_pass)
        order = torch.randperm(
            len(self.indices), generator=seeded_generator(self.seed, "held_out_order", number)
        )
        start = position * self.batch_size
        return self.clean_train.batch(self.indices[order[start : start + self.batch_size]])


def _find_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"Expected `device` such as cpu, cuda or cuda:1, but got {name!r}."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"Expected `device` to be one of this machine, but got {name!r} and torch {torch.__version__} "
            "finds no CUDA device. Pass --device cpu."
        )
    return device
