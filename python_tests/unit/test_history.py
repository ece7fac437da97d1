"""The history sees every step, changes none of them, and brings them to the host in one copy per flush."""

from __future__ import annotations

import copy
import csv
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _asserts import assert_equal_bits, never_waiting_for_the_gpu
from _inputs import Problem, make_problem
from _published import published
from torch import Tensor

from excessmtl_ext import (
    IMTL,
    MGDA,
    Balancer,
    ExcessMTL,
    GradNorm,
    GroupDRO,
    SingleTask,
    Uniform,
    history_writers,
)
from excessmtl_ext.gradient_statistics import GRADIENT_MEMORY
from excessmtl_ext.history import CSVWriter, HistoryRecords, TensorBoardWriter
from excessmtl_ext.skips import SkipGuard

STATE = ["task_weights", "excess_risk", "relative_excess_risk", "baseline_excess_risk"]


def train(problem: Problem, balancer: Balancer, num_steps: int) -> None:
    optimizer = torch.optim.SGD(problem.parameters(), lr=0.05)
    for _ in range(num_steps):
        problem.zero_grad()
        balancer.backward(problem.losses())
        optimizer.step()


def make(method: type[Balancer], problem: Problem, **options: object) -> Balancer:
    if method is SingleTask:
        options["task"] = 1
    return method(problem.encoder.parameters(), num_tasks=3, **options)  # type: ignore[arg-type]


METHODS = [ExcessMTL, Uniform, GroupDRO, GradNorm, MGDA, SingleTask]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_recording_changes_no_bit(method: type[Balancer]) -> None:
    results = []
    for is_recorded in (False, True):
        problem = make_problem()
        balancer = make(method, problem)
        if is_recorded:
            balancer.record_history(gradients=True, flush_every=3)
        train(problem, balancer, 7)
        results.append(
            [*problem.parameters(), *problem.grads(), *balancer.state_tensors().values()]
        )
    assert_equal_bits(*results)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_recording_changes_no_bit_of_a_streamed_step(momentum: float) -> None:
    results = []
    for is_recorded in (False, True):
        problem = make_problem()
        balancer = make(published, problem, gradient_momentum=momentum)
        if is_recorded:
            balancer.record_history(gradients=True, flush_every=3)
        for _ in range(4):
            for task, loss in enumerate(problem.losses()):
                balancer.accumulate(task, loss, retain_graph=True)
            balancer.finish()
        results.append([*problem.grads(), *balancer.state_tensors().values()])
    assert_equal_bits(*results)


def test_state_dict_is_the_same_with_a_history() -> None:
    problem = make_problem()
    balancer = make(published, problem)
    names = set(balancer.state_dict())
    balancer.record_history(gradients=True)
    train(problem, balancer, 2)
    assert set(balancer.state_dict()) == names
    assert copy.deepcopy(balancer).history is None


@pytest.mark.parametrize("flush_every", [1, 4, 100])
def test_records_are_the_states_after_each_step(flush_every: int) -> None:
    problem = make_problem()
    balancer = make(published, problem)
    history = balancer.record_history(flush_every=flush_every)
    expected: dict[str, list[Tensor]] = {name: [] for name in STATE}
    for _ in range(9):
        train(problem, balancer, 1)
        for name in STATE:
            expected[name].append(getattr(balancer, name).clone())
    records = history.records()
    assert records.steps.tolist() == list(range(1, 10))
    assert_equal_bits(
        [records.values[name] for name in STATE], [torch.stack(expected[name]) for name in STATE]
    )
    assert set(records.values) == {*STATE, "found_nonfinite"}


def test_every_third_call_is_recorded_and_the_oldest_are_dropped() -> None:
    problem = make_problem()
    balancer = make(Uniform, problem)
    history = balancer.record_history(every=3, flush_every=2, keep=3)
    train(problem, balancer, 16)
    assert history.records().steps.tolist() == [10, 13, 16]
    assert history.num_steps == 16


