"""Losses and metrics by hand, without the pixels that have no label, over all samples whatever the batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from excessmtl_ext.data import Batch, Task, TaskKind, TensorSplit
from excessmtl_ext.models import EncoderHeads
from excessmtl_ext.training.run import metrics

TASKS = (Task("first", 2), Task("second", 2))
SEGMENTATION = Task("segmentation", 3, "segmentation")
DEPTH = Task("depth", 1, "depth")
NORMALS = Task("normals", 3, "normals")


class Constant(nn.Module):
    """Says the same of every sample, whatever the features."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, features: Tensor) -> Tensor:
        return self.output.expand(len(features), *self.output.shape)


# Class 1 with probability 3/4.
LOGITS = Constant(torch.tensor([0.0, math.log(3)]))


class Copy(nn.Module):
    """Says what the input says: a model whose outputs a test can choose for each sample."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.channels = slice(first, last)

    def forward(self, features: Tensor) -> Tensor:
        return features[:, self.channels]


def evaluate_outputs(
    output: Tensor, target: Tensor, task: Task, batch_size: int
) -> dict[str, float]:
    """Returns the metrics, without the name of the task, of a model with these outputs."""
    model = EncoderHeads(nn.Identity(), [Copy(0, output.shape[1])])
    results = metrics.evaluate(
        model, TensorSplit(output, (target,)), (task,), batch_size=batch_size
    )
    assert results.pop("mean_score") == results[f"{task.name}_score"]
    return {name.removeprefix(f"{task.name}_"): value for name, value in results.items()}


def one_loss(output: Tensor, target: Tensor, task: Task) -> Tensor:
    (loss,) = metrics.task_losses([output], [target], [task])
    assert loss is not None
    return loss


def test_classification_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "EVALUATION_BATCH_SIZE", 3)  # 5 samples: a last batch of 2
    model = EncoderHeads(nn.Flatten(), [LOGITS, LOGITS])
    split = TensorSplit(
        torch.zeros(5, 1, dtype=torch.uint8),
        (torch.tensor([1, 1, 1, 0, 0]), torch.tensor([1, 0, 0, 0, 0])),
        0.0,
        1.0,
    )
    assert metrics.evaluate(model, split, TASKS) == pytest.approx(
        {
            "first_loss": -(3 * math.log(3 / 4) + 2 * math.log(1 / 4)) / 5,
            "first_accuracy": 3 / 5,
            "first_score": 3 / 5,
            "second_loss": -(math.log(3 / 4) + 4 * math.log(1 / 4)) / 5,
            "second_accuracy": 1 / 5,
            "second_score": 1 / 5,
            "mean_score": 2 / 5,
        }
    )


def test_classification_loss_is_the_mean_cross_entropy_bit_for_bit() -> None:
    logits = torch.randn(37, 10, requires_grad=True)
    target = torch.randint(10, (37,))
    loss, expected = (
        one_loss(logits, target, Task("t", 10)),
        functional.cross_entropy(logits, target),
    )
    assert torch.equal(loss, expected)
    (grad,), (expected_grad,) = (torch.autograd.grad(each, logits) for each in (loss, expected))
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_regression_by_hand(batch_size: int) -> None:
    output = torch.tensor([[1.0], [2.0], [3.0], [6.0]])
    target = torch.tensor([0.0, 2.0, 4.0, 6.0])
    # Squared errors 1, 0, 1, 0; the targets' variance is (9 + 1 + 1 + 9) / 4 = 5.
    expected = {"loss": 0.5, "nmse": 0.1, "score": 0.9}
    actual = evaluate_outputs(output, target, Task("torque", 1, "regression"), batch_size)
    assert actual == pytest.approx(expected)
    assert float(one_loss(output, target, Task("torque", 1, "regression"))) == 0.5


def test_regression_head_with_two_outputs_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"to be \[3, 1\].*but got \[3, 2\]. Give its task num_outputs=1"
    ):
        one_loss(torch.zeros(3, 2), torch.zeros(3), Task("torque", 2, "regression"))


def test_equal_regression_targets_are_an_error() -> None:
    with pytest.raises(
        ValueError, match="Expected the targets of task 'torque' to differ, but all 3 are 2"
    ):
        evaluate_outputs(
            torch.zeros(3, 1), torch.full((3,), 2.0), Task("torque", 1, "regression"), 2
        )


@pytest.mark.parametrize("batch_size", [1, 2])
def test_segmentation_by_hand(batch_size: int) -> None:
    # Targets 0 0 / 1 -1 and 0 1 / -1 -1; class 2 occurs nowhere. Said: 0 1 / 1 0 and 0 1 / 1 0.
    target = torch.tensor([[[0, 0], [1, -1]], [[0, 1], [-1, -1]]])
    said = torch.tensor([[[0, 1], [1, 0]], [[0, 1], [1, 0]]])
    output = functional.one_hot(said, 3).movedim(-1, 1).float() * math.log(2)
    # Probability 1/2 of the class that is said, 1/4 of the others. Intersection / union: 2 / 3 and 2 / 3.
    loss = (4 * math.log(2) + math.log(4)) / 5
    actual = evaluate_outputs(output, target, SEGMENTATION, batch_size)
    assert actual == pytest.approx(
        {"loss": loss, "miou": 2 / 3, "pixel_accuracy": 4 / 5, "score": 2 / 3}
    )
    assert float(one_loss(output, target, SEGMENTATION)) == pytest.approx(loss)


def test_a_class_that_is_only_said_counts_as_missed() -> None:
    target = torch.tensor([[[0, 0, 1, 1]]])
    output = functional.one_hot(torch.tensor([[[0, 2, 1, 1]]]), 3).movedim(-1, 1).float()
    assert evaluate_outputs(output, target, SEGMENTATION, 1)["miou"] == pytest.approx(
        (1 / 2 + 1 + 0) / 3
    )


@pytest.mark.parametrize("batch_size", [1, 2])
def test_depth_by_hand(batch_size: int) -> None:
    target = torch.tensor([1.0, 2.0, 0.0, 4.0, 0.0, 0.0, 0.0, 8.0]).view(2, 1, 2, 2)
    output = torch.tensor([2.0, 1.0, 9.0, 4.0, 9.0, 9.0, 9.0, 6.0]).view(2, 1, 2, 2)
    actual = evaluate_outputs(output, target, DEPTH, batch_size)
    expected_relative = (1 + 1 / 2 + 0 + 1 / 4) / 4
    assert actual == pytest.approx(
        {
            "loss": 1.0,
            "absolute_error": 1.0,
            "relative_error": expected_relative,
            "score": 1 - expected_relative,
        }
    )
    assert float(one_loss(output, target, DEPTH)) == 1.0


def directions(*degrees: float) -> Tensor:
    """Returns unit vectors [N, 3, 1, 1] at these angles from the x axis."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin(), torch.zeros(len(angles))], dim=1)[
        ..., None, None
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_normals_by_hand(batch_size: int) -> None:
    target = directions(0, 0, 0, 0, 0)
    target[3] = 0  # no label
    # The length of an output does not matter.
    output = 2.5 * directions(10, 20, 60, 170, 25)
    actual = evaluate_outputs(output, target, NORMALS, batch_size)
    assert actual.pop("median_angle") == pytest.approx(
        22.5, abs=0.5 / metrics.ANGLE_BINS_PER_DEGREE
    )
    cosines = [math.cos(math.radians(angle)) for angle in (10, 20, 60, 25)]
    assert actual == pytest.approx(
        {
            "loss": 1 - sum(cosines) / 4,
            "mean_angle": 115 / 4,
            "within_11": 1 / 4,
            "within_22": 2 / 4,
            "within_30": 3 / 4,
            "score": 1 - 115 / 4 / 90,
        }
    )
    assert float(one_loss(output, target, NORMALS)) == pytest.approx(1 - sum(cosines) / 4)


