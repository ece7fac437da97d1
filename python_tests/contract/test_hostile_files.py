"""Files of runs that are truncated, flipped or made to harm: an error that names them, and nothing is executed."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _inputs import make_problem
from _published import published
from _sweeps import write_sweep
from matplotlib.figure import Figure

from excessmtl_ext.training import TrainConfig, TrainingInterrupted, train
from excessmtl_ext.training.pictures import report
from excessmtl_ext.training.pictures.paper import draw_paper_figures
from excessmtl_ext.training.pictures.report import read_content, render
from excessmtl_ext.training.pictures.runs import read_run
from excessmtl_ext.training.run.files import read_table
from excessmtl_ext.training.sweep.results import read_finished_run, read_results

NUM_MUTATIONS = 60

CONFIG = TrainConfig(
    dataset="digits",
    method="excessmtl-recommended",
    epochs=2,
    batch_size=50,
    lr=1e-3,
    num_train=100,
)


class RunsCode:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


# ---- the files of a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(CONFIG, folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resume(folder: Path) -> None:
    train(dataclasses.replace(CONFIG, epochs=3), folder, resume=True)


def test_a_damaged_checkpoint_is_always_an_error(run: Path) -> None:
    """Also a single flipped bit of a tensor, which torch itself does not notice."""
    path = run / "checkpoint.pt"
    content = path.read_bytes()
    weights = torch.load(path, weights_only=True)["model"]["encoder.1.weight"]
    flipped = bytearray(content)
    flipped[content.index(weights.numpy().tobytes()) + 1000] ^= 1
    draw = random.Random(0)
    damaged = [bytes(flipped)] + [content[: draw.randrange(len(content))] for _ in range(20)]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"Expected {path} to be a checkpoint.*Delete the folder"
        ):
            resume(run)


def test_a_checkpoint_that_would_run_code_does_not(run: Path, tmp_path: Path) -> None:
    path = run / "checkpoint.pt"
    for number, hostile in enumerate(
        (RunsCode(tmp_path / "0"), {"version": RunsCode(tmp_path / "1")})
    ):
        torch.save(hostile, path)
        with pytest.raises(ValueError, match=f"Expected {path} to be a checkpoint") as caught:
            resume(run)
        assert "weights_only" not in str(caught.value)  # torch's advice is to switch it off
        assert not (tmp_path / str(number)).exists()
    path.write_bytes(pickle.dumps(RunsCode(tmp_path / "2")))
    with pytest.raises(ValueError, match=f"Expected {path} to be a checkpoint"):
        resume(run)
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize("rows", [{"../outside.csv": 0}, {"metrics.csv": -1}, ["metrics.csv"]])
def test_a_checkpoint_names_no_file_outside_its_folder(run: Path, rows: Any) -> None:
    outside = run.parent / "outside.csv"
    outside.write_text("precious\nrows\n")
    path = run / "checkpoint.pt"
    torch.save({**torch.load(path, weights_only=True), "num_rows": rows}, path)
    with pytest.raises(ValueError, match=f"Expected {path} to count the rows of metrics.csv"):
        resume(run)
    assert outside.read_text() == "precious\nrows\n"


def test_a_checkpoint_without_its_entries_or_of_another_model_is_an_error(run: Path) -> None:
    path = run / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    for name in ("step", "model", "optimizer", "balancer", "cpu_generator", "weight_rows"):
        torch.save({key: value for key, value in checkpoint.items() if key != name}, path)
        with pytest.raises(
            ValueError, match=rf"the checkpoint in {run} to hold the state.*'{name}'"
        ):
            resume(run)
    model = {name: tensor[:1] for name, tensor in checkpoint["model"].items()}
    torch.save({**checkpoint, "model": model}, path)
    with pytest.raises(
        ValueError, match=rf"the checkpoint in {run} to hold the state.*size mismatch"
    ):
        resume(run)


def error_of(read: Callable[[Path], Any], folder: Path) -> str | None:
    try:
        read(folder)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


def read_all(folder: Path) -> None:
    """Everything that reads a finished run, drawings included."""
    read_run(folder)
    render(read_content(folder))
    read_finished_run(folder)
    resume(folder)


RUN_FILES = (
    "config.json",
    "environment.json",
    "metrics.json",
    "metrics.csv",
    "task_weights.csv",
    "times.csv",
)


@pytest.mark.parametrize("file", RUN_FILES)
def test_a_damaged_file_of_a_run_is_an_error_that_names_it(run: Path, file: str) -> None:
    path = run / file
    content = path.read_bytes()
    for damaged in (
        content[: len(content) // 2],
        b"\xff\xfe" + content,
        b"[" * 100_000,
        b"[1]",
        b"{}",
        content.replace(b",", b",,"),
        b"",
    ):
        path.write_bytes(damaged)
        error = error_of(read_all, run)
        assert error is not None, f"{damaged[:40]!r} was read by all"
        assert str(path) in error or "checkpoint" in error, error
    path.unlink()
    path.mkdir()
    assert str(run) in str(error_of(read_all, run))


WRONG_VALUES = (None, True, -1, 0, 10**400, 1.5, float("nan"), "text", "", [], [1], {}, {"a": 1})


def changed_values(content: Any, draw: random.Random) -> Any:
    """A copy in which one value, somewhere, is of another type or size, or one entry is gone."""
    copy = json.loads(json.dumps(content))
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            places.append((value, key))
            if isinstance(value[key], dict | list):
                collect(value[key])

    collect(copy)
    container, key = draw.choice(places)
    if draw.random() < 0.25:
        del container[key]
    else:
        container[key] = draw.choice(WRONG_VALUES)
    return copy


def changed_cells(content: str, draw: random.Random) -> str:
    """A copy of a table in which one cell holds something else, or a line or a column is gone or there twice."""
    rows = [line.split(",") for line in content.splitlines()]
    row, column = draw.randrange(len(rows)), draw.randrange(len(rows[0]))
    kind = draw.randrange(4)
    if kind == 0:
        del rows[row]
    elif kind == 1:
        rows = [[cell for number, cell in enumerate(each) if number != column] for each in rows]
    elif kind == 2:
        rows.insert(row, rows[row])
    else:
        rows[row][column] = draw.choice(["nan", "inf", "-1", "0", "x", "", "1e400", '"', "1.5"])
    return "".join(",".join(each) + "\n" for each in rows)


def damaged_copies(path: Path, number: int) -> list[str]:
    draw = random.Random(path.name)
    text = path.read_text()
    if path.suffix == ".csv":
        return [changed_cells(text, draw) for _ in range(number)]
    return [json.dumps(changed_values(json.loads(text), draw)) for _ in range(number)]


@pytest.mark.parametrize("file", RUN_FILES)
def test_a_value_of_another_kind_in_a_file_of_a_run_is_read_or_an_error_that_names_it(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    # Drawing takes a second and meets the values as they are read.
    monkeypatch.setattr(report, "draw_curves", lambda run: str([run.weights, run.epochs]))
    num_errors = 0
    for number, damaged in enumerate(damaged_copies(finished / file, NUM_MUTATIONS)):
        folder = Path(shutil.copytree(finished, tmp_path / str(number)))
        (folder / file).write_text(damaged)
        for read in (read_run, lambda f: render(read_content(f)), read_finished_run, check_resume):
            error = error_of(read, folder)
            num_errors += error is not None
            assert error is None or str(folder) in error, error
    assert num_errors > NUM_MUTATIONS // 6


def check_resume(folder: Path) -> None:
    config = dataclasses.replace(CONFIG, epochs=3)
    with pytest.raises(TrainingInterrupted):
        train(config, folder, resume=True, should_stop=lambda: True)


def test_a_damaged_table_says_after_which_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    for damaged in (
        "epoch,loss\n1,0.5\n2\n",
        "epoch,loss\n1,0.5\n2,x\n",
        "epoch,loss\n1,0.5\n2,3,4\n",
    ):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=rf"Expected {path} to be a table .*after line [23] "):
            read_table(path)


SWEEP_FILES = ("sweep.json", "results.csv", "epochs.csv")


@pytest.mark.parametrize("file", SWEEP_FILES)
def test_a_damaged_file_of_a_sweep_is_an_error_that_names_it(tmp_path: Path, file: str) -> None:
    folder = write_sweep(tmp_path / "sweep", "multimnist", ["uniform"])
    read_results(folder)
    content = (folder / file).read_text()
    for damaged in (
        content[: len(content) // 2 + 3] + "\0,",
        content + "digits,uniform,,zero,,,,0\n{",
        "",
    ):
        (folder / file).write_text(damaged)
        with pytest.raises(ValueError, match=f"Expected {folder / file} to be"):
            read_results(folder)


@pytest.mark.parametrize("file", SWEEP_FILES)
@pytest.mark.slow
def test_a_value_of_another_kind_in_a_file_of_a_sweep_is_drawn_or_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setattr(
        Figure, "savefig", lambda *_, **__: None
    )  # the drawing itself takes a second
    methods = ["uniform", "excessmtl-official", "single-task"]
    whole = write_sweep(tmp_path / "whole", "multimnist", methods, num_seeds=1)
    num_errors = 0
    for number, damaged in enumerate(damaged_copies(whole / file, NUM_MUTATIONS)):
        folder = Path(shutil.copytree(whole, tmp_path / str(number)))
        (folder / file).write_text(damaged)

        def draw(folder: Path) -> None:
            draw_paper_figures(
                [read_results(folder)], folder / "figures", draw_toy=lambda path: None
            )

        error = error_of(draw, folder)
        num_errors += error is not None
        assert error is None or str(folder / file) in error or "epochs.csv" in error, error
    assert num_errors > NUM_MUTATIONS // 6


# ---- the state of a balancer


def test_a_damaged_balancer_state_is_refused_and_nothing_is_taken_over() -> None:
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3)
    for _ in range(2):
        balancer.backward(problem.losses())
    good = balancer.state_dict()
    before = {name: tensor.clone() for name, tensor in balancer.state_tensors().items()}
    nan = torch.full((3,), float("nan"), dtype=torch.float64)
    for change, message in (
        ({"task_weights": nan}, "`task_weights` without NaN"),
        ({"sq_grad_sum": good["sq_grad_sum"] * float("nan")}, "`sq_grad_sum` without NaN"),
        ({"num_steps": "many"}, "`num_steps` to be a tensor, but got str"),
        ({"_extra_state": None}, "`_extra_state` of a balancer"),
        ({"_extra_state": {"version": "new"}}, "`_extra_state` of a balancer"),
        ({"_extra_state": [1, 2]}, "`_extra_state` of a balancer"),
    ):
        with pytest.raises(RuntimeError, match=message):
            balancer.load_state_dict({**good, **change})
        for name, tensor in balancer.state_tensors().items():
            assert torch.equal(tensor, before[name]), name
    balancer.load_state_dict(good)