def test_every_verb_is_a_step() -> None:
    problem = make_problem()
    balancer = make(published, problem)
    history = balancer.record_history()
    balancer.backward(problem.losses())
    balancer(problem.losses()).backward()
    balancer.accumulate(2, problem.losses()[2])
    balancer.finish()
    balancer.update_weights([[torch.ones_like(p) for p in problem.encoder.parameters()], [], []])
    records = history.records()
    assert records.steps.tolist() == [1, 2, 3, 4]
    assert records.is_present.int().tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 1], [1, 0, 0]]
    assert history.num_absent_steps == [1, 2, 1]


def test_a_flush_is_one_transfer_and_a_step_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever would wait for a GPU goes through one of these.
    calls: list[str] = []
    problem = make_problem()
    balancer = make(published, problem)
    # Of a counter that lies on a GPU the guard starts a copy every five calls, and waits for none.
    balancer.observers = [each for each in balancer.observers if not isinstance(each, SkipGuard)]
    balancer.record_history(flush_every=4, gradients=True)
    train(problem, balancer, 1)
    losses = [problem.losses() for _ in range(7)]
    for name in ("cpu", "item", "tolist", "__bool__", "__float__", "__int__", "numpy"):
        original = getattr(Tensor, name)

        def spy(
            self: Tensor, *args: object, name: str = name, original: object = original
        ) -> object:
            calls.append(name)
            return original(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(Tensor, name, spy)
    to = Tensor.to

    def spy_to(self: Tensor, *args: object, **options: object) -> Tensor:
        if args[:1] == ("cpu",):
            calls.append("to cpu")
        return to(self, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Tensor, "to", spy_to)
    for step in losses:
        balancer.backward(step)
    monkeypatch.undo()
    assert calls == ["to cpu"] * 2


def test_gradient_norms_and_cosines_are_those_of_the_gradients() -> None:
    problem = make_problem(dtype=torch.float64)
    shared = list(problem.encoder.parameters())
    balancer = make(published, problem, robust_step_size=0.5)
    history = balancer.record_history(gradients=True)
    expected = []
    for _ in range(3):
        grads = [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)])
            for loss in problem.losses()
        ]
        train(problem, balancer, 1)
        combined = torch.cat([p.grad.flatten() for p in shared])  # type: ignore[union-attr]
        expected.append(
            [[g.norm(), torch.nn.functional.cosine_similarity(g, combined, dim=0)] for g in grads]
        )
    records = history.records()
    values = torch.stack([records.values["gradient_norm"], records.values["cosine"]], dim=2)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))


def test_a_loss_scale_is_undone() -> None:
    rows = []
    for scale in (None, 1024.0):
        problem = make_problem()
        balancer = make(published, problem)
        history = balancer.record_history(gradients=True)
        for _ in range(3):
            balancer.backward(problem.losses(), grad_scale=scale)
        values = history.records().values
        rows.append(torch.stack([values["gradient_norm"], values["noise_share"], values["cosine"]]))
    torch.testing.assert_close(rows[1], rows[0], equal_nan=True)


def feed(gradients: Tensor, **options: float) -> HistoryRecords:
    """Records what a balancer of one parameter makes of [N, T, P] gradients."""
    balancer = published(num_tasks=gradients.shape[1], **options)  # type: ignore[arg-type]
    history = balancer.record_history(gradients=True)
    for step in gradients:
        balancer.update_weights(step)
    return history.records()


@pytest.mark.parametrize("momentum", [0.0, 0.95])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_noise_share_is_the_share_of_variance(share: float, momentum: float) -> None:
    num_params = 4000
    signal = torch.ones(num_params, dtype=torch.float64)
    noise = torch.randn(80, 1, num_params, dtype=torch.float64)
    gradients = math.sqrt(1 - share) * signal + math.sqrt(share) * noise
    shares = feed(gradients, gradient_momentum=momentum).values["noise_share"][:, 0]
    assert shares[0].isnan()
    # Without the correction by q pure noise would begin at 0.5. The rest is chance: 80 draws of 4,000 numbers.
    assert shares[1:].sub(share).abs().max() < 0.05


def test_noise_share_by_hand() -> None:
    # Gradients 1, then 3: m = (b + 3) / (1 + b), mean of squares (b + 9) / (1 + b), q = (1 + b^2) / (1 + b)^2.
    b = GRADIENT_MEMORY
    mean, mean_sq, q = (b + 3) / (1 + b), (b + 9) / (1 + b), (1 + b * b) / (1 + b) ** 2
    records = feed(torch.tensor([1.0, 3.0], dtype=torch.float64).reshape(2, 1, 1))
    expected = (1 - mean**2 / mean_sq) / (1 - q)
    assert records.values["noise_share"][1, 0].item() == pytest.approx(expected, rel=1e-9)


