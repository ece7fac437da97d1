"""One training run. The balancer is the only thing that varies between methods."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from excessmtl_ext import Balancer
from excessmtl_ext.data import MultiTaskData, Task
from excessmtl_ext.data.seeding import seeded_generator
from excessmtl_ext.models import EncoderHeads
from excessmtl_ext.training.config import TrainConfig
from excessmtl_ext.training.methods import make_balancer
from excessmtl_ext.training.metrics import evaluate, task_losses
from excessmtl_ext.training.run_record import METRICS, TASK_WEIGHTS, TIMES, RunRecord
from excessmtl_ext.training.workloads import find_workload

SELECTION_METRIC = "validation/mean_accuracy"


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
        self.tasks: tuple[Task, ...] = data.tasks
        self.train_split = data.train.to(device)
        self.validation_split = data.validation.to(device)
        self.test_split = data.test.to(device)
        # Initialised on the CPU: the same parameters on every device.
        self.model: EncoderHeads = find_workload(config.dataset).build_model(data).to(device)
        self.balancer: Balancer = make_balancer(
            config.method,
            self.model.encoder.parameters(),
            num_tasks=len(self.tasks),
            robust_step_size=config.robust_step_size,
        ).to(device)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        self.config = dataclasses.replace(
            config,
            num_train=len(self.train_split),
            robust_step_size=getattr(self.balancer, "robust_step_size", None),
        )
        self.steps_per_epoch = -(-len(self.train_split) // config.batch_size)
        self.num_steps = config.epochs * self.steps_per_epoch

        self.step = 0
        self.best_accuracy = -1.0
        self.loss_sums = torch.zeros(len(self.tasks), dtype=torch.float64, device=device)
        self.num_samples = 0
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
            order = torch.randperm(
                len(self.train_split),
                generator=seeded_generator(self.config.seed, "batch_order", epoch),
            )
            batches = order.split(self.config.batch_size)
            started = time.perf_counter()
            for indices in batches[first_step:]:
                if should_stop():
                    self.seconds += time.perf_counter() - started
                    self._save()
                    raise TrainingInterrupted(
                        f"Stopped after step {self.step} of {self.num_steps}."
                    )
                self._train_step(indices)
                report(self._progress())
            self.seconds += time.perf_counter() - started
            self._end_epoch(epoch + 1)
            report(self._progress())
        return self._finish()

    def _train_step(self, indices: Tensor) -> None:
        inputs, targets = self.train_split.batch(indices)
        losses = task_losses(self.model(inputs), targets)
        self.optimizer.zero_grad()
        self.balancer.backward(losses)
        self.step += 1
        # Adam would carry a NaN in its running means for ever.
        if bool(self.balancer.found_nonfinite.any()):
            self.num_skipped_steps += 1
        else:
            self.optimizer.step()
            self.loss_sums += torch.stack(losses).detach() * len(indices)
            self.num_samples += len(indices)
        if self.step % self.config.task_weight_interval == 0:
            self.weight_rows.append((self.step, self.balancer.task_weights.clone()))

    def _end_epoch(self, epoch: int) -> None:
        """Evaluates, writes the epoch's rows, keeps the model if it is the best, and saves a checkpoint."""
        if self.num_samples == 0:
            raise FloatingPointError(
                f"Expected finite gradients, but no step of epoch {epoch} had any: the run has diverged. "
                "Start it again with a smaller --lr."
            )
        train_losses = (self.loss_sums / self.num_samples).tolist()
        row: dict[str, float] = {"epoch": epoch, "step": self.step}
        for task, loss in zip(self.tasks, train_losses, strict=True):
            row[f"train/{task.name}_loss"] = loss
        row["train/skipped_steps"] = self.num_skipped_steps
        for name, split in (("validation", self.validation_split), ("test", self.test_split)):
            for metric, value in evaluate(self.model, split, self.tasks).items():
                row[f"{name}/{metric}"] = value
        self.record.append(METRICS, list(row), [list(row.values())])
        self.record.append(TIMES, ["epoch", "train_seconds"], [[epoch, self.seconds]])
        self._write_weight_rows()
        self.loss_sums.zero_()
        self.num_samples = self.num_skipped_steps = 0
        self.seconds = 0.0
        self.latest = row
        if row[SELECTION_METRIC] > self.best_accuracy:
            self.best_accuracy = row[SELECTION_METRIC]
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
        selected = max(rows, key=lambda row: (row[SELECTION_METRIC], -row["epoch"]))
        weights = self.balancer.task_weights.tolist()
        metrics = {
            "selection": SELECTION_METRIC,
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
        if self.loss_sums.is_cuda:
            cuda_state = torch.cuda.get_rng_state(self.loss_sums.device)
        self.record.save_checkpoint(
            {
                "step": self.step,
                "best_accuracy": self.best_accuracy,
                "loss_sums": self.loss_sums,
                "num_samples": self.num_samples,
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
        self.best_accuracy = checkpoint["best_accuracy"]
        self.loss_sums.copy_(checkpoint["loss_sums"])
        self.num_samples = checkpoint["num_samples"]
        self.num_skipped_steps = checkpoint["num_skipped_steps"]
        self.weight_rows = [(step, weights) for step, weights in checkpoint["weight_rows"]]
        self.seconds = checkpoint["seconds"]
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.balancer.load_state_dict(checkpoint["balancer"])
        torch.set_rng_state(checkpoint["cpu_generator"])
        if checkpoint["cuda_generator"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_generator"], self.loss_sums.device)


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
