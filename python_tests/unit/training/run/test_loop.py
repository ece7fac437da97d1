"""Training runs: what they write, and that an interrupted run ends with the bytes of an undisturbed one."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from excessmtl_ext.training import METHODS, Progress, TrainConfig, TrainingInterrupted, train
from excessmtl_ext.training.pictures.report import read_content
from excessmtl_ext.training.run import loop
from excessmtl_ext.training.run.record import read_table

# 500 samples in batches of 64: 8 steps an epoch, the last one smaller. Interval 3 does not divide 8.
CONFIG = TrainConfig(
    dataset="digits",
    method="excessmtl-recommended",
    epochs=3,
    batch_size=64,
    lr=1e-3,
    noise=0.8,
    num_train=500,
    task_weight_interval=3,
)
COMPARED = ("metrics.csv", "task_weights.csv", "metrics.json", "config.json")


def read(folder: Path, names: tuple[str, ...] = COMPARED) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def stop_after(num_steps: int) -> Callable[[], bool]:
    calls = iter(range(10**9))
    return lambda: next(calls) >= num_steps


def same_state(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_state(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same_state, first, second))
    return first == second


@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_at_any_step_ends_with_the_same_bytes(tmp_path: Path, method: str) -> None:
    task = "top_left" if METHODS[method].requires_task else None
    config = dataclasses.replace(CONFIG, method=method, task=task)
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    train(config, undisturbed)
    # Before the first step, within an epoch, at the end of one, right before the last step.
    per_epoch = 7 if method == "moml" else 8  # which trains on 400 of the 500 samples
    for num_steps in (0, 5, per_epoch - 5, per_epoch, per_epoch - 1):
        with pytest.raises(TrainingInterrupted):
            train(config, stopped, resume=True, should_stop=stop_after(num_steps))
    train(config, stopped, resume=True)
    assert read(undisturbed) == read(stopped)
    first, second = (
        torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (undisturbed, stopped)
    )
    del first["seconds"], second["seconds"]
    assert same_state(first, second)


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    train(CONFIG, undisturbed)
    with pytest.raises(TrainingInterrupted):
        train(CONFIG, killed, should_stop=stop_after(9))
    shutil.copy(killed / "checkpoint.pt", tmp_path)
    with pytest.raises(TrainingInterrupted):
        train(CONFIG, killed, resume=True, should_stop=stop_after(10))
    # As if the machine had died after step 19: rows are there that the last checkpoint does not know.
    shutil.copy(tmp_path / "checkpoint.pt", killed)
    train(CONFIG, killed, resume=True)
    assert read(undisturbed) == read(killed)


def test_equal_configs_give_equal_bytes_and_seeds_differ(tmp_path: Path) -> None:
    train(CONFIG, tmp_path / "first")
    torch.rand(3)
    train(CONFIG, tmp_path / "second")
    train(dataclasses.replace(CONFIG, seed=1), tmp_path / "other")
    assert read(tmp_path / "first") == read(tmp_path / "second")
    assert read(tmp_path / "first")["metrics.csv"] != read(tmp_path / "other")["metrics.csv"]


def test_a_run_leaves_the_callers_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(dataclasses.replace(CONFIG, epochs=1), tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path: Path) -> None:
    train(CONFIG, tmp_path / "long")
    train(dataclasses.replace(CONFIG, epochs=1), tmp_path / "extended")
    train(CONFIG, tmp_path / "extended", resume=True)
    assert read(tmp_path / "long") == read(tmp_path / "extended")
    with pytest.raises(ValueError, match=r"Expected `epochs` of at least 3.*but got 2"):
        train(dataclasses.replace(CONFIG, epochs=2), tmp_path / "extended", resume=True)


def test_a_run_writes_what_was_promised(tmp_path: Path) -> None:
    reported: list[Progress] = []
    result = train(CONFIG, tmp_path, report=reported.append)

    config = json.loads((tmp_path / "config.json").read_text())
    assert config.keys() >= {field.name for field in dataclasses.fields(TrainConfig)}
    assert config["robust_step_size"] is None  # bounded moves have none
    assert config["balancer"].startswith("ExcessMTL(num_tasks=2, robust_step_size=None")

    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for split, metric in (("train", "loss"), ("validation", "accuracy"), ("test", "accuracy")):
        for task in ("top_left", "bottom_right"):
            assert f"{split}/{task}_{metric}" in rows[0]

    with (tmp_path / "task_weights.csv").open() as file:
        weights = list(csv.DictReader(file))
    assert [int(row["step"]) for row in weights] == [3, 6, 9, 12, 15, 18, 21, 24]
    for row in weights:
        assert float(row["top_left"]) + float(row["bottom_right"]) == pytest.approx(1, abs=1e-8)

    assert result == json.loads((tmp_path / "metrics.json").read_text())
    best = max(float(row["validation/mean_score"]) for row in rows)
    assert result["selected"]["validation/mean_score"] == best
    assert result["final"]["epoch"] == 3
    assert result["noisy_tasks"] == ["bottom_right"]
    assert sum(result["final_task_weights"].values()) == pytest.approx(1)

    assert [progress.step for progress in reported if progress.latest] >= [8]
    assert (reported[0].step, reported[-1].step) == (0, 24)
    assert {progress.num_steps for progress in reported} == {24}

    best_model = torch.load(tmp_path / "best_model.pt", weights_only=True)
    assert best_model["epoch"] == result["selected"]["epoch"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_non_finite_step_changes_no_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary_losses = loop.task_losses
    calls = iter(range(10**9))

    def losses_with_a_nan(*args: Any) -> list[torch.Tensor]:
        first, second = ordinary_losses(*args)
        return [first * float("nan") if next(calls) == 4 else first, second]

    monkeypatch.setattr(loop, "task_losses", losses_with_a_nan)
    result = train(dataclasses.replace(CONFIG, method="excessmtl-official"), tmp_path)
    assert result["num_skipped_steps"] == 1
    assert all(value == value for value in result["final"].values())
    assert result["final"]["validation/top_left_accuracy"] > 0.2


def test_a_diverged_run_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary_losses = loop.task_losses
    monkeypatch.setattr(
        loop, "task_losses", lambda *args: [loss * float("inf") for loss in ordinary_losses(*args)]
    )
    with pytest.raises(FloatingPointError, match=r"no step of epoch 1 had any.*smaller --lr"):
        train(CONFIG, tmp_path)


def test_an_unknown_data_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected `dataset` to be one of multimnist, .*digits"):
        train(dataclasses.replace(CONFIG, dataset="cifar"), tmp_path)


def test_a_device_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    for device in ("abacus", "meta", "mps", "cpu:1", "", "cuda:-1", "cuda:x"):
        with pytest.raises(ValueError, match="Expected `device` such as cpu"):
            train(dataclasses.replace(CONFIG, device=device), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"finds no CUDA device\. Pass --device cpu"):
            train(dataclasses.replace(CONFIG, device="cuda"), tmp_path)


def test_resume_on_cuda_ends_with_the_same_bytes(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    config = dataclasses.replace(CONFIG, device="cuda")
    train(config, tmp_path / "undisturbed")
    with pytest.raises(TrainingInterrupted):
        train(config, tmp_path / "stopped", should_stop=stop_after(11))
    train(config, tmp_path / "stopped", resume=True)
    assert read(tmp_path / "undisturbed") == read(tmp_path / "stopped")


def test_epochs_tell_the_weights_and_the_risks(tmp_path: Path) -> None:
    config = dataclasses.replace(
        CONFIG, method="excessmtl-official", epochs=2, task_weight_interval=8
    )
    train(config, tmp_path / "run")
    rows = read_table(tmp_path / "run" / "metrics.csv")
    steps = read_table(tmp_path / "run" / "task_weights.csv")
    tasks = ("top_left", "bottom_right")
    for row, step in zip(rows, steps, strict=True):
        assert step["step"] == row["step"]
        for task in tasks:
            assert row[f"balancer/{task}_weight"] == pytest.approx(step[task])
            assert row[f"balancer/{task}_excess_risk"] > 0
            assert 0 < row[f"balancer/{task}_relative_excess_risk"] < 1
        # The mean is over the epoch, so it lies between the weights at its ends.
        means = [row[f"balancer/{task}_mean_weight"] for task in tasks]
        assert sum(means) == pytest.approx(1.0)
    before, after = (row["balancer/top_left_weight"] for row in rows)
    assert min(before, after) < rows[1]["balancer/top_left_mean_weight"] < max(before, after)


def test_worker_processes_do_not_change_the_numbers(tmp_path: Path) -> None:
    for workers in (0, 2):
        config = dataclasses.replace(CONFIG, epochs=1, num_workers=workers)
        train(config, tmp_path / str(workers))
    names = ("metrics.csv", "task_weights.csv")
    assert read(tmp_path / "0", names) == read(tmp_path / "2", names)


def test_a_nan_loss_costs_a_step_and_not_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = loop.task_losses, iter(range(10**9))

    def broken(*arguments: Any) -> list[torch.Tensor | None]:
        losses = honest(*arguments)
        return (
            [None if loss is None else loss * float("nan") for loss in losses]
            if next(calls) == 2
            else losses
        )

    monkeypatch.setattr(loop, "task_losses", broken)
    # Uniform looks at no gradient, so the loop has to.
    result = train(dataclasses.replace(CONFIG, method="uniform"), tmp_path / "run")
    assert result["num_skipped_steps"] == 1
    assert result["final"]["test/top_left_accuracy"] > 0.2


class _NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * float("nan")


@pytest.mark.parametrize("method", METHODS)
def test_a_nan_gradient_of_a_finite_loss_costs_a_step_under_every_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    honest, calls = loop.task_losses, iter(range(10**9))

    def broken(*arguments: Any) -> list[Any]:
        losses = honest(*arguments)
        if next(calls) == 2:
            losses[0] = _NaNGradient.apply(losses[0])
        return losses

    assert_one_skipped_step(broken, method, tmp_path, monkeypatch)


@pytest.mark.parametrize("method", ["excessmtl-recommended", "uniform"])
def test_a_nan_gradient_of_a_head_alone_costs_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    honest, calls = loop.task_losses, iter(range(10**9))
    hooks: list[Any] = []

    def broken(outputs: Any, *arguments: Any) -> list[Any]:
        for hook in hooks:
            hook.remove()
        if next(calls) == 2:
            bias = outputs[0].grad_fn.next_functions[0][0].variable
            hooks.append(bias.register_hook(lambda grad: grad * float("nan")))
        return honest(outputs, *arguments)

    assert_one_skipped_step(broken, method, tmp_path, monkeypatch)


def assert_one_skipped_step(
    losses: Callable[..., Any], method: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "task_losses", losses)
    task = "top_left" if METHODS[method].requires_task else None
    config = dataclasses.replace(CONFIG, method=method, task=task, epochs=1)
    assert train(config, folder)["num_skipped_steps"] == 1
    model = torch.load(folder / "best_model.pt", weights_only=True)["model"]
    assert all(bool(tensor.isfinite().all()) for tensor in model.values())


def test_a_method_with_held_out_batches_trains_on_the_rest(tmp_path: Path) -> None:
    train(dataclasses.replace(CONFIG, method="moml", epochs=1, batch_size=400), tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["num_train"] == 500
    # 400 of 500 remain: one step of 400.
    assert read_table(tmp_path / "run" / "metrics.csv")[0]["step"] == 1


def test_a_task_trained_alone_is_selected_by_its_own_score(tmp_path: Path) -> None:
    result = train(
        dataclasses.replace(CONFIG, method="single-task", task="bottom_right"), tmp_path / "run"
    )
    assert result["selection"] == "validation/bottom_right_score"
    assert result["final_task_weights"] == {"top_left": 0.0, "bottom_right": 1.0}


def evaluate_with(values: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts these validation scores in the place of those after an epoch, by its number."""
    ordinary, calls = loop.evaluate, iter(range(2, 10**9))

    def evaluate(*args: Any, **options: Any) -> dict[str, float]:
        metrics = ordinary(*args, **options)
        epoch, part = divmod(next(calls), 2)  # validation, then test
        return (
            {**metrics, "mean_score": values[epoch]} if part == 0 and epoch in values else metrics
        )

    monkeypatch.setattr(loop, "evaluate", evaluate)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_an_epoch_without_a_finite_score_is_never_selected_and_metrics_are_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: float, epoch: int
) -> None:
    evaluate_with({1: 0.3, 2: 0.2, 3: 0.1, epoch: score}, monkeypatch)
    result = train(CONFIG, tmp_path)

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = (tmp_path / "metrics.json").read_text()
    assert json.loads(text, parse_constant=no_constant) == result
    best = 2 if epoch == 1 else 1
    assert result["selected"]["epoch"] == best
    assert torch.load(tmp_path / "best_model.pt", weights_only=True)["epoch"] == best
    if epoch == 3:
        assert result["final"]["validation/mean_score"] is None
    report = read_content(tmp_path)
    assert report.selected["epoch"] == best
    again = train(CONFIG, tmp_path, resume=True)
    assert again == result