def test_an_absent_task_keeps_its_statistics_and_has_no_gradient() -> None:
    balancer = published(num_tasks=2)
    history = balancer.record_history(gradients=True)
    one, two = torch.ones(3), torch.full((3,), 2.0)
    for grads in ([[one], [two]], [[one], [-two]], [[one], []], [[one], [two]]):
        balancer.update_weights(grads)
    values = history.records().values
    assert values["gradient_norm"][:, 1].isnan().tolist() == [False, False, True, False]
    assert values["cosine"][:, 1].isnan().tolist() == [False, False, True, False]
    assert values["noise_share"][2, 1] == values["noise_share"][1, 1]
    assert values["noise_share"][2, 0] == pytest.approx(0.0, abs=1e-6)  # of a float32 mean


def test_a_non_finite_step_is_counted_and_leaves_the_statistics_alone() -> None:
    balancer = published(num_tasks=2)
    history = balancer.record_history(gradients=True)
    good, bad = (
        [[torch.ones(3)], [torch.ones(3)]],
        [[torch.ones(3)], [torch.full((3,), float("inf"))]],
    )
    for grads in (good, good, bad, good):
        balancer.update_weights(grads)
    records = history.records()
    assert records.is_skipped.tolist() == [False, False, True, False]
    assert history.num_nonfinite_steps() == [0, 1]
    assert records.values["gradient_norm"][2].isnan().tolist() == [False, True]
    assert records.values["noise_share"][3].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_a_step_that_raises_is_not_recorded_and_spoils_nothing() -> None:
    balancer = published(num_tasks=1, nonfinite="raise")
    history = balancer.record_history(gradients=True)
    with pytest.raises(FloatingPointError):
        balancer.update_weights([[torch.tensor([float("nan")])]])
    balancer.update_weights([[torch.tensor([2.0])]])
    records = history.records()
    assert records.steps.tolist() == [1]
    assert records.values["gradient_norm"].tolist() == [[2.0]]


def test_streaming_has_norms_and_noise_but_no_cosine() -> None:
    rows = {}
    for is_streamed in (False, True):
        problem = make_problem()
        balancer = make(published, problem)
        history = balancer.record_history(gradients=True)
        for _ in range(3):
            if is_streamed:
                for task, loss in enumerate(problem.losses()):
                    balancer.accumulate(task, loss, retain_graph=True)
                balancer.finish()
            else:
                balancer.backward(problem.losses())
        rows[is_streamed] = history.records().values
    for name in ("gradient_norm", "noise_share"):
        # One task's squares are summed in another order than the Gramian's; shares near 0 are differences of 1s.
        torch.testing.assert_close(
            rows[True][name], rows[False][name], rtol=1e-5, atol=1e-6, equal_nan=True
        )
    assert rows[True]["cosine"].isnan().all()
    assert not rows[False]["cosine"].isnan().any()


@pytest.mark.parametrize("method", [Uniform, GroupDRO], ids=lambda method: method.__name__)
def test_a_method_without_task_gradients_has_none_to_record(method: type[Balancer]) -> None:
    problem = make_problem()
    balancer = make(method, problem)
    history = balancer.record_history(gradients=True)
    train(problem, balancer, 2)
    assert history.records().values["gradient_norm"].isnan().all()


def test_csv_holds_every_record_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "new" / "history.csv"
    problem = make_problem()
    balancer = make(published, problem)
    names = ["depth", "normals", "edges"]
    with balancer.record_history(flush_every=2, task_names=names, writers=[CSVWriter(path)]):
        train(problem, balancer, 3)

    resumed = make(published, problem)
    resumed.load_state_dict(balancer.state_dict())
    with pytest.raises(FileExistsError, match="append=True"):
        CSVWriter(path)
    with resumed.record_history(
        task_names=names, writers=[CSVWriter(path, append=True)]
    ) as history:
        train(problem, resumed, 2)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5"]
    last = history.records().values["task_weights"][-1]
    for name, weight in zip(names, last.tolist(), strict=True):
        assert float(rows[-1][f"balancer/{name}_weight"]) == pytest.approx(weight, rel=1e-8)
    assert {row["balancer/skipped"] for row in rows} == {"0"}


