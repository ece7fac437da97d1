"""Task losses, and how good a model is on a split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from excessmtl_ext.data import Split, Task
from excessmtl_ext.models import EncoderHeads

# Evaluation keeps no graph; larger batches than this gain nothing on two cores.
EVALUATION_BATCH_SIZE = 2_000


def task_losses(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    """Returns the mean cross-entropy of each task, T scalars."""
    return [
        functional.cross_entropy(output, target)
        for output, target in zip(outputs, targets, strict=True)
    ]


@torch.no_grad()
def evaluate(model: EncoderHeads, split: Split, tasks: Sequence[Task]) -> dict[str, float]:
    """Measures a model on all samples of a split; leaves the model in training mode if it was.

    Args:
        model: Evaluated in eval mode.
        split: Not empty.
        tasks: Name the metrics.

    Returns:
        ``TASK_accuracy`` and ``TASK_loss`` (mean cross-entropy) of each task, and ``mean_accuracy`` over the tasks.
    """
    was_training = model.training
    model.eval()
    correct: Tensor | float = 0.0
    loss: Tensor | float = 0.0
    for indices in torch.arange(len(split)).split(EVALUATION_BATCH_SIZE):
        inputs, targets = split.batch(indices)
        outputs = model(inputs)
        # Summed on the device: one transfer at the end.
        correct = correct + torch.stack(
            [(o.argmax(1) == t).sum().double() for o, t in zip(outputs, targets, strict=True)]
        )
        loss = loss + torch.stack(task_losses(outputs, targets)).double() * len(indices)
    model.train(was_training)
    accuracies = (torch.as_tensor(correct) / len(split)).tolist()
    losses = (torch.as_tensor(loss) / len(split)).tolist()
    metrics: dict[str, float] = {}
    for task, accuracy, task_loss in zip(tasks, accuracies, losses, strict=True):
        metrics[f"{task.name}_accuracy"] = accuracy
        metrics[f"{task.name}_loss"] = task_loss
    metrics["mean_accuracy"] = sum(accuracies) / len(tasks)
    return metrics
