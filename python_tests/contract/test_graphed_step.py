"""A graphed step takes the steps of an ordinary loop; on the CPU a stub records the operations and replays them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from _recorded_graph import RecordedGraphs
from torch import Tensor, nn

from excessmtl_ext import MGDA, ExcessMTL, GraphedStep, GroupDRO, Uniform, graphed_step
from excessmtl_ext.engines import exact

NUM_TASKS = 3
Batch = tuple[Tensor, list[Tensor | None]]


class Training:
    """A small network with its balancer, optimizer and step; ``graphed`` runs it by recorded graphs."""

    def __init__(self, method: Any = ExcessMTL, *, lr: Any = 0.01, **options: Any) -> None:
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6))
        self.heads = nn.ModuleList([nn.Linear(6, 1) for _ in range(NUM_TASKS)])
        self.balancer = method(self.encoder.parameters(), num_tasks=NUM_TASKS, **options)
        self.parameters = [*self.encoder.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, fused=True, capturable=True)
        self.num_python_calls = 0
        self.reads_values = False

    def step(self, batch: Batch) -> dict[str, Tensor]:
        self.num_python_calls += 1
        inputs, targets = batch
        features = self.encoder(inputs)
        losses: list[Tensor | None] = [
            None if target is None else (head(features)[:, 0] - target).square().mean()
            for head, target in zip(self.heads, targets, strict=True)
        ]
        if self.reads_values and losses[0] is not None:
            losses[0] = losses[0] * losses[0].item()
        self.optimizer.zero_grad()
        self.balancer.backward(losses)
        self.optimizer.step()
        return {"loss": torch.stack([loss.detach() for loss in losses if loss is not None]).sum()}

    def state(self) -> list[Tensor]:
        of_optimizer = [
            value
            for values in self.optimizer.state.values()
            for value in values.values()
            if isinstance(value, Tensor)
        ]
        return [*self.parameters, *self.balancer.state_tensors().values(), *of_optimizer]

    def graphed(
        self, monkeypatch: pytest.MonkeyPatch, example: Batch, **options: Any
    ) -> GraphedStep:
        self.graphs = RecordedGraphs(self.state)
        monkeypatch.setattr(graphed_step, "graphs_for", lambda device: self.graphs)
        monkeypatch.setattr(exact, "can_read", lambda tensor: False)  # as on a GPU
        return GraphedStep(self.step, example, self.balancer, self.optimizer, **options)


def batches(number: int, present: Sequence[Sequence[int]] = ((0, 1, 2),)) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    made: list[Batch] = []
    for index in range(number):
        tasks = present[index % len(present)]
        inputs = torch.randn(12, 5, generator=generator)
        targets = torch.randn(NUM_TASKS, 12, generator=generator)
        made.append((inputs, [targets[t] if t in tasks else None for t in range(NUM_TASKS)]))
    return made


def ordinary_step(training: Training, batch: Batch) -> Tensor:
    """A step of a loop without graphs, which skips the optimizer where the balancer skips."""
    optimizer: Any = training.optimizer
    handle = optimizer.register_step_pre_hook(
        lambda *_: setattr(optimizer, "found_inf", training.balancer.found_nonfinite.any().float())
    )
    loss = training.step(batch)["loss"]
    handle.remove()
    return loss


def assert_equal_states(actual: Training, expected: Training) -> None:
    torch.testing.assert_close(actual.state(), expected.state(), rtol=0, atol=0, equal_nan=True)
    assert actual.balancer.num_calls == expected.balancer.num_calls


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (ExcessMTL, {}),
        (ExcessMTL, {"robust_step_size": 1.0, "combine": "sum", "gradient_momentum": 0.0}),
        (ExcessMTL, {"head_weighting": "task_weights"}),
        (GroupDRO, {}),
        (Uniform, {}),
    ],
)
def test_replays_are_the_steps_of_an_ordinary_loop(
    method: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, graphed = Training(method, **options), Training(method, **options)
    data = batches(9)
    step = graphed.graphed(monkeypatch, data[0])
    for batch in data:
        expected = ordinary_step(plain, batch)
        assert torch.equal(step(batch)["loss"], expected)
        assert_equal_states(graphed, plain)
        for mine, other in zip(graphed.parameters, plain.parameters, strict=True):
            assert mine.grad is not None
            assert torch.equal(mine.grad, other.grad)
    assert (graphed.graphs.num_captures, graphed.graphs.num_replays) == (1, 6)
    assert graphed.num_python_calls == 4  # three ordinary steps and the capture


def test_each_pattern_of_present_tasks_has_a_graph_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, graphed = Training(), Training()
    data = batches(16, present=((0, 1, 2), (0, 2)))
    small: Batch = (data[0][0][:4], [None if y is None else y[:4] for y in data[0][1]])
    step = graphed.graphed(monkeypatch, data[0], num_warmup_steps=2)
    for batch in [*data, small]:
        expected = ordinary_step(plain, batch)
        assert torch.equal(step(batch)["loss"], expected)
    assert_equal_states(graphed, plain)
    assert step.num_graphs == 2
    assert graphed.graphs.num_replays == 2 * (8 - 2)
    assert (
        plain.balancer.num_task_steps.tolist()
        == graphed.balancer.num_task_steps.tolist()
        == [17, 9, 17]
    )


def test_a_step_with_a_nan_is_skipped_in_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    training, data = Training(), batches(6)
    step = training.graphed(monkeypatch, data[0])
    for batch in data[:5]:
        step(batch)
    before = [parameter.detach().clone() for parameter in training.parameters]
    bad = data[5][1][1]
    assert bad is not None
    bad[3] = float("nan")
    step(data[5])
    assert all(map(torch.equal, before, training.parameters))
    assert training.balancer.num_skipped_steps.item() == 1
    step(data[0])
    assert not any(map(torch.equal, before, training.parameters))
    assert not hasattr(training.optimizer, "found_inf")


def test_a_history_and_the_watchers_see_every_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, graphed = Training(), Training()
    histories = [training.balancer.record_history(every=2) for training in (plain, graphed)]
    data = batches(8)
    step = graphed.graphed(monkeypatch, data[0])
    for batch in data:
        ordinary_step(plain, batch)
        step(batch)
    expected, actual = (history.records() for history in histories)
    assert torch.equal(actual.steps, expected.steps)
    assert torch.equal(actual.is_present, expected.is_present)
    for name, values in expected.values.items():
        torch.testing.assert_close(actual.values[name], values, rtol=0, atol=0, equal_nan=True)


def test_loaded_state_and_another_learning_rate_are_captured_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, graphed = Training(), Training()
    data = batches(24)
    step = graphed.graphed(monkeypatch, data[0])
    saved: list[Any] = []
    for index, batch in enumerate(data):
        if index == 6:
            saved = [
                copy.deepcopy(each.state_dict()) for each in (graphed.balancer, graphed.optimizer)
            ]
        if index == 12:
            for training in (plain, graphed):
                training.balancer.load_state_dict(saved[0])
                training.optimizer.load_state_dict(copy.deepcopy(saved[1]))
        if index == 18:
            for training in (plain, graphed):
                training.optimizer.param_groups[0]["lr"] = 0.002
        ordinary_step(plain, batch)
        step(batch)
        assert_equal_states(graphed, plain)
    assert graphed.graphs.num_captures == 3


def test_returned_tensors_are_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    training, data = Training(), batches(6)
    step = training.graphed(monkeypatch, data[0])
    losses = [step(batch)["loss"] for batch in data]
    assert len({float(loss) for loss in losses}) == 6


def test_a_step_that_reads_a_value_is_refused_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training, data = Training(), batches(4)
    step = training.graphed(monkeypatch, data[0], num_warmup_steps=1)
    step(data[0])
    before = [tensor.detach().clone() for tensor in training.state()]
    training.reads_values = True
    with pytest.raises(RuntimeError, match=r"`step_function` cannot be captured.*\.item\(\)"):
        step(data[1])
    torch.testing.assert_close(training.state(), before, rtol=0, atol=0)
    assert training.balancer.num_calls == 1
    training.reads_values = False
    step(data[1])
    assert training.balancer.num_calls == 2


def test_a_step_of_another_balancer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    training, data = Training(), batches(2)
    other = ExcessMTL(training.encoder.parameters(), num_tasks=NUM_TASKS)
    monkeypatch.setattr(graphed_step, "graphs_for", lambda device: RecordedGraphs(training.state))
    step = GraphedStep(training.step, data[0], other, training.optimizer, num_warmup_steps=1)
    step(data[0])
    with pytest.raises(RuntimeError, match="call the `balancer` that was given"):
        step(data[1])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"update_every": 2}, "update_every=1"),
        ({"tasks_per_step": 1}, "tasks_per_step=None"),
        ({"nonfinite": "raise"}, "nonfinite='skip'"),
        ({"batched": "auto"}, "batched=True, False or 'stacked'"),
        ({"method": MGDA}, "MGDA solves for them on the CPU"),
    ],
)
def test_balancers_that_cannot_be_captured_are_refused_by_name(
    options: dict[str, Any], name: str
) -> None:
    training = Training(**options)
    with pytest.raises(ValueError, match=name):
        GraphedStep(training.step, batches(1)[0], training.balancer, training.optimizer)


def test_gradient_statistics_and_open_steps_are_refused_when_they_begin() -> None:
    training, data = Training(), batches(1)
    step = GraphedStep(training.step, data[0], training.balancer, training.optimizer)
    with (
        training.balancer.record_history(gradients=True),
        pytest.raises(ValueError, match=r"record_history\(gradients=False\)"),
    ):
        step(data[0])
    step(data[0])
    training.balancer.accumulate(0, training.encoder(data[0][0]).sum())
    with pytest.raises(ValueError, match="no streamed step under way"):
        step(data[0])


def test_optimizers_that_cannot_be_captured_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training, data = Training(), batches(1)
    plain = torch.optim.Adam(training.parameters)
    with pytest.raises(ValueError, match="fused=True"):
        GraphedStep(training.step, data[0], training.balancer, plain)
    training.optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(ValueError, match="without hooks of its step"):
        GraphedStep(training.step, data[0], training.balancer, training.optimizer)
    on_host = torch.optim.Adam(training.parameters, fused=True)
    monkeypatch.setattr(graphed_step, "graphs_for", lambda device: RecordedGraphs(training.state))
    with pytest.raises(ValueError, match="capturable=True"):
        GraphedStep(training.step, data[0], training.balancer, on_host)


def test_wrong_types_are_errors() -> None:
    training, data = Training(), batches(1)
    arguments = [training.step, data[0], training.balancer, training.optimizer]
    for index, name in ((0, "step_function"), (2, "balancer"), (3, "optimizer")):
        wrong: list[Any] = list(arguments)
        wrong[index] = 1
        with pytest.raises(TypeError, match=f"`{name}`"):
            GraphedStep(*wrong)
    with pytest.raises(TypeError, match="tensors and constants"):
        GraphedStep(training.step, [{1, 2}], training.balancer, training.optimizer)


def test_a_call_within_autocast_is_refused() -> None:
    training, data = Training(), batches(1)
    step = GraphedStep(training.step, data[0], training.balancer, training.optimizer)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(RuntimeError, match="autocast within `step_function`"),
    ):
        step(data[0])


def test_without_a_gpu_steps_are_ordinary() -> None:
    plain, graphed = Training(), Training()
    data = batches(5)
    step = GraphedStep(graphed.step, data[0], graphed.balancer, graphed.optimizer)
    for batch in data:
        assert torch.equal(step(batch)["loss"], ordinary_step(plain, batch))
    assert_equal_states(graphed, plain)
    assert (step.num_graphs, graphed.num_python_calls) == (0, 5)