@pytest.mark.parametrize("lost", range(0, 200, 7))
def test_csv_cut_anywhere_by_a_kill_has_every_record_once_after_a_resume(
    tmp_path: Path, lost: int
) -> None:
    """Also half a header, and rows of steps after the checkpoint, which the resumed training makes again."""
    whole, cut = tmp_path / "whole.csv", tmp_path / "cut.csv"
    problem = make_problem()
    balancer = make(published, problem)
    names = ["a", "b", "c"]
    writers = [CSVWriter(whole), CSVWriter(cut)]
    with balancer.record_history(flush_every=2, task_names=names, writers=writers):
        train(problem, balancer, 3)
        state = balancer.state_dict()
        train(problem, balancer, 3)
    content = whole.read_bytes()
    ends = [index for index, letter in enumerate(content) if letter == 10]
    # From within the header to within the last row; never more than what the checkpoint had.
    size = ends[3] + 1 + lost * (len(content) - ends[3]) // 200
    cut.write_bytes(content[:size])
    resumed = make(published, problem)
    resumed.load_state_dict(state)
    with resumed.record_history(task_names=names, writers=[CSVWriter(cut, append=True)]):
        train(problem, resumed, 3)
    assert read_steps(cut) == [1, 2, 3, 4, 5, 6]


def read_steps(path: Path) -> list[int]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(None not in row and None not in row.values() for row in rows)
    return [int(row["step"]) for row in rows]


@pytest.mark.parametrize("size", [0, 1, 10, 60])
def test_half_a_header_is_written_anew(tmp_path: Path, size: int) -> None:
    whole, cut = tmp_path / "whole.csv", tmp_path / "cut.csv"
    problem = make_problem()
    balancer = make(published, problem)
    with balancer.record_history(writers=[CSVWriter(whole)]):
        train(problem, balancer, 1)
    problem = make_problem()
    cut.write_bytes(whole.read_bytes()[:size])
    balancer = make(published, problem)
    with balancer.record_history(writers=[CSVWriter(cut, append=True)]):
        train(problem, balancer, 1)
    assert cut.read_bytes() == whole.read_bytes()


def test_a_reset_begins_anew_behind_the_rows_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    problem = make_problem()
    balancer = make(published, problem)
    with balancer.record_history(writers=[CSVWriter(path)]):
        train(problem, balancer, 3)
        balancer.reset()
        train(problem, balancer, 2)
        state = balancer.state_dict()
        train(problem, balancer, 1)
    resumed = make(published, problem)
    resumed.load_state_dict(state)
    with resumed.record_history(writers=[CSVWriter(path, append=True)]):
        train(problem, resumed, 2)
    assert read_steps(path) == [1, 2, 3, 1, 2, 3, 4]


class FailingWriter:
    """Raises at some of its calls, before it takes anything."""

    def __init__(self, *fails_at: int) -> None:
        self.fails_at = fails_at
        self.num_calls = 0
        self.steps: list[int] = []
        self.is_closed = False

    def write(self, records: HistoryRecords) -> None:
        self.num_calls += 1
        if self.num_calls in self.fails_at:
            raise OSError(f"call {self.num_calls}")
        self.steps += records.steps.tolist()

    def close(self) -> None:
        self.is_closed = True
        if 0 in self.fails_at:
            raise OSError("closing")


def test_a_writer_that_fails_keeps_no_record_from_the_others_and_gets_its_own_later() -> None:
    problem = make_problem()
    balancer = make(published, problem)
    failing, sound = FailingWriter(1, 2), FailingWriter()
    history = balancer.record_history(flush_every=2, writers=[failing, sound])
    train(problem, balancer, 1)
    with pytest.raises(OSError, match="call 1"):
        train(problem, balancer, 1)
    assert (failing.steps, sound.steps) == ([], [1, 2])
    with pytest.raises(OSError, match="call 2"):
        history.flush()
    train(problem, balancer, 3)
    history.close()
    assert failing.steps == sound.steps == [1, 2, 3, 4, 5]
    assert failing.is_closed
    assert sound.is_closed