def test_a_run_without_any_finite_score_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = float("nan")
    evaluate_with({1: nan, 2: nan, 3: nan}, monkeypatch)
    with pytest.raises(FloatingPointError, match=r"finite validation/mean_score .* none of 3 has"):
        train(CONFIG, tmp_path)
    assert not (tmp_path / "metrics.json").exists()


def test_a_resume_that_is_refused_changes_no_file(tmp_path: Path) -> None:
    train(dataclasses.replace(CONFIG, epochs=2), tmp_path)

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    before = content()
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    with pytest.raises(ValueError, match="Expected `epochs` of at least 2"):
        train(dataclasses.replace(CONFIG, epochs=1), tmp_path, resume=True)
    with pytest.raises(ValueError, match="Expected the config of the run"):
        train(dataclasses.replace(CONFIG, seed=7), tmp_path, resume=True)
    assert content() == before
    sums = checkpoint["epoch_sums"]
    for change in (
        {"step": "many"},
        {"step": -1},
        {"best_score": None},
        {"best_score": float("nan")},
        {"num_finite_steps": 2.5},
        {"seconds": "long"},
        {"epoch_sums": sums[:, :1]},  # would be broadcast
        {"epoch_sums": sums.float()},
        {"weight_rows": [[3]]},
        {"weight_rows": [[3, torch.zeros(5)]]},
        {"model": {}},
        {"optimizer": {}},
        {"cpu_generator": torch.zeros(3)},
    ):
        torch.save({**checkpoint, **change}, tmp_path / "checkpoint.pt")
        changed = content()
        with pytest.raises(ValueError, match=f"the checkpoint in {tmp_path} to hold the state"):
            train(CONFIG, tmp_path, resume=True)
        assert content() == changed, change
