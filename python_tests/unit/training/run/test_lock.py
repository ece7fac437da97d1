"""The lock of a folder of runs: who waits for whom, and a system without locks. Whole runs: test_hostile_files.py."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from excessmtl_ext.training.run import lock
from excessmtl_ext.training.run.lock import hold_folder


@contextmanager
def locked(folder: Path, holder: str) -> Iterator[None]:
    """As if ``holder`` had written its number, and somebody held the lock."""
    with (folder / "sweep.lock").open("a+") as file:
        file.write(holder)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def enter(folder: Path, announce: Callable[[str], None]) -> None:
    with hold_folder(folder, "sweep", announce):
        pass


def number_of_a_process_that_has_ended() -> str:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return str(process.pid)


def test_a_folder_of_a_living_process_is_refused_at_once(tmp_path: Path) -> None:
    lines: list[str] = []
    message = f"but process {os.getpid()} works there"
    with locked(tmp_path, f"{os.getpid()}\n"), pytest.raises(BlockingIOError, match=message):
        enter(tmp_path, lines.append)
    assert lines == []


def test_a_process_of_another_user_counts_as_living(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbidden)
    with locked(tmp_path, "1\n"), pytest.raises(BlockingIOError, match="process 1 works there"):
        enter(tmp_path, print)


@pytest.mark.parametrize("holder", ["ended", "", "99999999999999999999\n"])
def test_the_workers_of_a_killed_process_are_waited_for_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: str
) -> None:
    monkeypatch.setattr(lock, "SECONDS_TO_WAIT_FOR_LOST_CHILDREN", 0.5)
    lines: list[str] = []
    recorded = number_of_a_process_that_has_ended() if holder == "ended" else holder
    message = "workers of one that was killed still run"
    with locked(tmp_path, recorded), pytest.raises(BlockingIOError, match=message):
        enter(tmp_path, lines.append)
    assert lines == ["Waiting for the workers of a sweep that was killed."]
    enter(tmp_path, lines.append)
    assert (tmp_path / "sweep.lock").read_text() == f"{os.getpid()}\n"
    assert len(lines) == 1


def test_a_system_without_locks_runs_single_runs_and_refuses_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with hold_folder(tmp_path, "run", is_required=False) as lock:
        assert lock == -1
    with pytest.raises(ModuleNotFoundError, match="A sweep needs the file locks of Linux or macOS"):
        enter(tmp_path, print)
    assert list(tmp_path.iterdir()) == []
