"""A trial trains every method on every kind of data, by the seed, and reports what the tables need."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _datasets import write_human_ratings

from excessmtl_ext import Uniform
from excessmtl_ext.data import load_human_ratings
from excessmtl_ext.training.benchmark.datasets import Dataset, builtin_datasets, find_datasets
from excessmtl_ext.training.benchmark.methods import BUDGET, METHODS, Method, find_methods
from excessmtl_ext.training.benchmark.trial import Trial, run_trial

DIGITS = replace(builtin_datasets()["digits"], quick=(256, 2))


def digits(method: str = "uniform", **changes: Any) -> Trial:
    fields = {"dataset": "digits", "dose": "80%", "method": method, "setting": 0, "seed": 0}
    return Trial(**{**fields, "is_quick": True, **changes})


@pytest.mark.parametrize("key", METHODS)
def test_every_method_trains(key: str) -> None:
    method = METHODS[key]
    if reason := method.missing():
        pytest.skip(reason)
    result = run_trial(digits(key), DIGITS, method)
    assert len(result["epochs"]) == 2
    last = result["epochs"][-1]
    assert last["scores"].keys() == {"test", "validation", "observed"}
    for scores in (*last["scores"].values(), last["metrics"]):
        assert scores.keys() == {"top_left", "bottom_right"}
        assert all(math.isfinite(value) for value in scores.values())
    # Each task alone: two runs, each with all the weight.
    assert sum(last["weights"].values()) == pytest.approx(2.0 if method.is_single_task else 1.0)
    assert result["num_steps"] - result["skipped_steps"] > 0
    assert result["step_ms"] > 0
    assert result["cpu_ms"] > 0
    assert result["noise_shares"]["bottom_right"] == pytest.approx(0.72, abs=0.1)


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in ("step_ms", "cpu_ms")}


def test_a_seed_decides_everything_but_the_time() -> None:
    first, again, other = (
        without_times(run_trial(digits(seed=seed), DIGITS, METHODS["uniform"]))
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first["epochs"] != other["epochs"]


def test_methods_start_from_the_same_parameters_and_batches() -> None:
    """Fixed weights, the first draw of which are uniform, train exactly as Uniform does."""
    one, other = (run_trial(digits(key), DIGITS, METHODS[key]) for key in ("uniform", "fixed"))
    for mine, theirs in zip(one["epochs"], other["epochs"], strict=True):
        assert mine["metrics"] == pytest.approx(theirs["metrics"], abs=0.02)


class Recorder(Uniform):
    """Keeps what a method with the two hooks is told."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.after: list[torch.Tensor] = []
        self.means: list[torch.Tensor] = []

    def after_step(self, losses: torch.Tensor) -> None:
        self.after.append(losses)

    def end_epoch(self, mean_losses: torch.Tensor) -> None:
        self.means.append(mean_losses)


def test_hooks_of_a_method_get_the_losses_of_the_batch_and_of_the_epoch() -> None:
    made: list[Recorder] = []

    def build(shared: list[torch.Tensor], **options: Any) -> Recorder:
        made.append(Recorder(shared, **options))
        return made[-1]

    result = run_trial(digits(), replace(DIGITS, batch_size=64), Method("own", "Own", build))
    (recorder,) = made
    assert len(recorder.after) == result["num_steps"] == 8
    assert [each.shape for each in recorder.means] == [(2,), (2,)]
    assert float(recorder.means[1].sum()) < float(recorder.means[0].sum())
    # After a step the same batch is fitted better than the epoch's mean before it.
    assert float(recorder.after[-1].sum()) < float(recorder.means[0].sum())


def test_a_stop_ends_a_trial_between_steps() -> None:
    answers = iter([False, False, True])
    with pytest.raises(InterruptedError):
        run_trial(
            digits(),
            replace(DIGITS, batch_size=64),
            METHODS["uniform"],
            should_stop=lambda: next(answers),
        )


def test_real_doses_give_observed_validation_labels(tmp_path: Path) -> None:
    root = write_human_ratings(tmp_path)
    known = builtin_datasets()["human-ratings"]
    dataset = Dataset(
        "rated", "Rated", lambda **options: load_human_ratings(root, **options), known.build_model,
        doses={"one": {"raters": 1}}, epochs=1, batch_size=8, quick=(1_000, 1),
    )  # fmt: skip
    trial = Trial("rated", "one", "uniform", 0, 0, is_quick=True)
    result = run_trial(trial, dataset, METHODS["uniform"])
    scores = result["epochs"][0]["scores"]
    assert scores["observed"] != scores["validation"]
    assert result["num_train"] == 42  # the largest domain's; fewer than the quick run asks for


def test_names_of_trials_tell_them_apart() -> None:
    trials = [
        digits(), digits(seed=1), digits(setting=1), digits(dose="none"),
        digits("mgda"), digits(dataset="qm9"),
    ]  # fmt: skip
    assert len({trial.name for trial in trials}) == len(trials)


OWN_METHOD = """
from excessmtl_ext import GroupDRO
from excessmtl_ext.training.benchmark.methods import Method

METHODS = [Method("fast-dro", "Fast DRO", GroupDRO, [{"robust_step_size": 0.5}])]
"""


def test_a_file_adds_a_method(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN_METHOD)
    methods = find_methods(["uniform", str(path)])
    assert list(methods) == ["uniform", "fast-dro"]
    result = run_trial(digits("fast-dro"), DIGITS, methods["fast-dro"])
    assert result["setting"] == {"robust_step_size": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("METHODS = []", r"mine\.py to give METHODS, a list of Method, but got list"),
        ("METHODS = [1]", r"a list of Method"),
        ("x = 1", r"but got NoneType"),
        ("1 / 0", r"mine\.py to run, but it raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_that_gives_no_methods_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        find_methods([str(path)])


def test_unknown_names_are_named() -> None:
    with pytest.raises(ValueError, match=r"Expected each of `methods` .* but got 'unifrom'"):
        find_methods(["unifrom"])
    with pytest.raises(ValueError, match=r"Expected each of `datasets` .* but got 'mnist'"):
        find_datasets(["mnist"])
    with pytest.raises(ValueError, match=r"a Python file at nowhere\.py, but there is none"):
        find_datasets(["nowhere.py"])
    assert list(find_datasets([])) == list(builtin_datasets())


def test_every_method_has_the_same_budget() -> None:
    assert all(1 <= len(method.settings) <= BUDGET for method in METHODS.values())
    with pytest.raises(ValueError, match=r"from 1 to 5 `settings` of method 'greedy'.* got 6"):
        Method("greedy", "Greedy", Uniform, [{}] * 6)
