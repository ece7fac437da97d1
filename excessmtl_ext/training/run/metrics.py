"""Task losses, and how good a model is on a split, for every kind of task."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from excessmtl_ext.data import IGNORED_CLASS, Split, Task, TaskKind
from excessmtl_ext.models import EncoderHeads
from excessmtl_ext.training.run.ranks import RunRanks

# Evaluation keeps no graph; larger batches than this gain nothing on two cores.
EVALUATION_BATCH_SIZE = 2_000
# Images come in smaller batches: 6 frames of 288 x 384 x 3, whose widest SegNet activation is then 170 MB.
EVALUATION_BATCH_VALUES = 2_000_000

# The metric that stands for a task in tables and figures, by what it predicts.
PRIMARY_METRIC: dict[TaskKind, str] = {
    "classification": "accuracy",
    "regression": "nmse",
    "segmentation": "miou",
    "depth": "relative_error",
    "normals": "mean_angle",
}

# Every metric of `evaluate`, without the name of its task.
HIGHER_IS_BETTER: dict[str, bool] = {
    "loss": False,
    "score": True,
    "accuracy": True,
    "nmse": False,
    "miou": True,
    "pixel_accuracy": True,
    "absolute_error": False,
    "relative_error": False,
    "mean_angle": False,
    "median_angle": False,
    "within_11": True,
    "within_22": True,
    "within_30": True,
}

# The thresholds of Eigen & Fergus 2015 and Fouhey et al. 2013 in degrees, and the metric of each.
ANGLE_THRESHOLDS = {"within_11": 11.25, "within_22": 22.5, "within_30": 30.0}

# All angles of 654 frames would take 290 MB; counted in bins, the median is right to half a bin.
ANGLE_BINS_PER_DEGREE = 100


def task_losses(
    outputs: Sequence[Tensor], targets: Sequence[Tensor | None], tasks: Sequence[Task]
) -> list[Tensor | None]:
    """Returns the loss of each task, a mean over samples or over the pixels that have a label.

    Classification and segmentation: cross-entropy. Regression: squared error. Depth: absolute error. Normals: one
    minus the cosine of the angle between output and target. See `Task` for shapes and for what marks a pixel without
    a label.

    Args:
        outputs: T outputs of the heads.
        targets: T targets; None where the batch has no sample of that task.
        tasks: T tasks.

    Returns:
        T scalars; None where the target is None, or where not one pixel of it has a label.

    Raises:
        ValueError: the output of a regression head does not have the shape of its target.

    Cost: on CUDA, tasks with labels of pixels wait for the device, which counts those that have one.
    """
    losses: list[Tensor | None] = []
    for output, target, task in zip(outputs, targets, tasks, strict=True):
        if target is None:
            losses.append(None)
            continue
        loss_sum, count = _loss_sum(output, target, task)
        losses.append(loss_sum / count if count else None)
    return losses


def label_counts(targets: Sequence[Tensor | None], tasks: Sequence[Task]) -> list[int]:
    """Returns how many samples or labelled pixels stand behind each loss of `task_losses`.

    Args:
        targets: T targets; None where the batch has no sample of that task.
        tasks: T tasks.
    """
    return [
        0 if target is None else _label_count(target, task.kind)
        for target, task in zip(targets, tasks, strict=True)
    ]


@torch.no_grad()
def evaluate(
    model: EncoderHeads,
    split: Split,
    tasks: Sequence[Task],
    *,
    batch_size: int | None = None,
    ranks: RunRanks | None = None,
) -> dict[str, float]:
    """Measures a model on all samples of a split; leaves the model in training mode if it was.

    Every metric is over the split as a whole: it does not depend on the size of the batches.

    Args:
        model: Evaluated in eval mode.
        split: Not empty; every task has a label in it.
        tasks: Name the metrics, and decide which there are.
        batch_size: Samples at a time; None takes at most 2,000, and fewer where samples are large.
        ranks: Processes that take turns with the batches; every one calls this, and all get the same.

    Returns:
        For each task ``TASK_loss`` (see `task_losses`), its metrics, and ``TASK_score``, which is 1 for a perfect
        model, higher is better for all kinds of tasks; and ``mean_score`` over the tasks.

        ================  =====================================================================  ====================
        kind              metrics                                                                score
        ================  =====================================================================  ====================
        classification    accuracy                                                               accuracy
        regression        nmse: mean squared error / variance of the split's targets             1 - nmse
        segmentation      miou: mean over the classes that occur in targets or outputs of        miou
                          intersection / union; pixel_accuracy
        depth             absolute_error in metres, relative_error                               1 - relative_error
        normals           mean_angle and median_angle in degrees; within_11, within_22,          1 - mean_angle / 90
                          within_30: shares of pixels within 11.25, 22.5 and 30 degrees
        ================  =====================================================================  ====================

    Raises:
        ValueError: a task has no label in the split, or all its regression targets are equal.
    """
    was_training = model.training
    model.eval()
    try:
        sums = [_SUMS[task.kind](task) for task in tasks]
        batches = split.batches(batch_size or _evaluation_batch_size(split))
        for (inputs, targets), is_own in (ranks or RunRanks()).deal(batches):
            outputs = model(
                inputs
            )  # also of another's batch: fully sharded parameters are gathered by all
            for task_sums, output, target in zip(sums, outputs, targets, strict=True):
                if target is not None and is_own:
                    task_sums.add(output, target)
    finally:
        model.train(was_training)
    if ranks is not None:
        sums = _joined(sums, ranks)
    metrics: dict[str, float] = {}
    scores: list[float] = []
    for task, task_sums in zip(tasks, sums, strict=True):
        results = task_sums.results()
        scores.append(results["score"])
        metrics.update({f"{task.name}_{name}": value for name, value in results.items()})
    metrics["mean_score"] = sum(scores) / len(scores)
    return metrics


def _evaluation_batch_size(split: Split) -> int:
    """Returns how many samples to evaluate at a time, from the size of the first."""
    inputs = split.batch(torch.arange(1)).inputs
    num_values = (
        sum(each.numel() for each in inputs) if isinstance(inputs, list) else inputs.numel()
    )
    return max(1, min(EVALUATION_BATCH_SIZE, EVALUATION_BATCH_VALUES // max(1, num_values)))


def _joined(sums: list[_TaskSums], ranks: RunRanks) -> list[_TaskSums]:
    """Adds the sums of all processes, in their order: the same bits on each."""
    if ranks.size == 1:
        return sums
    first, *others = ranks.gather([task_sums.on_cpu() for task_sums in sums])
    for other in others:
        for total, task_sums in zip(first, other, strict=True):
            total.join(task_sums)
    return first


def _label_count(target: Tensor, kind: TaskKind) -> int:
    """Returns the number of samples, or of labelled pixels."""
    if kind in ("classification", "regression"):
        return len(target)
    return int(_labelled(target, kind).sum())


def _loss_sum(output: Tensor, target: Tensor, task: Task) -> tuple[Tensor, int]:
    """Returns the sum of a task's loss over samples or labelled pixels, and how many these are."""
    if task.kind == "classification":
        return functional.cross_entropy(output, target, reduction="sum"), len(target)
    if task.kind == "regression":
        return functional.mse_loss(_values(output, target), target, reduction="sum"), len(target)
    valid = _labelled(target, task.kind)
    count = int(valid.sum())
    if task.kind == "segmentation":
        loss_sum = functional.cross_entropy(
            output, target, ignore_index=IGNORED_CLASS, reduction="sum"
        )
    elif task.kind == "depth":
        loss_sum = ((output - target).abs() * valid).sum()
    else:
        cosine = functional.cosine_similarity(output, target, dim=1)
        loss_sum = ((1 - cosine) * valid).sum()
    return loss_sum, count


