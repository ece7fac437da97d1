"""A batch in which all labels of a task are ignored: a gradient of zero, and a loss of NaN or 0, count as no task."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from _asserts import assert_equal_bits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from excessmtl_ext import (
    FAMO,
    IMTL,
    MGDA,
    MOML,
    Balancer,
    DualBalancing,
    DynamicWeightAverage,
    GradNorm,
    GroupDRO,
    InverseNorm,
    SingleTask,
    SmoothTchebycheff,
    UncertaintyWeights,
    Uniform,
)
from excessmtl_ext.step import NonFinite

MAKERS: dict[str, Callable[..., Balancer]] = {
    "uniform": Uniform,
    "single_task": lambda parameters, **options: SingleTask(parameters, task=0, **options),
    "group_dro": lambda parameters, **options: GroupDRO(
        parameters, robust_step_size=0.3, **options
    ),
    "group_dro_sized": lambda parameters, **options: GroupDRO(
        parameters, robust_step_size=0.3, combine="per_tensor", **options
    ),
    "uniform_sized": lambda parameters, **options: Uniform(
        parameters, combine="per_tensor", **options
    ),
    "gradnorm": GradNorm,
    "uncertainty": UncertaintyWeights,
    "dwa": DynamicWeightAverage,
    "famo": FAMO,
    "stch": SmoothTchebycheff,
    "dbmtl": DualBalancing,
    "inverse_norm": InverseNorm,
    "mgda": MGDA,
    "moml": MOML,
    "imtl_g": lambda parameters, **options: IMTL(parameters, variant="G", **options),
    "imtl_l": lambda parameters, **options: IMTL(
        parameters, variant="L", robust_step_size=0.3, **options
    ),
    "imtl_both": lambda parameters, **options: IMTL(parameters, variant="both", **options),
}
STREAM = ("group_dro", "imtl_l", "uncertainty", "dwa", "famo", "stch")
READ_LOSSES = (*STREAM, "group_dro_sized", "gradnorm", "imtl_both", "dbmtl")


def ignored(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, torch.full_like(labels, -100))


def masked(logits: Tensor, labels: Tensor) -> Tensor:
    return (cross_entropy(logits, labels, reduction="none") * 0.0).sum()


def diverged(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits * float("nan"), labels)


class Run:
    """Three tasks of one encoder under a method."""

    def __init__(self, name: str, **options: NonFinite) -> None:
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.heads = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))
        self.balancer = MAKERS[name](self.encoder.parameters(), num_tasks=3, **options)
        self.parameters = [*self.encoder.parameters(), *self.heads.parameters()]

    def losses(self, number: int, last: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randn(6, 4, generator=generator)
        labels = torch.randint(0, 2, (3, 6), generator=generator)
        z = self.encoder(inputs)
        losses = [cross_entropy(self.heads[task](z), labels[task]) for task in (0, 1)]
        return [*losses, last(self.heads[2](z), labels[2])]

    def step(
        self,
        number: int,
        last: Callable[[Tensor, Tensor], Tensor] | None = cross_entropy,
        *,
        streams: bool = False,
    ) -> None:
        """One step of plain descent; ``last`` is the loss of the third task, None where that is absent."""
        for parameter in self.parameters:
            parameter.grad = None
        if isinstance(self.balancer, MOML):
            self.balancer.observe_validation(self._given(number, last))
        given = self._given(number, last)
        if streams:
            for task, loss in enumerate(given):
                if loss is not None:
                    self.balancer.accumulate(task, loss, retain_graph=True)
            self.balancer.finish()
        else:
            self.balancer.backward(given)
        if not self.balancer.found_nonfinite.any():
            with torch.no_grad():
                for parameter in self.parameters:
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad

    def _given(
        self, number: int, last: Callable[[Tensor, Tensor], Tensor] | None
    ) -> list[Tensor | None]:
        losses = self.losses(number, last or cross_entropy)
        return [*losses[:2], None if last is None else losses[2]]

    def all_numbers(self) -> list[Tensor]:
        return [*self.balancer.state_tensors().values(), *self.parameters]


def assert_alike(left: Run, right: Run) -> None:
    for ours, theirs in zip(left.all_numbers(), right.all_numbers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_task_without_labels_counts_as_absent(name: str, nonfinite: NonFinite) -> None:
    run, other = Run(name, nonfinite=nonfinite), Run(name, nonfinite=nonfinite)
    for number in range(8):
        is_ignored = number in (0, 3, 4, 6)
        run.step(number, ignored if is_ignored else cross_entropy)
        other.step(number, None if is_ignored else cross_entropy)
        assert int(run.balancer.num_skipped_steps) == 0
        assert_alike(run, other)
    assert bool(run.balancer.task_weights.isfinite().all())


@pytest.mark.parametrize(
    "name", ["gradnorm", "dbmtl", "inverse_norm", "mgda", "moml", "imtl_g", "imtl_both"]
)
def test_a_gradient_of_zero_counts_as_absent_whatever_the_loss_is(name: str) -> None:
    run, other = Run(name), Run(name)
    for number in range(8):
        is_ignored = number in (0, 3, 4, 6)
        run.step(number, masked if is_ignored else cross_entropy)
        other.step(number, None if is_ignored else cross_entropy)
        assert_alike(run, other)


@pytest.mark.parametrize("name", STREAM)
def test_a_task_without_labels_counts_as_absent_in_a_streamed_step(name: str) -> None:
    run, other = Run(name), Run(name)
    for number in range(8):
        is_ignored = number in (0, 3, 4, 6)
        run.step(number, ignored if is_ignored else cross_entropy, streams=True)
        other.step(number, None if is_ignored else cross_entropy)
        assert_alike(run, other)


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("streams", [False, True], ids=["backward", "streamed"])
@pytest.mark.parametrize("name", READ_LOSSES)
def test_a_loss_of_nan_with_a_gradient_is_a_step_that_does_not_count(
    name: str, streams: bool, nonfinite: NonFinite
) -> None:
    if streams and name not in STREAM:
        pytest.skip("the method does not stream")
    run = Run(name, nonfinite=nonfinite)
    run.step(0)
    names = run.balancer.state_tensors().keys() - {"found_nonfinite", "num_skipped_steps"}
    before = [run.balancer.state_tensors()[each].clone() for each in names]
    with pytest.raises(FloatingPointError) if nonfinite == "raise" else nullcontext():
        run.step(1, diverged, streams=streams)
    assert run.balancer.found_nonfinite.tolist() == [False, False, True]
    assert int(run.balancer.num_skipped_steps) == 1
    assert_equal_bits([run.balancer.state_tensors()[each] for each in names], before)
    weight = run.parameters[0]
    if nonfinite == "skip":  # so that a guard skips the optimizer, too
        assert weight.grad is not None
        assert bool(weight.grad.isnan().all())


@pytest.mark.parametrize("name", STREAM)
def test_a_batch_without_any_label_is_no_step(name: str) -> None:
    run = Run(name)
    run.step(0)
    before = [tensor.clone() for tensor in run.balancer.state_tensors().values()]
    z = run.encoder(torch.randn(6, 4))
    labels = torch.zeros(6, dtype=torch.int64)
    run.balancer.backward([ignored(head(z), labels) for head in run.heads])
    assert_equal_bits(list(run.balancer.state_tensors().values()), before)
    run.step(1)
    assert int(run.balancer.num_steps) == 2
    assert int(run.balancer.num_skipped_steps) == 0


@pytest.mark.parametrize("name", STREAM)
def test_a_given_loss_of_nan_is_not_finite(name: str) -> None:
    """``update_weights`` has no gradient to look at."""
    balancer = MAKERS[name](None, num_tasks=2)
    balancer.update_weights(losses=torch.tensor([1.0, float("nan")]))
    assert balancer.found_nonfinite.tolist() == [False, True]
    assert balancer.task_weights.tolist() == [0.5, 0.5]
