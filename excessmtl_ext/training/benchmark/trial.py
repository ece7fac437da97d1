"""One trial of the benchmark: a data set, a dose, a method with a setting, a seed; trained and measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from excessmtl_ext import Balancer
from excessmtl_ext.data import MultiTaskData, Split, Task
from excessmtl_ext.data.seeding import seeded_generator
from excessmtl_ext.models import EncoderHeads
from excessmtl_ext.training.benchmark.datasets import Dataset
from excessmtl_ext.training.benchmark.methods import Method
from excessmtl_ext.training.run.loop import HELD_OUT_SHARE
from excessmtl_ext.training.run.metrics import PRIMARY_METRIC, evaluate, task_losses


@dataclass(frozen=True)
class Trial:
    """What is trained.

    Attributes:
        dataset: Key of the data set.
        dose: Name of the dose.
        method: Key of the method.
        setting: Number of the method's setting.
        seed: Decides splits, noise, initial parameters and batch order.
        is_quick: With fewer samples and epochs.
    """

    dataset: str
    dose: str
    method: str
    setting: int
    seed: int
    is_quick: bool = False

    @property
    def name(self) -> str:
        """Names its file."""
        dose = self.dose.replace(" ", "-").replace("%", "")
        return f"{self.dataset}/{dose}/{self.method}_{self.setting}_seed{self.seed}"

    def __str__(self) -> str:
        """Returns its name for people."""
        return (
            f"{self.dataset} ({self.dose}), {self.method}, setting {self.setting}, seed {self.seed}"
        )


def run_trial(
    trial: Trial,
    dataset: Dataset,
    method: Method,
    *,
    data_root: str | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains a network and measures it after every epoch.

    Args:
        trial: What to train.
        dataset: Of the trial.
        method: Of the trial.
        data_root: Folder of the data, for data sets that need one.
        should_stop: Asked before every step.

    Returns:
        ``trial``; ``tasks`` with name, kind and whether labels are noisy; ``epochs``, a list with the ``scores`` of
        `evaluate` on ``test``, ``validation`` (clean labels) and ``observed`` (validation labels as good as those of
        the training), the primary ``metrics`` on ``test`` and the ``weights``, each by task; ``step_ms``, the
        median time of a step, and ``cpu_ms``, its time on the processor, of all runs where each task has one;
        ``num_steps``; ``skipped_steps``.

    Raises:
        InterruptedError: ``should_stop`` returned True.
        FloatingPointError: no step of an epoch had finite losses.
    """
    samples, epochs = dataset.quick if trial.is_quick else (dataset.num_train, dataset.epochs)
    options: dict[str, Any] = {"seed": trial.seed, "num_train": samples}
    if dataset.needs_data_root:
        options["data_root"] = data_root
    data = _load(dataset, trial.dose, options)
    setting = dict(method.settings[trial.setting])
    runs: list[_Run] = []
    rows: list[list[dict[str, Any]]] = []
    for task in range(len(data.tasks)) if method.is_single_task else (None,):
        torch.manual_seed(trial.seed)
        model = dataset.build_model(data)
        balancer = method.make(
            model.encoder.parameters(),
            len(data.tasks),
            setting if task is None else {**setting, "task": task},
            -(-len(data.train) // dataset.batch_size),
        )
        runs.append(_Run(dataset, data, model, balancer, trial.seed, should_stop))
        rows.append([runs[-1].epoch(number) for number in range(epochs)])
    names = [task.name for task in data.tasks]
    return {
        "trial": asdict(trial),
        "tasks": [
            {"name": task.name, "kind": task.kind, "is_noisy": task.is_noisy} for task in data.tasks
        ],
        "noise_shares": data.noise_shares,
        "setting": setting,
        "epochs": _joined(rows, names) if method.is_single_task else rows[0],
        "step_ms": 1e3 * sum(median(run.wall) for run in runs),
        "cpu_ms": 1e3 * sum(sum(run.cpu) / len(run.cpu) for run in runs),
        "num_steps": len(runs[0].wall),
        "skipped_steps": sum(run.num_skipped for run in runs),
        "num_train": len(data.train),
    }


def _joined(rows: Sequence[list[dict[str, Any]]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Takes each task's values from the run that has trained it alone."""

    def of_tasks(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {name: own[name] for name, own in zip(names, values, strict=True)}

    return [
        {
            "scores": {
                split: of_tasks([row["scores"][split] for row in of_epoch])
                for split in of_epoch[0]["scores"]
            },
            "metrics": of_tasks([row["metrics"] for row in of_epoch]),
            "weights": of_tasks([row["weights"] for row in of_epoch]),
        }
        for of_epoch in zip(*rows, strict=True)
    ]


def _load(dataset: Dataset, dose: str, options: Mapping[str, Any]) -> MultiTaskData:
    """Makes the data; a small data set has fewer samples than the quick run asks for."""
    try:
        return dataset.load(**dataset.doses[dose], **options)
    except ValueError as error:
        if "`num_train`" not in str(error):
            raise
        return dataset.load(**dataset.doses[dose], **{**options, "num_train": None})


class _Run:
    """The network, the optimizer and the batches of a trial."""

    def __init__(
        self,
        dataset: Dataset,
        data: MultiTaskData,
        model: EncoderHeads,
        balancer: Balancer,
        seed: int,
        should_stop: Callable[[], bool],
    ) -> None:
        self.data, self.model, self.balancer, self.seed = data, model, balancer, seed
        self.tasks: Sequence[Task] = data.tasks
        self.batch_size = dataset.batch_size
        self.should_stop = should_stop
        self.optimizer = dataset.make_optimizer(
            model.parameters(), lr=dataset.lr, weight_decay=dataset.weight_decay
        )
        self.indices = torch.arange(len(data.train))
        self.held_out: Tensor | None = None
        if "validation_losses" in balancer.requires:
            # Taken from the training data with the labels that everybody has.
            order = torch.randperm(len(self.indices), generator=seeded_generator(seed, "held_out"))
            count = max(1, int(HELD_OUT_SHARE * len(order)))
            self.held_out, self.indices = order[:count], order[count:]
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.num_skipped = 0

    def epoch(self, number: int) -> dict[str, Any]:
        """Trains for an epoch and measures."""
        generator = seeded_generator(self.seed, "batch_order", number)
        order = self.indices[torch.randperm(len(self.indices), generator=generator)]
        sums = torch.zeros(len(self.tasks), dtype=torch.float64)
        num_finite = 0
        for step, batch in enumerate(order.split(self.batch_size)):
            if self.should_stop():
                raise InterruptedError("asked to stop")
            begin, cpu_begin = time.perf_counter(), time.process_time()
            losses = self._step(batch, step)
            self.wall.append(time.perf_counter() - begin)
            self.cpu.append(time.process_time() - cpu_begin)
            if bool(losses.isfinite().all()):
                sums += losses
                num_finite += 1
        if num_finite == 0:
            raise FloatingPointError(
                f"Expected finite losses, but no step of epoch {number + 1} had any."
            )
        self.balancer.end_epoch(sums / num_finite)
        return self._measure()

    def _step(self, indices: Tensor, step: int) -> Tensor:
        """Takes a training step; returns the losses [T]."""
        batch = self.data.train.batch(indices)
        features = self.model.features(batch.inputs)
        losses = task_losses(self.model.outputs(features), batch.targets, self.tasks)
        if self.held_out is not None:
            begin = (step * self.batch_size) % len(self.held_out)
            validation = self.data.train.batch(self.held_out[begin : begin + self.batch_size])
            outputs = self.model(validation.inputs)
            observe: Any = self.balancer.observe_validation
            observe(task_losses(outputs, validation.targets, self.tasks))
        self.optimizer.zero_grad()
        self.balancer.backward(losses, features=features if self.balancer.needs_features else None)
        values = torch.stack([_value(loss) for loss in losses])
        if bool(self.balancer.found_nonfinite.any()) or not bool(values.isfinite().all()):
            self.num_skipped += 1
            return values
        self.optimizer.step()
        if hasattr(self.balancer, "after_step"):
            with torch.no_grad():
                again = task_losses(self.model(batch.inputs), batch.targets, self.tasks)
            self.balancer.after_step(torch.stack([_value(loss) for loss in again]))  # pyright: ignore[reportCallIssue]
        return values

    def _measure(self) -> dict[str, Any]:
        splits: dict[str, Split] = {"test": self.data.test, "validation": self.data.validation}
        splits["observed"] = self.data.observed_validation or self.data.validation
        scores: dict[str, dict[str, float]] = {}
        metrics: dict[str, float] = {}
        for name, split in splits.items():
            found = evaluate(self.model, split, self.tasks)
            scores[name] = {task.name: found[f"{task.name}_score"] for task in self.tasks}
            if name == "test":
                metrics = {
                    task.name: found[f"{task.name}_{PRIMARY_METRIC[task.kind]}"]
                    for task in self.tasks
                }
        weights = self.balancer.task_weights.tolist()
        names = [task.name for task in self.tasks]
        return {
            "scores": scores,
            "metrics": metrics,
            "weights": dict(zip(names, weights, strict=True)),
        }


def _value(loss: Tensor | None) -> Tensor:
    return torch.zeros((), dtype=torch.float64) if loss is None else loss.detach().double()