def _labelled(target: Tensor, kind: TaskKind) -> Tensor:
    """Returns which pixels have a label: bool [B, H, W], for depth [B, 1, H, W]."""
    if kind == "segmentation":
        return target != IGNORED_CLASS
    return target > 0 if kind == "depth" else (target != 0).any(dim=1)


def _values(output: Tensor, target: Tensor) -> Tensor:
    """Returns a regression head's output [B, 1] as [B]. Left as it is, mse_loss would broadcast it to [B, B]."""
    values = output.squeeze(1) if output.dim() == 2 and output.shape[1] == 1 else output
    if values.shape != target.shape:
        raise ValueError(
            f"Expected the output of a regression head to be [{len(target)}, 1] for targets {list(target.shape)}, "
            f"but got {list(output.shape)}. Give its task num_outputs=1."
        )
    return values


class _TaskSums(ABC):
    """What one task's metrics are made of, summed over batches in float64 on the device."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.count = 0
        self.loss_sum: Tensor | float = 0.0

    def add(self, output: Tensor, target: Tensor) -> None:
        """Adds a batch."""
        loss_sum, count = _loss_sum(output, target, self.task)
        self.loss_sum = self.loss_sum + loss_sum.double()
        self.count += count
        self._add(output, target)

    def on_cpu(self) -> _TaskSums:
        """Returns these sums with their tensors on the CPU."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            setattr(moved, name, value.cpu() if isinstance(value, Tensor) else value)
        return moved

    def join(self, other: _TaskSums) -> None:
        """Adds the sums of other batches."""
        for name, value in vars(other).items():
            if name != "task":
                setattr(self, name, getattr(self, name) + value)

    def results(self) -> dict[str, float]:
        """Returns loss, metrics and score over all batches."""
        if self.count == 0:
            raise ValueError(
                f"Expected the split to have a label of task {self.task.name!r}, but got none to evaluate it on."
            )
        metrics = self._metrics()
        return {
            "loss": float(self.loss_sum) / self.count,
            **metrics,
            "score": self._score(metrics[PRIMARY_METRIC[self.task.kind]]),
        }

    @abstractmethod
    def _add(self, output: Tensor, target: Tensor) -> None: ...

    @abstractmethod
    def _metrics(self) -> dict[str, float]: ...

    def _score(self, primary: float) -> float:
        return primary


