"""One training run. The balancer is the only thing that varies between methods."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from excessmtl_ext import Balancer
from excessmtl_ext.data import MultiTaskData, Task
from excessmtl_ext.data.seeding import seeded_generator
from excessmtl_ext.distributed.dtensors import local_part
from excessmtl_ext.models import EncoderHeads
from excessmtl_ext.training.run.batches import BatchesOfSplit, HeldOutBatches, Part
from excessmtl_ext.training.run.config import TrainConfig
from excessmtl_ext.training.run.device import find_device, local_device
from excessmtl_ext.training.run.files import check_disk_space, finite_or_none
from excessmtl_ext.training.run.lock import hold_folder
from excessmtl_ext.training.run.methods import METHODS, check_spans_ranks, make_balancer
from excessmtl_ext.training.run.metrics import evaluate, label_counts, task_losses
from excessmtl_ext.training.run.parallel_model import ParallelModel
from excessmtl_ext.training.run.progress import SELECTION_METRIC, Progress, TrainingInterrupted
from excessmtl_ext.training.run.ranks import RunRanks, joined_ranks
from excessmtl_ext.training.run.record import (
    METRICS,
    TASK_WEIGHTS,
    TIMES,
    RunRecord,
    best_epoch,
    check_folder,
)
from excessmtl_ext.training.run.run_state import RunState
from excessmtl_ext.training.run.workloads import find_workload

# Share of the training data that a method with validation losses (MOML) takes out of the training, with clean labels:
# He et al. 2024, Fig. 5.
HELD_OUT_SHARE = 0.2


def train(
    config: TrainConfig,
    output: str | Path,
    *,
    resume: bool = False,
    report: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    observe: Callable[[Balancer, Sequence[str]], None] | None = None,
) -> dict[str, Any]:
    """Trains one model and leaves the run's files in ``output``.

    Every random choice is drawn from a stream of its own seed, and a checkpoint holds the state of the model, of the
    optimizer, of the balancer and of torch's generators, the position within the epoch and the epoch's running sums.
    A resumed run therefore writes the very bytes that an undisturbed one does, on the same machine.

    With ``config.distributed`` every process that torchrun has started calls this. Each batch is cut into as many
    parts, so that the numbers are those of one process up to rounding; each process evaluates its share of the
    batches; rank 0 writes the files. All return the same.

    Args:
        config: What to run.
        output: Folder for the run's files, see `RunRecord`.
        resume: Go on with the run in ``output``.
        report: Called before the first step and after each.
        should_stop: Asked before each step; True saves a checkpoint and ends the run.
        observe: Called with the balancer and the names of the tasks before the first step, to record its history.

    Returns:
        The content of metrics.json: the metrics of the epoch that did best on validation, and of the last; None
        stands for a number that is not finite.

    Raises:
        TrainingInterrupted: ``should_stop`` returned True.
        FloatingPointError: no step of an epoch had finite gradients, or no epoch a finite score on validation.
        FileExistsError: ``output`` holds a run and ``resume`` is False, or files that no run has written.
        BlockingIOError: another process trains in ``output``.
        OSError: ``output`` cannot be written to, or has no room for the run's files. No step is taken then.
        ValueError: the config is not that of the run in ``output``, its files are damaged, or a value is out of range.
        FileNotFoundError: the data are missing.
        OtherRankFailed: another process of the run has failed.
    """
    device = find_device(config.device)
    if config.distributed is not None:
        check_spans_ranks(config.method)
        device = local_device(device)
    cuda_devices = [device] if device.type == "cuda" else []
    # The caller's generators and cuDNN settings are not ours to change.
    with (
        joined_ranks(config.distributed, device) as ranks,
        torch.random.fork_rng(devices=cuda_devices),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
        ExitStack() as held,
    ):
        with ranks.sharing_errors():
            data = find_workload(config.dataset).load(config)

        def run_all() -> dict[str, Any]:
            # A function of its own: the run is gone when the ranks part.
            run = _Run(config, data, device, ranks)
            # Before the lock, which is the first file to be written, and again when nobody else can write.
            ranks.first(lambda: check_folder(Path(output), resume=resume))
            ranks.first(
                lambda: held.enter_context(hold_folder(Path(output), "run", is_required=False))
            )
            run.open(Path(output), resume=resume)
            if observe is not None:
                observe(run.balancer, [task.name for task in run.tasks])
            return run.train(report or (lambda progress: None), should_stop or (lambda: False))

        return run_all()


class _Run:
    """The state of a run between two steps, and the loop over it."""

    record: RunRecord  # of rank 0
    folder: Path

    def __init__(
        self, config: TrainConfig, data: MultiTaskData, device: torch.device, ranks: RunRanks
    ) -> None:
        torch.manual_seed(config.seed)
        self.device = device
        self.ranks = ranks
        self.tasks: tuple[Task, ...] = data.tasks
        # Worker processes read from the CPU's copy; their batches are moved.
        self.train_split = data.train if config.num_workers else data.train.to(device)
        self.validation_split = data.validation.to(device)
        self.test_split = data.test.to(device)
        # Initialised on the CPU: the same parameters on every device.
        workload = find_workload(config.dataset)
        self.model: EncoderHeads = workload.build_model(data, config).to(device)
        self.parallel = ParallelModel(self.model, config.distributed, ranks)
        self.balancer: Balancer = make_balancer(
            config.method,
            self.model.encoder.parameters(),
            num_tasks=len(self.tasks),
            robust_step_size=config.robust_step_size,
            task=config.task,
            task_names=[task.name for task in self.tasks],
            options={**config.method_options, **self.parallel.balancer_options},
        ).to(device)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        self.config = dataclasses.replace(
            config,
            num_train=len(self.train_split),
            num_ranks=None if config.distributed is None else ranks.size,
            robust_step_size=getattr(self.balancer, "robust_step_size", None),
        )
        # A task trained alone is selected by its own score: the others' heads are never trained.
        self.selection_metric = (
            f"validation/{config.task}_score"
            if METHODS[config.method].requires_task
            else SELECTION_METRIC
        )
        self.train_indices = torch.arange(len(self.train_split))
        self.held_out: HeldOutBatches | None = None
        if "validation_losses" in self.balancer.requires:
            order = torch.randperm(
                len(self.train_split), generator=seeded_generator(config.seed, "held_out")
            )
            num_held_out = max(1, int(HELD_OUT_SHARE * len(order)))
            self.train_indices = order[num_held_out:].sort().values
            self.held_out = HeldOutBatches(
                data.clean_train.to(device), order[:num_held_out], config
            )
        self.steps_per_epoch = -(-len(self.train_indices) // config.batch_size)
        self.num_steps = config.epochs * self.steps_per_epoch

        self.state = RunState(
            self.parallel,
            self.optimizer,
            self.balancer,
            ranks,
            num_tasks=len(self.tasks),
            device=device,
        )
        self.latest: dict[str, float] = {}

        if ranks.rank > 0:  # one process' stream of random numbers is rank 0's
            torch.manual_seed(seeded_generator(config.seed, "rank", ranks.rank).initial_seed())

    def open(self, output: Path, *, resume: bool) -> None:
        """Opens the run's folder: begins the run there, or goes on with it. Writes when all has been checked."""
        self.folder = output
        checkpoint = self.ranks.first(lambda: self._open_record(resume=resume))
        is_new = checkpoint is None
        if checkpoint is not None:
            with self.ranks.sharing_errors():
                self._restore(checkpoint)
            num_epochs, metric = self.state.step // self.steps_per_epoch, self.selection_metric
            self.latest = self.ranks.first(lambda: self.record.last_row(num_epochs, metric))
        self.ranks.first(lambda: self._begin_record(is_new=is_new))
        if is_new:
            self._save()  # whoever finds rows without a checkpoint then knows that it was lost

    def _open_record(self, *, resume: bool) -> dict[str, Any] | None:
        """Returns the checkpoint to go on from; rank 0 only, as everything else that touches ``self.record``."""
        config = {**dataclasses.asdict(self.config), "balancer": repr(self.balancer)}
        self.record = RunRecord(self.folder, config, resume=resume)
        return self.record.checkpoint

    def _begin_record(self, *, is_new: bool) -> None:
        check_disk_space(self.folder, self.state.file_sizes(is_new=is_new))
        self.record.begin()

    def train(
        self, report: Callable[[Progress], None], should_stop: Callable[[], bool]
    ) -> dict[str, Any]:
        """Runs from the present step to the last, and writes what is to be reported."""
        report(self._progress())
        while self.state.step < self.num_steps:
            epoch, first_step = divmod(self.state.step, self.steps_per_epoch)
            batches = self._batches(epoch, first_step)
            started = time.perf_counter()
            for batch in self.ranks.in_step(batches):
                if self.ranks.any(should_stop()):
                    self.state.seconds += time.perf_counter() - started
                    self._save()
                    raise TrainingInterrupted(
                        f"Stopped after step {self.state.step} of {self.num_steps}."
                    )
                self._train_step(batch)
                report(self._progress())
            self.state.seconds += time.perf_counter() - started
            self._end_epoch(epoch + 1)
            report(self._progress())
        return self.ranks.first(self._finish)

    def _batches(self, epoch: int, first_step: int) -> Iterator[Part]:
        """Yields this process's parts of an epoch's batches from ``first_step`` on; workers change nothing."""
        order = torch.randperm(
            len(self.train_indices),
            generator=seeded_generator(self.config.seed, "batch_order", epoch),
        )
        joined = self.train_indices[order].split(self.config.batch_size)[first_step:]
        parts = [self.ranks.part(batch) for batch in joined]
        are_own = [len(part) > 0 for part in parts]
        indices = [
            part if is_own else batch[:1]
            for part, is_own, batch in zip(parts, are_own, joined, strict=True)
        ]
        if not self.config.num_workers:
            batches = (self.train_split.batch(batch, epoch=epoch) for batch in indices)
            yield from map(Part, batches, are_own)
            return
        loader = DataLoader(
            BatchesOfSplit(self.train_split, indices, epoch),
            batch_size=None,
            num_workers=self.config.num_workers,
        )
        yield from map(Part, (batch.to(self.device) for batch in loader), are_own)

    def _train_step(self, part: Part) -> None:
        batch = part.batch
        features = None
        if self.balancer.needs_features:
            features = self.model.features(batch.inputs)
            outputs = self.model.outputs(features)
        else:
            outputs = self.parallel.forward(batch.inputs)
        losses = task_losses(outputs, batch.targets, self.tasks)
        counts = label_counts(batch.targets, self.tasks) if part.is_own else [0] * len(losses)
        if self.held_out is not None:
            clean = self.held_out.batch(self.state.step)
            clean_losses = task_losses(self.model(clean.inputs), clean.targets, self.tasks)
            self.balancer.observe_validation(clean_losses)  # type: ignore[operator]
        self.optimizer.zero_grad()
        self.balancer.backward(
            losses,
            features=features,
            num_samples=counts if self.ranks.size > 1 else None,
        )
        self.state.step += 1
        # Adam would carry a NaN in its running means for ever. No method looks at the gradients of the heads, and
        # some look at no gradient: the largest element tells, which no sum of squares can overflow.
        zero = torch.zeros((), device=self.device)
        values = torch.stack([zero if loss is None else loss.detach() for loss in losses])
        grads = [local_part(p.grad) for p in self.model.parameters() if p.grad is not None]
        grads = [grad for grad in grads if grad.numel() > 0]
        largest = torch.nn.utils.get_total_norm(grads, norm_type=float("inf"))
        is_finite = values.isfinite().all() & largest.isfinite()
        if self.ranks.any(bool(self.balancer.found_nonfinite.any() | ~is_finite)):
            self.state.num_skipped_steps += 1
        else:
            self.optimizer.step()
            self.state.add(values, counts)
            if "losses_after_step" in self.balancer.requires:
                with torch.no_grad():
                    outputs = self.model(batch.inputs)
                    after = task_losses(outputs, batch.targets, self.tasks)
                self.balancer.after_step(after)  # type: ignore[operator]
        if self.state.step % self.config.task_weight_interval == 0:
            self.state.weight_rows.append((self.state.step, self.balancer.task_weights.clone()))

    def _end_epoch(self, epoch: int) -> None:
        """Evaluates, writes the epoch's rows, keeps the model if it is the best, and saves a checkpoint."""
        if self.state.num_finite_steps == 0:
            raise FloatingPointError(
                f"Expected finite gradients, but no step of epoch {epoch} had any: the run has diverged. "
                "Start it again with a smaller --lr."
            )
        loss_sums, num_samples, weight_sums, *risk_sums = self.state.joined_epoch_sums()
        row: dict[str, float] = {"epoch": epoch, "step": self.state.step}
        for task, total, number in zip(self.tasks, loss_sums, num_samples, strict=True):
            row[f"train/{task.name}_loss"] = total / number if number else float("nan")
        row["train/skipped_steps"] = self.state.num_skipped_steps
        self.ranks.copy_buffers(self.model)
        for name, split in (("validation", self.validation_split), ("test", self.test_split)):
            for metric, value in evaluate(self.model, split, self.tasks, ranks=self.ranks).items():
                row[f"{name}/{metric}"] = value
        weights = self.balancer.task_weights.tolist()
        for index, task in enumerate(self.tasks):
            row[f"balancer/{task.name}_weight"] = weights[index]
            row[f"balancer/{task.name}_mean_weight"] = (
                weight_sums[index] / self.state.num_finite_steps
            )
            for risk, sums in zip(self.state.risk_names(), risk_sums, strict=False):
                row[f"balancer/{task.name}_{risk}"] = sums[index] / self.state.num_finite_steps
        self.ranks.first(lambda: self._append_rows(row))
        self.balancer.end_epoch()
        self.state.begin_epoch()
        self.latest = row
        score = row[self.selection_metric]
        if math.isfinite(score) and score > self.state.best_score:
            self.state.best_score = score
            best = {"epoch": epoch, "model": self.parallel.state()}
            self.ranks.first(lambda: self.record.save_best_model(best))
        self._save()

    def _append_rows(self, row: dict[str, float]) -> None:
        self.record.append(METRICS, list(row), [list(row.values())])
        times = [row["epoch"], self.state.seconds]
        self.record.append(TIMES, ["epoch", "train_seconds"], [times])
        columns = ["step", *(task.name for task in self.tasks)]
        weights = [[step, *weights.tolist()] for step, weights in self.state.weight_rows]
        self.record.append(TASK_WEIGHTS, columns, weights)

    def _finish(self) -> dict[str, Any]:
        rows = self.record.read_metrics()
        selected = best_epoch(rows, self.selection_metric)
        if selected is None:
            raise FloatingPointError(
                f"Expected a finite {self.selection_metric} after some epoch, but none of {len(rows)} has one: the "
                "model's outputs are not finite. Start the run again with a smaller --lr."
            )
        weights = self.balancer.task_weights.tolist()
        metrics: dict[str, Any] = {
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
        metrics = finite_or_none(metrics)
        self.record.write_final_metrics(metrics)
        return metrics

    def _progress(self) -> Progress:
        epoch = self.state.step // self.steps_per_epoch
        return Progress(self.state.step, self.num_steps, epoch, self.latest)

    def _save(self) -> None:
        state = self.state.checkpoint()
        self.ranks.first(lambda: self.record.save_checkpoint(state))

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        """Takes the state of an interrupted run; raises ValueError where the checkpoint does not hold it."""
        try:
            step = int(checkpoint["step"])
            if step <= self.num_steps:
                self.state.restore(checkpoint)
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            what = " ".join(str(error).split())
            raise ValueError(
                f"Expected the checkpoint in {self.folder} to hold the state of this run, but got "
                f"{type(error).__name__}: {what:.300}. Was it written by another program? Start the run again."
            ) from error
        if step > self.num_steps:
            done = -(-step // self.steps_per_epoch)
            raise ValueError(
                f"Expected `epochs` of at least {done}, which the run in {self.folder} has begun, "
                f"but got {self.config.epochs}."
            )
