"""A compiled step takes the steps of ``balancer.backward``, to the bit under ``backend="aot_eager"``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from excessmtl_ext import ExcessMTL, compiled_step
from excessmtl_ext.compiled_step import CompiledStep

NUM_TASKS = 3
PUBLISHED: dict[str, Any] = {"robust_step_size": 1.0, "combine": "sum", "gradient_momentum": 0.0}

pytestmark = pytest.mark.skipif(
    not compiled_step.can_trace(), reason="this torch cannot trace a backward pass"
)


class Training:
    """A small network, its balancer and an optimizer."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6))
        self.heads = nn.ModuleList([nn.Linear(6, 1) for _ in range(NUM_TASKS)])
        self.balancer = ExcessMTL(self.encoder.parameters(), num_tasks=NUM_TASKS, **options)
        self.parameters = [*self.encoder.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.05, momentum=0.9)

    def losses(self, inputs: Tensor, targets: list[Tensor | None]) -> list[Tensor | None]:
        features = self.encoder(inputs)
        return [
            None if target is None else (head(features)[:, 0] - target).square().mean()
            for head, target in zip(self.heads, targets, strict=True)
        ]

    def compiled(self) -> CompiledStep:
        return self.balancer.compiled(self.losses, self.optimizer, backend="aot_eager")

    def ordinary(self, inputs: Tensor, targets: list[Tensor | None]) -> Tensor:
        losses = self.losses(inputs, targets)
        self.balancer.backward(losses)
        if not self.balancer.found_nonfinite.any():
            self.optimizer.step()
        nan = torch.tensor(float("nan"))
        return torch.stack([nan if loss is None else loss.detach() for loss in losses])


def batches(number: int, absent_in: int | None = None) -> list[tuple[Tensor, list[Tensor | None]]]:
    generator = torch.Generator().manual_seed(1)
    made: list[tuple[Tensor, list[Tensor | None]]] = []
    for index in range(number):
        targets = list(torch.randn(NUM_TASKS, 12, generator=generator))
        lacks = absent_in is not None and index % absent_in == 0
        made.append(
            (
                torch.randn(12, 5, generator=generator),
                [None if lacks and task == 1 else target for task, target in enumerate(targets)],
            )
        )
    return made


def assert_equal(actual: Training, expected: Training) -> None:
    for mine, other in zip(actual.parameters, expected.parameters, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(mine, other)
    for name, tensor in expected.balancer.state_tensors().items():
        mine = actual.balancer.state_tensors()[name]
        torch.testing.assert_close(mine, tensor, rtol=0, atol=0, equal_nan=True, msg=name)
    assert actual.balancer.num_calls == expected.balancer.num_calls


@pytest.mark.parametrize(
    ("options", "absent_in"),
    [
        ({}, None),
        (PUBLISHED, 3),
        ({"update_every": 2, "head_weighting": "task_weights"}, None),
        ({**PUBLISHED, "update_every": 2}, None),
    ],
    ids=["defaults", "absent", "weighted heads", "applied weights"],
)
def test_compiled_steps_are_the_ordinary_ones(
    options: dict[str, Any], absent_in: int | None
) -> None:
    plain, compiled = Training(**options), Training(**options)
    step = compiled.compiled()
    data = batches(7, absent_in)
    histories = [each.balancer.record_history() for each in (plain, compiled)]
    for index, batch in enumerate(data):
        if index % 3 == 0:  # else the step adds to what is there
            plain.optimizer.zero_grad()
            compiled.optimizer.zero_grad()
        expected = plain.ordinary(*batch)
        losses = step(*batch)
        if options.get("update_every") is None:
            assert torch.equal(losses.isnan(), expected.isnan())
            assert torch.equal(losses.nan_to_num(), expected.nan_to_num())
            assert_equal(compiled, plain)
        else:  # one pass from weighted losses rounds otherwise than the ordinary one
            torch.testing.assert_close(compiled.parameters, plain.parameters)
    assert step.is_compiled
    records = [history.records() for history in histories]
    assert torch.equal(records[0].steps, records[1].steps)
    assert torch.equal(records[0].is_present, records[1].is_present)
    compiled.balancer.backward(compiled.losses(*data[1]))  # an ordinary step may follow


def test_a_nan_is_skipped_and_the_optimizer_left_alone() -> None:
    training, data = Training(), batches(3)
    step = training.compiled()
    for batch in data:
        training.optimizer.zero_grad()
        step(*batch)
    before = [parameter.detach().clone() for parameter in training.parameters]
    inputs, targets = data[0]
    assert targets[1] is not None
    training.optimizer.zero_grad()
    step(inputs, [targets[0], targets[1] * float("nan"), targets[2]])
    assert all(map(torch.equal, before, training.parameters))
    assert training.balancer.num_skipped_steps.item() == 1
    assert step.is_compiled


def test_what_is_not_one_graph_runs_step_by_step_with_one_warning() -> None:
    plain, compiled = Training(), Training()
    losses_of = compiled.losses

    def losses(inputs: Tensor, targets: list[Tensor | None]) -> list[Tensor | None]:
        torch._dynamo.graph_break()
        return losses_of(inputs, targets)

    compiled.losses = losses  # type: ignore[method-assign]
    step = compiled.compiled()
    data = batches(4)
    with pytest.warns(RuntimeWarning, match="cannot be one compiled graph") as told:
        for batch in data:
            plain.optimizer.zero_grad()
            compiled.optimizer.zero_grad()
            plain.ordinary(*batch)
            step(*batch)
    assert len(told) == 1
    assert not step.is_compiled
    assert_equal(compiled, plain)


def test_an_older_torch_runs_step_by_step_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, compiled = Training(), Training()
    monkeypatch.setattr(compiled_step, "can_trace", lambda: False)
    step = compiled.compiled()
    with pytest.warns(RuntimeWarning, match="cannot trace one") as told:
        for batch in batches(3):
            plain.ordinary(*batch)
            step(*batch)
    assert len(told) == 1
    assert_equal(compiled, plain)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"tasks_per_step": 1}, "tasks_per_step"),
        ({"estimate_from": "features"}, "estimate_from"),
        ({"nonfinite": "raise"}, "nonfinite='skip'"),
        ({"batched": True}, "batched=False"),
    ],
)
def test_balancers_whose_steps_are_no_graph_are_refused_by_name(
    options: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=name):
        Training(**options).compiled()