class _ClassificationSums(_TaskSums):
    correct: Tensor | int = 0

    def _add(self, output: Tensor, target: Tensor) -> None:
        self.correct = self.correct + (output.argmax(1) == target).sum()

    def _metrics(self) -> dict[str, float]:
        return {"accuracy": int(self.correct) / self.count}


class _RegressionSums(_TaskSums):
    target_sum: Tensor | float = 0.0
    sq_target_sum: Tensor | float = 0.0

    def _add(self, output: Tensor, target: Tensor) -> None:
        # float64: of standardised float32 targets the difference of these sums keeps all digits.
        values = target.double()
        self.target_sum = self.target_sum + values.sum()
        self.sq_target_sum = self.sq_target_sum + (values * values).sum()

    def _metrics(self) -> dict[str, float]:
        mean = float(self.target_sum) / self.count
        variance = float(self.sq_target_sum) / self.count - mean**2
        if not variance > 0:
            raise ValueError(
                f"Expected the targets of task {self.task.name!r} to differ, but all {self.count} are {mean:g}: "
                "their variance, which normalises the error, is 0."
            )
        return {"nmse": float(self.loss_sum) / self.count / variance}

    def _score(self, primary: float) -> float:
        return 1 - primary


class _SegmentationSums(_TaskSums):
    confusion: Tensor | int = 0

    def _add(self, output: Tensor, target: Tensor) -> None:
        num_classes = self.task.num_outputs
        valid = _labelled(target, "segmentation")
        pairs = target[valid] * num_classes + output.argmax(1)[valid]
        counts = torch.bincount(pairs, minlength=num_classes**2)
        self.confusion = self.confusion + counts.view(num_classes, num_classes)

    def _metrics(self) -> dict[str, float]:
        confusion = torch.as_tensor(self.confusion).cpu().double()
        intersection = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - intersection
        occurs = union > 0
        return {
            "miou": float((intersection[occurs] / union[occurs]).mean()),
            "pixel_accuracy": float(intersection.sum() / confusion.sum()),
        }


class _DepthSums(_TaskSums):
    relative_sum: Tensor | float = 0.0

    def _add(self, output: Tensor, target: Tensor) -> None:
        valid = _labelled(target, "depth")
        depth = target[valid]
        self.relative_sum = (
            self.relative_sum + ((output[valid] - depth).abs() / depth).double().sum()
        )

    def _metrics(self) -> dict[str, float]:
        return {
            "absolute_error": float(self.loss_sum) / self.count,
            "relative_error": float(self.relative_sum) / self.count,
        }

    def _score(self, primary: float) -> float:
        return 1 - primary


class _NormalsSums(_TaskSums):
    angle_sum: Tensor | float = 0.0
    within: Tensor | int = 0
    histogram: Tensor | int = 0

    def _add(self, output: Tensor, target: Tensor) -> None:
        valid = _labelled(target, "normals")
        predicted, true = output.movedim(1, -1)[valid], target.movedim(1, -1)[valid]
        # Not the arc cosine: in float32 it sees no angle below 0.02 degrees, and NaN where rounding exceeds 1.
        cross = torch.linalg.vector_norm(torch.linalg.cross(predicted, true), dim=-1)
        angles = torch.rad2deg(torch.atan2(cross, (predicted * true).sum(-1)).double())
        self.angle_sum = self.angle_sum + angles.sum()
        thresholds = torch.tensor(list(ANGLE_THRESHOLDS.values()), device=angles.device)
        self.within = self.within + (angles.unsqueeze(1) < thresholds).sum(0)
        num_bins = 180 * ANGLE_BINS_PER_DEGREE
        bins = (angles * ANGLE_BINS_PER_DEGREE).long().clamp_(max=num_bins - 1)
        self.histogram = self.histogram + torch.bincount(bins, minlength=num_bins)

    def _metrics(self) -> dict[str, float]:
        shares = (torch.as_tensor(self.within) / self.count).tolist()
        ranks = torch.as_tensor(self.histogram).cpu().cumsum(0)
        # The two middle ones; the same one twice where their number is odd.
        middle = torch.tensor([(self.count - 1) // 2, self.count // 2])
        bins = torch.searchsorted(ranks, middle, right=True)
        return {
            "mean_angle": float(self.angle_sum) / self.count,
            "median_angle": float((bins + 0.5).mean()) / ANGLE_BINS_PER_DEGREE,
            **dict(zip(ANGLE_THRESHOLDS, shares, strict=True)),
        }

    def _score(self, primary: float) -> float:
        return 1 - primary / 90


_SUMS: dict[TaskKind, type[_TaskSums]] = {
    "classification": _ClassificationSums,
    "regression": _RegressionSums,
    "segmentation": _SegmentationSums,
    "depth": _DepthSums,
    "normals": _NormalsSums,
}
