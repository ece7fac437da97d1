"""A run's folder: refuses to mix runs, survives a crash, says where the run was made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from excessmtl_ext.training import RunRecord
from excessmtl_ext.training.run.record import describe_environment

CONFIG = {"method": "uniform", "epochs": 3, "data_root": None, "lr": 0.1}


def test_a_new_run_leaves_config_and_environment(tmp_path: Path) -> None:
    RunRecord(tmp_path / "run", CONFIG)
    assert json.loads((tmp_path / "run/config.json").read_text()) == CONFIG
    (session,) = json.loads((tmp_path / "run/environment.json").read_text())["sessions"]
    assert {"commit", "is_dirty", "versions", "device", "device_name"} <= session.keys()
    assert session["versions"]["torch"] == torch.__version__


def test_a_folder_with_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    RunRecord(tmp_path, CONFIG)
    with pytest.raises(FileExistsError, match=r"holds one already\. Pass --resume"):
        RunRecord(tmp_path, CONFIG)


def test_a_run_of_another_config_is_refused_even_with_resume(tmp_path: Path) -> None:
    RunRecord(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=r"`lr`: 0.1 there, 0.2 here; `method`: 'uniform' there"):
        RunRecord(tmp_path, {**CONFIG, "lr": 0.2, "method": "groupdro"}, resume=True)
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_a_resumed_run_may_be_longer_and_read_its_data_elsewhere(tmp_path: Path) -> None:
    RunRecord(tmp_path, CONFIG)
    longer = {**CONFIG, "epochs": 5, "data_root": "/elsewhere"}
    RunRecord(tmp_path, longer, resume=True)
    assert json.loads((tmp_path / "config.json").read_text()) == longer


def test_resume_in_an_empty_folder_starts_a_run(tmp_path: Path) -> None:
    assert RunRecord(tmp_path, CONFIG, resume=True).checkpoint is None


def test_rows_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, CONFIG)
    record.append("metrics.csv", ["epoch", "loss"], [[1, 0.5]])
    record.save_checkpoint({"step": 1, "weights": torch.ones(2)})
    saved = (tmp_path / "metrics.csv").read_bytes()
    record.append("metrics.csv", ["epoch", "loss"], [[2, 0.25]])
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("3,0.1")  # a kill in the middle of a line

    resumed = RunRecord(tmp_path, CONFIG, resume=True)
    assert (tmp_path / "metrics.csv").read_bytes() == saved == b"epoch,loss\n1,0.5\n"
    assert resumed.checkpoint is not None
    assert resumed.checkpoint["step"] == 1
    assert resumed.checkpoint["weights"].tolist() == [1.0, 1.0]
    assert resumed.read_metrics() == [{"epoch": 1.0, "loss": 0.5}]
    assert len(json.loads((tmp_path / "environment.json").read_text())["sessions"]) == 2


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, CONFIG)
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
    RunRecord(tmp_path, CONFIG)
    path = tmp_path / "checkpoint.pt"
    if content is None:
        torch.save({"version": 1, "code": print}, path)  # weights_only refuses functions
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"Expected {path} to be a checkpoint.*cannot be read"):
        RunRecord(tmp_path, CONFIG, resume=True)


def test_a_checkpoint_of_another_version_is_an_error(tmp_path: Path) -> None:
    RunRecord(tmp_path, CONFIG)
    torch.save({"version": 99}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"Expected version 2 in .*, but got 99"):
        RunRecord(tmp_path, CONFIG, resume=True)


def test_missing_rows_are_an_error(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, CONFIG)
    record.append("metrics.csv", ["epoch"], [[1], [2]])
    record.save_checkpoint({"step": 2})
    (tmp_path / "metrics.csv").write_text("epoch\n1\n")
    with pytest.raises(
        ValueError, match="to have the 2 rows that its checkpoint counts, but got 1"
    ):
        RunRecord(tmp_path, CONFIG, resume=True)


def test_environment_of_the_cpu_names_the_processor() -> None:
    environment = describe_environment("cpu")
    assert environment["device_name"]
    json.dumps(environment)