def test_equal_and_opposite_normals_are_0_and_180_degrees_apart() -> None:
    normal = functional.normalize(torch.randn(4, 3, 8, 8), dim=1)
    equal = evaluate_outputs(normal, normal.clone(), NORMALS, 4)
    assert equal["mean_angle"] < 1e-4
    assert equal["median_angle"] < 0.01
    opposite = evaluate_outputs(-normal, normal, NORMALS, 4)
    assert opposite["mean_angle"] == pytest.approx(180)
    assert opposite["within_30"] == 0


@pytest.mark.parametrize(
    ("task", "unlabelled"),
    [
        (SEGMENTATION, torch.full((2, 4, 4), -1)),
        (DEPTH, torch.zeros(2, 1, 4, 4)),
        (NORMALS, torch.zeros(2, 3, 4, 4)),
    ],
    ids=lambda value: value.name if isinstance(value, Task) else "",
)
def test_pixels_without_a_label_have_no_loss_and_no_gradient(
    task: Task, unlabelled: Tensor
) -> None:
    output = torch.randn(2, task.num_outputs, 4, 4, requires_grad=True)
    assert metrics.task_losses([output], [unlabelled], [task]) == [None]
    target = unlabelled.clone()
    target[0, ..., 1, 2] = 1
    one_loss(output, target, task).backward()
    assert output.grad is not None
    touched = output.grad.abs().sum(dim=1).nonzero().tolist()
    assert touched == [[0, 1, 2]]
    with pytest.raises(ValueError, match=f"to have a label of task '{task.name}', but got none"):
        evaluate_outputs(output.detach(), unlabelled, task, 2)


