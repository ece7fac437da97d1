"""A run's folder: refuses to mix runs, survives a crash, replaces nobody else's files, says where the run was made."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from excessmtl_ext.training import RunRecord, TrainConfig, train
from excessmtl_ext.training.run.record import REPLACED, best_epoch, describe_environment

CONFIG: dict[str, Any] = {
    "dataset": "digits",
    "method": "uniform",
    "epochs": 3,
    "batch_size": 8,
    "noise": 0.0,
    "seed": 0,
    "task": None,
    "data_root": None,
    "lr": 0.1,
}
RUN = TrainConfig(
    dataset="digits", method="uniform", epochs=1, batch_size=50, lr=1e-3, num_train=100
)


def begin(folder: Path, config: dict[str, Any] = CONFIG, *, resume: bool = False) -> RunRecord:
    record = RunRecord(folder, config, resume=resume)
    record.begin()
    return record


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_a_new_run_leaves_config_and_environment(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    assert json.loads((tmp_path / "run/config.json").read_text()) == CONFIG
    (session,) = json.loads((tmp_path / "run/environment.json").read_text())["sessions"]
    assert {"commit", "is_dirty", "versions", "device", "device_name"} <= session.keys()
    assert session["versions"]["torch"] == torch.__version__


def test_a_record_writes_nothing_before_it_begins(tmp_path: Path) -> None:
    RunRecord(tmp_path / "run", CONFIG)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    begin(tmp_path)
    before = content_of(tmp_path)
    with pytest.raises(FileExistsError, match=r"holds one already\. Pass --resume"):
        RunRecord(tmp_path, CONFIG)
    assert content_of(tmp_path) == before


def test_a_run_of_another_config_is_refused_even_with_resume(tmp_path: Path) -> None:
    begin(tmp_path)
    before = content_of(tmp_path)
    with pytest.raises(ValueError, match=r"`lr`: 0.1 there, 0.2 here; `method`: 'uniform' there"):
        RunRecord(tmp_path, {**CONFIG, "lr": 0.2, "method": "groupdro"}, resume=True)
    assert content_of(tmp_path) == before


def test_a_resumed_run_may_be_longer_and_read_its_data_elsewhere(tmp_path: Path) -> None:
    begin(tmp_path)
    longer = {**CONFIG, "epochs": 5, "data_root": "/elsewhere"}
    begin(tmp_path, longer, resume=True)
    assert json.loads((tmp_path / "config.json").read_text()) == longer


def test_a_config_is_compared_as_json_gives_it_back(tmp_path: Path) -> None:
    config = {**CONFIG, "method_options": {"sizes": (1, 2)}}
    begin(tmp_path, config)
    begin(tmp_path, config, resume=True)


def test_resume_in_an_empty_folder_starts_a_run(tmp_path: Path) -> None:
    assert RunRecord(tmp_path, CONFIG, resume=True).checkpoint is None


def test_rows_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    record = begin(tmp_path)
    record.append("metrics.csv", ["epoch", "step"], [[1, 0.5]])
    record.save_checkpoint({"step": 1, "weights": torch.ones(2)})
    saved = (tmp_path / "metrics.csv").read_bytes()
    record.append("metrics.csv", ["epoch", "step"], [[2, 0.25]])
    record.append("times.csv", ["epoch"], [[1]])  # which the checkpoint does not know
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("3,0.1")  # a kill in the middle of a line

    resumed = begin(tmp_path, resume=True)
    assert (tmp_path / "metrics.csv").read_bytes() == saved == b"epoch,step\n1,0.5\n"
    assert not (tmp_path / "times.csv").exists()
    assert resumed.checkpoint is not None
    assert resumed.checkpoint["step"] == 1
    assert resumed.checkpoint["weights"].tolist() == [1.0, 1.0]
    assert resumed.read_metrics() == [{"epoch": 1.0, "step": 0.5}]
    assert len(json.loads((tmp_path / "environment.json").read_text())["sessions"]) == 2
    resumed.append("times.csv", ["epoch"], [[1]])
    assert (tmp_path / "times.csv").read_text() == "epoch\n1\n"


def test_rows_are_read_as_they_will_be_kept_before_the_run_begins(tmp_path: Path) -> None:
    record = begin(tmp_path)
    record.append("metrics.csv", ["epoch", "step"], [[1, 4]])
    record.save_checkpoint({"step": 4})
    record.append("metrics.csv", ["epoch", "step"], [[2, 8]])
    resumed = RunRecord(tmp_path, CONFIG, resume=True)
    assert resumed.last_row(1, "step") == {"epoch": 1.0, "step": 4.0}
    with pytest.raises(ValueError, match=r"a row of each of 2 finished epochs, but got .*\[1.0\]"):
        resumed.last_row(2, "step")
    with pytest.raises(ValueError, match="a column validation/mean_score"):
        resumed.last_row(1, "validation/mean_score")


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    record = begin(tmp_path)
    record.save_checkpoint({"step": 1})
    with pytest.raises(Exception, match=r"pickle|local object"):  # the latter from Python 3.13 on
        record.save_checkpoint({"step": 2, "not savable": lambda: None})
    resumed = RunRecord(tmp_path, CONFIG, resume=True)
    assert resumed.checkpoint is not None
    assert resumed.checkpoint["step"] == 1


@pytest.mark.parametrize("content", [b"", b"half a file", None], ids=["empty", "junk", "pickle"])
def test_an_unreadable_checkpoint_is_an_error_that_names_it(
    tmp_path: Path, content: bytes | None
) -> None:
    begin(tmp_path)
    path = tmp_path / "checkpoint.pt"
    if content is None:
        torch.save({"version": 1, "code": print}, path)  # weights_only refuses functions
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"Expected {path} to be a checkpoint.*cannot be read"):
        RunRecord(tmp_path, CONFIG, resume=True)


def test_a_checkpoint_of_another_version_is_an_error(tmp_path: Path) -> None:
    begin(tmp_path)
    torch.save({"version": 99}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"Expected version 2 in .*, but got 99"):
        RunRecord(tmp_path, CONFIG, resume=True)


def test_missing_rows_are_an_error(tmp_path: Path) -> None:
    record = begin(tmp_path)
    record.append("metrics.csv", ["epoch"], [[1], [2]])
    record.save_checkpoint({"step": 2})
    (tmp_path / "metrics.csv").write_text("epoch\n1\n")
    with pytest.raises(
        ValueError, match="to have the 2 rows that its checkpoint counts, but got 1"
    ):
        RunRecord(tmp_path, CONFIG, resume=True)


@pytest.mark.parametrize("name", ["checkpoint.pt", "best_model.pt"])
@pytest.mark.parametrize("damage", ["lost", "cut off", "a folder"])
def test_a_lost_checkpoint_or_best_model_is_an_error_and_changes_nothing(
    tmp_path: Path, name: str, damage: str
) -> None:
    train(RUN, tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "a folder":
        path.mkdir()
    before = content_of(tmp_path)
    with pytest.raises(ValueError, match=f"Expected {path}"):
        train(RUN, tmp_path, resume=True)
    with pytest.raises(ValueError, match=f"Expected {path}"):
        train(dataclasses.replace(RUN, epochs=2), tmp_path, resume=True)
    assert content_of(tmp_path) == before


# ---- the files of others


def write_file(path: Path) -> None:
    path.write_text("precious\n")


def write_folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("precious\n")


def write_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "nothing")


@pytest.mark.parametrize("resume", [False, True], ids=["new", "resumed"])
@pytest.mark.parametrize("write", [write_file, write_folder, write_dangling_link])
@pytest.mark.parametrize("name", REPLACED)
def test_a_folder_with_a_file_of_somebody_else_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, write: Callable[[Path], None], resume: bool
) -> None:
    write(tmp_path / name)
    before = sorted(tmp_path.rglob("*")), content_of(tmp_path)
    with pytest.raises(
        FileExistsError, match=rf"{tmp_path} holds {name} and no config\.json.*name another folder"
    ):
        train(RUN, tmp_path, resume=resume)
    assert (sorted(tmp_path.rglob("*")), content_of(tmp_path)) == before


@pytest.mark.parametrize(
    "content", ['{"model_type": "bert"}', "not json", "[1]", '{"dataset": 1, "method": "m"}']
)
def test_the_config_of_another_program_is_refused_before_anything_is_written(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "config.json").write_text(content)
    before = content_of(tmp_path)
    with pytest.raises(FileExistsError, match="holds one already"):
        train(RUN, tmp_path)
    with pytest.raises(ValueError, match=f"Expected {tmp_path / 'config.json'} to"):
        train(RUN, tmp_path, resume=True)
    assert content_of(tmp_path) == before


def test_files_of_other_names_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious\n")
    (tmp_path / "checkpoint.pt.tmp").write_text("precious\n")
    train(RUN, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "precious\n"
    assert (tmp_path / "checkpoint.pt.tmp").read_text() == "precious\n"


@pytest.mark.parametrize("name", ["metrics.csv", "config.json", "checkpoint.pt", "run.lock"])
@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str, kind: str) -> None:
    """Replacing such a file is harmless; what is added to it must not reach the other name."""
    folder, outside = tmp_path / "run", tmp_path / "outside"
    train(RUN, folder)
    path = folder / name
    path.rename(outside)
    if kind == "symbolic":
        path.symlink_to(outside)
    else:
        path.hardlink_to(outside)
    before = outside.read_bytes()
    if name == "run.lock":
        with pytest.raises(OSError, match=f"Expected {path} to be a file of this folder alone"):
            train(dataclasses.replace(RUN, epochs=2), folder, resume=True)
    else:
        train(dataclasses.replace(RUN, epochs=2), folder, resume=True)
    assert outside.read_bytes() == before


# ---- what is selected


def test_the_best_epoch_is_the_first_of_the_highest_finite_scores() -> None:
    nan, inf = math.nan, math.inf

    def selected(*scores: float) -> float | None:
        rows = [{"epoch": number, "s": score} for number, score in enumerate(scores, start=1)]
        best = best_epoch(rows, "s")
        return None if best is None else best["epoch"]

    assert selected(nan, 0.5) == 2
    assert selected(0.5, nan) == 1
    assert selected(nan, -inf, 0.1, nan, 0.1) == 3
    assert selected(inf, -2.0) == 2
    assert selected(nan, inf) is None
    assert selected() is None


def test_environment_of_the_cpu_names_the_processor() -> None:
    environment = describe_environment("cpu")
    assert environment["device_name"]
    json.dumps(environment)
