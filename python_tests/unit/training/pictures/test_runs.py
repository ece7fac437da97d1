"""Figures read a run's own files, and each method has one colour."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from excessmtl_ext.training.pictures.runs import draw_training, read_run


def write_run(folder: Path, method: str, score: float, task: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"method": method, "task": task}))
    tasks = [{"name": name, "kind": "regression", "is_noisy": name == "b"} for name in "ab"]
    (folder / "metrics.json").write_text(json.dumps({"tasks": tasks}))
    (folder / "metrics.csv").write_text(
        "epoch,step,test/a_score,test/b_score,test/mean_score\n"
        f"1,10,{score},0.2,0.3\n2,20,0.9,0.4,0.5\n"
    )
    (folder / "task_weights.csv").write_text("step,a,b\n5,0.6,0.6\n20,1.5,0.5\n")
    return folder


def test_curves_are_those_of_the_tables(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", "uniform", 0.7))
    assert run.epochs.tolist() == [1, 2]
    assert run.clean_score.tolist() == [0.7, 0.9]
    assert run.noisy_score.tolist() == [0.2, 0.4]
    np.testing.assert_allclose(run.weight_epochs, [0, 0.5, 2])
    np.testing.assert_allclose(run.clean_weight, [0.5, 0.5, 0.75])  # a share, whatever they sum to


def test_a_task_trained_alone_has_no_curve_of_the_others(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", "uniform", 0.7, task="a"))
    assert run.clean_score.tolist() == [0.7, 0.9]
    assert np.isnan(run.noisy_score).all()
    draw_training([run], tmp_path / "figure.png", title="")


def test_an_unfinished_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"Expected a finished run in {tmp_path}"):
        read_run(tmp_path)


def test_draws_a_png(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / f"{method}{accuracy}", method, accuracy))
        for method in ("uniform", "groupdro")
        for accuracy in (0.6, 0.7)
    ]
    path = tmp_path / "figures" / "figure.png"
    draw_training(runs, path, title="Two methods, two seeds")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = read_run(write_run(tmp_path / "run", "uniform", 0.7))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "\.\[train\]" in a clone'):
        draw_training([run], tmp_path / "figure.png", title="")