def test_a_missing_target_has_no_loss() -> None:
    losses = metrics.task_losses([torch.zeros(2, 2)] * 2, [None, torch.tensor([0, 1])], TASKS)
    assert losses[0] is None
    assert losses[1] is not None
    assert float(losses[1]) == pytest.approx(math.log(2))


class TwoLengths:
    """A split of two tasks with inputs of their own: three samples and one."""

    def __len__(self) -> int:
        return 3

    def batch(self, indices: Tensor, *, epoch: int | None = None) -> Batch:
        return Batch([torch.zeros(len(indices), 1)] * 2, [torch.ones(len(indices)).long()] * 2)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        one = torch.ones(1, dtype=torch.int64)
        yield Batch([torch.zeros(2, 1), torch.zeros(1, 1)], [one.expand(2), one])
        yield Batch([torch.zeros(1, 1), torch.zeros(0, 1)], [one - 1, None])

    def to(self, device: torch.device) -> TwoLengths:
        return self


def test_a_task_that_runs_out_is_measured_on_its_own_samples() -> None:
    model = EncoderHeads(nn.Identity(), [LOGITS, LOGITS])
    result = metrics.evaluate(model, TwoLengths(), TASKS)
    assert result["first_accuracy"] == pytest.approx(2 / 3)
    assert result["second_accuracy"] == 1


class Recorder(nn.Module):
    """Notes how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[bool, bool, int]] = []

    def forward(self, features: Tensor) -> Tensor:
        self.calls.append((self.training, torch.is_grad_enabled(), len(features)))
        return features.flatten(1)[:, :2]


def test_evaluate_runs_in_eval_mode_without_a_graph_and_leaves_the_mode() -> None:
    recorder = Recorder()
    model = EncoderHeads(nn.Flatten(), [recorder])
    split = TensorSplit(torch.zeros(2, 2), (torch.zeros(2, dtype=torch.int64),))
    for mode in (True, False):
        metrics.evaluate(model.train(mode), split, TASKS[:1])
        assert model.training is mode
    assert recorder.calls == [(False, False, 2)] * 2


def test_a_failed_evaluation_leaves_the_mode() -> None:
    model = EncoderHeads(nn.Identity(), [nn.Linear(3, 2)]).train()
    split = TensorSplit(torch.zeros(2, 2), (torch.zeros(2, dtype=torch.int64),))
    with pytest.raises(RuntimeError):
        metrics.evaluate(model, split, TASKS[:1])
    assert model.training


def test_large_samples_are_evaluated_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "EVALUATION_BATCH_VALUES", 20)
    recorder = Recorder()
    split = TensorSplit(torch.zeros(5, 1, 3, 3), (torch.zeros(5, dtype=torch.int64),))
    metrics.evaluate(EncoderHeads(nn.Identity(), [recorder]), split, TASKS[:1])
    assert [size for _, _, size in recorder.calls] == [2, 2, 1]


def test_every_metric_has_a_direction_and_every_kind_a_primary_metric() -> None:
    examples: dict[TaskKind, tuple[Tensor, Tensor]] = {
        "classification": (torch.ones(2, 3), torch.tensor([0, 1])),
        "regression": (torch.ones(2, 1), torch.tensor([0.0, 1.0])),
        "segmentation": (torch.ones(2, 3, 2, 2), torch.zeros(2, 2, 2, dtype=torch.int64)),
        "depth": (torch.ones(2, 1, 2, 2), torch.ones(2, 1, 2, 2)),
        "normals": (torch.ones(2, 3, 2, 2), torch.ones(2, 3, 2, 2)),
    }
    assert set(examples) == set(get_args(TaskKind)) == set(metrics.PRIMARY_METRIC)
    names: set[str] = set()
    for kind, (output, target) in examples.items():
        results = evaluate_outputs(output, target, Task("task", output.shape[1], kind), 2)
        assert metrics.PRIMARY_METRIC[kind] in results
        names |= set(results)
    assert names == set(metrics.HIGHER_IS_BETTER)