def test_every_writer_is_closed_where_one_fails() -> None:
    problem = make_problem()
    balancer = make(published, problem)
    writers = [FailingWriter(1), FailingWriter(0), FailingWriter()]
    history = balancer.record_history(writers=writers)
    train(problem, balancer, 1)
    with pytest.raises(OSError, match="closing"):
        history.close()
    assert all(writer.is_closed for writer in writers)
    assert history.is_closed


def test_a_full_disk_leaves_whole_rows_and_no_record_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "history.csv"
    problem = make_problem()
    balancer = make(published, problem)
    history = balancer.record_history(flush_every=2, writers=[CSVWriter(path)])
    train(problem, balancer, 3)
    ordinary = history_writers._as_csv

    def half(rows: Any) -> bytes:
        content = ordinary(rows)
        with path.open("ab") as file:  # what a full disk has taken
            file.write(content[: len(content) // 2])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(history_writers, "_as_csv", half)
        with pytest.raises(OSError, match="No space left"):
            train(problem, balancer, 1)
    train(problem, balancer, 2)
    history.close()
    assert read_steps(path) == [1, 2, 3, 4, 5, 6]


def test_csv_of_another_balancer_is_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    path.write_text("step,balancer/a_weight\n1,1\n")
    problem = make_problem()
    balancer = make(Uniform, problem)
    history = balancer.record_history(writers=[CSVWriter(path, append=True)])
    train(problem, balancer, 1)
    with pytest.raises(ValueError, match="other tasks or quantities"):
        history.flush()


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    problem = make_problem()
    balancer = make(published, problem)
    writer = TensorBoardWriter(tmp_path)
    with balancer.record_history(flush_every=2, gradients=True, writers=[writer]) as history:
        train(problem, balancer, 3)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    weights = events.Scalars("balancer/task1_weight")
    assert [event.step for event in weights] == [1, 2, 3]
    expected = history.records().values["task_weights"][:, 1].tolist()
    assert [event.value for event in weights] == pytest.approx(expected, rel=1e-6)
    # NaN is left out: the noise share begins with the second gradient.
    assert [event.step for event in events.Scalars("balancer/task0_noise_share")] == [2, 3]


def test_without_tensorboard_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        TensorBoardWriter(tmp_path)


def test_a_second_history_under_way_is_refused() -> None:
    balancer = Uniform(num_tasks=2)
    history = balancer.record_history()
    with pytest.raises(RuntimeError, match=r"Call history.close\(\) first"):
        balancer.record_history()
    history.close()
    history.close()  # again does nothing
    assert balancer.record_history() is balancer.history


@pytest.mark.parametrize("names", [["a"], ["a", "a"]])
def test_task_names_must_tell_tasks_apart(names: list[str]) -> None:
    with pytest.raises(ValueError, match="2 different names"):
        Uniform(num_tasks=2).record_history(task_names=names)


def test_reset_begins_a_new_record() -> None:
    balancer = published(num_tasks=1)
    history = balancer.record_history(gradients=True)
    balancer.update_weights([[torch.ones(3)]])
    balancer.reset()
    balancer.update_weights([[torch.ones(5)]])  # another size: the running mean begins anew as well
    assert history.records().steps.tolist() == [1]


def test_imtl_is_recorded_too() -> None:
    pytest.importorskip("torchjd", reason="torchjd is not installed")
    problem = make_problem()
    balancer = make(IMTL, problem)
    history = balancer.record_history(gradients=True)
    train(problem, balancer, 2)
    assert history.records().values["cosine"].isfinite().all()


def test_nothing_waits_for_the_gpu_between_flushes() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    problem = make_problem()
    problem.encoder.cuda()
    problem.heads.cuda()
    problem.inputs, problem.targets = problem.inputs.cuda(), problem.targets.cuda()
    balancer = make(published, problem)
    history = balancer.record_history(gradients=True, flush_every=100)
    train(problem, balancer, 2)
    losses = problem.losses()
    with never_waiting_for_the_gpu():
        balancer.backward([losses[0], None, losses[2]])
    assert history.records().is_present[2].tolist() == [True, False, True]
