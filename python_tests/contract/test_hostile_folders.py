"""Folders without room, read-only or in use, and sources that would unpack what they are given."""

from __future__ import annotations

import ast
import dataclasses
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
from _paths import ROOT
from _ranks import CONTEXT
from test_hostile_files import CONFIG

from excessmtl_ext.training import METHODS, TrainingInterrupted, train
from excessmtl_ext.training.run import loop

# ---- folders


def sizes_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


@pytest.mark.parametrize("method", METHODS)
def test_the_room_that_is_asked_for_is_what_a_run_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr(loop, "check_disk_space", lambda folder, sizes: asked.append(sizes))
    task = "top_left" if METHODS[method].requires_task else None
    train(dataclasses.replace(CONFIG, method=method, task=task, epochs=1), tmp_path)
    ((checkpoint, model, *_, tables),) = asked
    written = sizes_of(tmp_path)
    padding = 64 * 1024  # names and alignment of each tensor: part of what is asked for tables
    assert 0 < written["checkpoint.pt"] - checkpoint < padding
    assert 0 < written["best_model.pt"] - model < padding
    assert tables > 10 * padding


def train_with_limit(folder: str, num_bytes: int) -> None:
    """Files may have ``num_bytes`` each: what a full disk or a quota does, without a disk of its own."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    log = Path(f"{folder}.log")
    try:
        train(CONFIG, folder, report=lambda progress: log.write_text(f"step {progress.step}"))
    except OSError as error:
        log.write_text(str(error))
        sys.exit(1)


@pytest.mark.slow
def test_a_folder_without_room_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for num_bytes in (100_000, 100_000_000):
        process = CONTEXT.Process(target=train_with_limit, args=(str(folder), num_bytes))
        process.start()
        process.join()
        message = Path(f"{folder}.log").read_text()
        if num_bytes == 100_000:
            assert process.exitcode == 1
            assert message.startswith("Expected space for")
            assert f"in {folder}, which this run will write, but got: File too large" in message
            assert sizes_of(folder).keys() == {
                "run.lock"
            }  # once there is room the same command works
        else:
            assert (process.exitcode, message) == (0, "step 4")


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    folders = [file / "run", Path("/proc/excessmtl")]
    if os.geteuid() != 0:  # root may write anywhere
        folders.append(closed / "run")
    steps: list[int] = []
    for folder in folders:
        with pytest.raises(
            OSError, match="Expected `output` to be a folder that can be written to"
        ):
            train(CONFIG, folder, report=lambda progress: steps.append(progress.step))
    assert not steps


def test_a_disk_that_fills_up_later_leaves_the_last_checkpoint_and_no_fragment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingInterrupted):
        train(CONFIG, tmp_path, should_stop=iter([False, True]).__next__)
    saved = (tmp_path / "checkpoint.pt").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            train(CONFIG, tmp_path, resume=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved
    assert not list(tmp_path.glob("*.tmp"))
    train(CONFIG, tmp_path, resume=True)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    refused: list[str] = []

    def second(progress: Any) -> None:
        if progress.step == 1:
            for config in (CONFIG, dataclasses.replace(CONFIG, method="uniform")):
                with pytest.raises(BlockingIOError) as caught:
                    train(config, tmp_path, resume=True)
                refused.append(str(caught.value))

    train(CONFIG, tmp_path, report=second)
    assert (
        refused
        == [f"Expected no other run in {tmp_path}, but process {os.getpid()} works there."] * 2
    )
    train(dataclasses.replace(CONFIG, epochs=3), tmp_path, resume=True)  # free again


# ---- the sources


SOURCES = [
    path
    for folder in ("excessmtl_ext", "bench", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func)


def test_the_sources_are_there() -> None:
    assert len(SOURCES) > 60


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_unpickles_or_unpacks_a_file(path: Path) -> None:
    """So no download can write outside the data root: the package unpacks none."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call):
            continue
        name = name_of(call)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in ("torch.load", "torch.hub.load_state_dict_from_url"):
            default = "True" if name == "torch.load" else "False"
            assert given.get("weights_only", default) == "True", f"{path}:{call.lineno}"
        if name in ("np.load", "numpy.load"):
            assert given.get("allow_pickle", "False") == "False", f"{path}:{call.lineno}"
        last = name.rpartition(".")[2]
        assert last not in (
            "extractall",
            "extract",
            "unpack_archive",
            "Unpickler",
            "eval",
            "exec",
        ) or (name.startswith(("model.", "balancer."))), f"{path}:{call.lineno} {name}"
        assert name not in ("pickle.load", "pickle.loads", "marshal.loads", "shelve.open"), path
