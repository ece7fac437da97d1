"""A sweep runs its grid, survives what kills it, chooses step sizes, and reports what failed."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from excessmtl_ext.data import Task
from excessmtl_ext.training import TrainConfig, TrainingInterrupted, train
from excessmtl_ext.training.cli import main
from excessmtl_ext.training.sweep import jobs
from excessmtl_ext.training.sweep.cells import Cell, SweepConfig, grid_cells
from excessmtl_ext.training.sweep.jobs import SweepStatus
from excessmtl_ext.training.sweep.scheduler import SweepOutcome, best_step_size, run_sweep

TASKS = (Task("a", 10), Task("b", 10, is_noisy=True))
OPTIONS = ["--batch-size", "64", "--num-train", "300"]


def sweep_config(**values: Any) -> SweepConfig:
    defaults: dict[str, Any] = {
        "dataset": "digits",
        "methods": ("uniform",),
        "noise": (0.8,),
        "num_seeds": 1,
        "epochs": 1,
        "batch_size": 64,
        "lr": 1e-3,
        "weight_decay": 0.0,
        "num_train": 300,
        "jobs": 2,
    }
    return SweepConfig(**{**defaults, **values})


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_grid_has_every_cell_once_and_a_clean_task_alone_no_noise() -> None:
    config = sweep_config(methods=("uniform", "single-task"), noise=(0.0, 0.8), num_seeds=2)
    cells = grid_cells(config, TASKS)
    assert [(c.method, c.task, c.noise) for c in cells if c.seed == 0] == [
        ("uniform", None, 0.0),
        ("single-task", "a", 0.0),
        ("single-task", "b", 0.0),
        ("uniform", None, 0.8),
        ("single-task", "b", 0.8),
    ]
    assert len(cells) == 10
    assert len({cell.folder for cell in cells}) == 10


def test_the_step_size_with_the_best_mean_score_wins() -> None:
    def cells(step_size: float, *scores: float | None) -> dict[Cell, float | None]:
        return {
            Cell(f"{step_size}/{n}", "groupdro", n, 100, step_size=step_size): score
            for n, score in enumerate(scores)
        }

    assert best_step_size({**cells(0.1, 0.9, 0.5), **cells(1, 0.8, 0.7)}) == 1
    assert best_step_size({**cells(1, 0.7, 0.7), **cells(0.1, 0.8, 0.6)}) == 0.1  # the smallest
    assert best_step_size({**cells(0.1, 0.3, 0.3), **cells(1, 0.9, None)}) == 0.1  # 1 diverged
    assert best_step_size(cells(1, None, 0.9)) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ("adam",)}, "Expected `methods` of .*, but got adam"),
        ({"methods": ()}, "Expected `methods`"),
        ({"noise": (0.5, 0.5)}, "Expected `noise` without repetition"),
        ({"jobs": 0}, "Expected `jobs` from 1 to 256, but got 0"),
        ({"num_seeds": 10**9}, "Expected `num_seeds` from 1 to 1,000, but got 1000000000"),
        ({"tune": (float("inf"),)}, "Expected `tune` with finite step sizes > 0"),
        ({"tune": (0.1, -1.0)}, "Expected `tune` with finite step sizes > 0"),
        ({"tune": (0.1,), "tune_seed": 0}, "so that no seed of the grid chooses"),
    ],
)
def test_bad_values_are_explained(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep_config(**values)


@pytest.mark.slow
def test_a_sweep_fills_its_tables_and_a_larger_one_skips_what_is_finished(tmp_path: Path) -> None:
    arguments = ["sweep", "digits", *OPTIONS, "--noise", "0.8", "--seeds", "1", "--epochs", "2"]
    arguments += ["--output", str(tmp_path), "--jobs", "2", "--methods"]
    runner = CliRunner(env={"COLUMNS": "100"})
    first = runner.invoke(main, [*arguments, "uniform"])
    assert first.exit_code == 0, first.output
    assert "[1/1] Uniform, noise 0.8, seed 0: validation score" in first.output
    metrics = tmp_path / "runs/uniform_noise0.8_seed0/metrics.csv"
    written = metrics.stat().st_mtime_ns

    second = runner.invoke(main, [*arguments, "uniform,single-task"])
    assert second.exit_code == 0, second.output
    assert metrics.stat().st_mtime_ns == written
    assert "[3/3]" in second.output

    rows = read_csv(tmp_path / "results.csv")
    assert [(row["method"], row["task"], row["noise"]) for row in rows] == [
        ("single-task", "bottom_right", "0.8"),
        ("single-task", "top_left", "0"),
        ("uniform", "", "0.8"),
    ]
    selected = json.loads((metrics.parent / "metrics.json").read_text())["selected"]
    assert float(rows[2]["test/top_left_accuracy"]) == selected["test/top_left_accuracy"]
    assert rows[2]["final_weight/top_left"] == "0.5"
    epochs = read_csv(tmp_path / "epochs.csv")
    assert [row["epoch"] for row in epochs if row["method"] == "uniform"] == ["1", "2"]

    settings = json.loads((tmp_path / "sweep.json").read_text())
    assert settings["methods"] == ["uniform", "single-task"]
    assert [task["name"] for task in settings["tasks"]] == ["top_left", "bottom_right"]
    assert settings["commands"][1]["command"].endswith("--epochs 2 --batch-size 64 --num-train 300")
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert [session["num_threads"] for session in environment["sessions"]] == [1, 1]

    other = runner.invoke(main, [*arguments, "uniform", "--lr", "0.5"])
    assert other.exit_code == 1
    assert "`lr` is 0.001 instead of 0.5" in other.output


@pytest.mark.slow
def test_the_grid_uses_the_step_size_that_the_tuning_chose(tmp_path: Path) -> None:
    lines: list[str] = []
    config = sweep_config(
        methods=("groupdro", "uniform"), tune=(0.01, 30.0), tune_noise=(0.8,), epochs=3
    )
    outcome = run_sweep(config, tmp_path, announce=lines.append)
    assert (outcome.num_finished, outcome.failed) == (4, ())
    rows = read_csv(tmp_path / "step_sizes.csv")
    assert [row["robust_step_size"] for row in rows] == ["0.01", "30"]
    scores = []
    for step_size in ("0.01", "30"):
        path = tmp_path / f"tuning/groupdro_step{step_size}_noise0.8_seed100/metrics.json"
        scores.append(json.loads(path.read_text())["selected"]["validation/mean_score"])
    assert scores[0] != scores[1]
    assert [row["is_chosen"] for row in rows] == [str(int(s == max(scores))) for s in scores]
    chosen = config.tune[scores.index(max(scores))]
    assert outcome.step_sizes == {"groupdro": chosen}
    run = json.loads((tmp_path / "runs/groupdro_noise0.8_seed0/config.json").read_text())
    assert run["robust_step_size"] == chosen
    assert len(read_csv(tmp_path / "results.csv")) == 2  # the tuning is not part of the results
    # A finished tuning is read, not repeated.
    assert run_sweep(config, tmp_path) == dataclasses.replace(outcome, num_skipped=4)


@pytest.mark.slow
def test_a_failed_run_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    config = sweep_config(methods=("uniform", "groupdro"), jobs=1)
    train(train_config("uniform", epochs=1), tmp_path / "runs/uniform_noise0.8_seed0")
    (tmp_path / "runs/uniform_noise0.8_seed0/metrics.json").unlink()
    (tmp_path / "runs/uniform_noise0.8_seed0/checkpoint.pt").write_bytes(b"damaged")
    outcome = run_sweep(config, tmp_path)
    assert outcome.num_finished == 1
    (failed,) = outcome.failed
    assert failed.name == "Uniform, noise 0.8, seed 0"
    assert "ValueError: Expected" in failed.reason
    assert failed.log is not None
    assert "Traceback" in failed.log.read_text()
    assert [row["method"] for row in read_csv(tmp_path / "results.csv")] == ["groupdro"]

    command = ["sweep", "digits", *OPTIONS, "--noise", "0.8", "--seeds", "1", "--epochs", "1"]
    command += ["--methods", "uniform,groupdro", "--output", str(tmp_path)]
    again = CliRunner(env={"COLUMNS": "300"}).invoke(main, command)
    assert again.exit_code == 1
    assert "Failed runs" in again.output
    assert str(failed.log) in again.output


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_from_its_checkpoints(tmp_path: Path) -> None:
    config = sweep_config(epochs=100)
    started: list[SweepStatus] = []

    def report(status: SweepStatus) -> None:
        if any(job is not None and job.step > 0 for job in status.jobs):
            started.append(status)

    with pytest.raises(TrainingInterrupted, match="Stopped after 0 of 1 runs"):
        run_sweep(config, tmp_path, report=report, should_stop=lambda: bool(started))
    folder = tmp_path / "runs/uniform_noise0.8_seed0"
    assert (folder / "checkpoint.pt").is_file()
    assert not (folder / "metrics.json").exists()
    outcome = run_sweep(config, tmp_path)
    assert (outcome.num_finished, outcome.num_skipped) == (1, 0)
    assert len(json.loads((folder / "environment.json").read_text())["sessions"]) == 2


# After its first checkpoint each worker waits to be asked to stop; Uniform's says before, once, in which process it is.
WAIT_IN_WORKERS = """
import os
from pathlib import Path
from excessmtl_ext.training.sweep import worker

note = Path({note!r})
ordinary_report = worker._Channel.report

def report_and_wait(self, progress):
    ordinary_report(self, progress)
    if progress.step == 7 and note.exists():
        if "/uniform_" in os.readlink("/proc/self/fd/2"):
            note.write_text(str(os.getpid()))
        self._stop.wait()

worker._Channel.report = report_and_wait
main(int(sys.argv[1]))
"""
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="no /proc to tell a worker by its log"
)


def start_of_waiting_workers(note: Path) -> str:
    """What the sweep starts its workers with; ``note`` becomes a named pipe."""
    os.mkfifo(note)
    start, call = jobs._START_WORKER.rsplit("; ", 1)
    assert call == "main(int(sys.argv[1]))"
    return f"{start}\n{WAIT_IN_WORKERS.format(note=str(note))}"


@needs_proc
@pytest.mark.slow
def test_a_worker_that_someone_else_stops_is_not_passed_over_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, note = sweep_config(methods=("uniform",), epochs=3), tmp_path / "note"
    said: list[str] = []

    def stop_the_worker() -> None:
        os.kill(int(note.read_text()), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "_START_WORKER", start_of_waiting_workers(note))
        threading.Thread(target=stop_the_worker, daemon=True).start()
        outcome = run_sweep(config, tmp_path / "sweep", announce=said.append)
    assert outcome.num_finished == 0
    assert "asked to stop and has saved its checkpoint" in outcome.failed[0].reason
    assert "FAILED" in said[-1]
    assert run_sweep(config, tmp_path / "sweep", announce=print).num_finished == 1


@needs_proc
@pytest.mark.slow
def test_a_killed_worker_and_a_killed_sweep_lose_no_number(tmp_path: Path) -> None:
    undisturbed, output, note = tmp_path / "undisturbed", tmp_path / "sweep", tmp_path / "note"
    train(train_config("uniform", epochs=3), undisturbed)
    code = "import sys; sys.path[:] = sys.argv.pop(1).split(':')\n"
    code += "from excessmtl_ext.training.sweep import jobs\n"
    code += f"jobs._START_WORKER = {start_of_waiting_workers(note)!r}\n"
    code += "from excessmtl_ext.training.cli import main; main()"
    command = [sys.executable, "-c", code, ":".join(sys.path), "sweep", "digits", *OPTIONS]
    command += ["--noise", "0.8", "--seeds", "1", "--methods", "uniform,groupdro", "--jobs", "2"]
    command += ["--epochs", "3", "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    os.kill(int(note.read_text()), signal.SIGKILL)
    assert process.stdout is not None
    assert "FAILED: the process was killed (SIGKILL" in process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    folder = output / "runs/uniform_noise0.8_seed0"
    assert (folder / "checkpoint.pt").is_file()
    assert not (folder / "metrics.json").exists()

    # The other worker notices that its sweep is gone, saves a checkpoint and frees the folder.
    note.unlink()
    outcome = run_sweep(
        sweep_config(methods=("uniform", "groupdro"), epochs=3), output, announce=print
    )
    assert outcome == SweepOutcome(2, 0, (), {})
    for name in ("metrics.csv", "task_weights.csv", "metrics.json"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()


def test_a_method_that_diverges_with_every_step_size_is_given_up(
    tmp_path: Path,
) -> None:
    config = sweep_config(methods=("groupdro",), lr=1e30, epochs=2, tune=(0.1,), tune_noise=(0.8,))
    said: list[str] = []
    outcome = run_sweep(config, tmp_path, announce=said.append)
    assert outcome.num_finished == 0
    assert outcome.step_sizes == {}
    (lost,) = outcome.failed
    assert lost.reason == "not started: it diverged with every step size"
    assert lost.log is None
    assert said[0].endswith(": diverged")
    (row,) = read_csv(tmp_path / "step_sizes.csv")
    assert (row["validation/mean_score"], row["is_chosen"]) == ("", "0")


def test_a_method_whose_tuning_fails_is_given_up_and_says_why(tmp_path: Path) -> None:
    config = sweep_config(methods=("groupdro",), tune=(0.1,), tune_noise=(0.8,))
    folder = tmp_path / "tuning/groupdro_step0.1_noise0.8_seed100"
    tuned = dataclasses.replace(train_config("groupdro", epochs=1), seed=100, robust_step_size=0.1)
    train(tuned, folder)
    (folder / "metrics.json").unlink()
    (folder / "checkpoint.pt").write_bytes(b"damaged")
    damaged, lost = run_sweep(config, tmp_path).failed
    assert "ValueError: Expected" in damaged.reason
    assert lost.reason == "not started: a run of its tuning failed"


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"lr": 0.5}, r"Expected the values of the sweep in .*`lr`: 0.5 there, 0.001 here"),
        ({"epochs": 3}, r"Expected `epochs` of at least 3, as the sweep in .*, but got 1"),
    ],
)
def test_another_sweep_in_a_folder_is_refused_before_anything_runs(
    tmp_path: Path, saved: dict[str, Any], message: str
) -> None:
    settings = {"epochs": 1, "methods": ["uniform"], "noise": [0.8], "num_seeds": 1, **saved}
    (tmp_path / "sweep.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        run_sweep(sweep_config(), tmp_path)
    assert not (tmp_path / "runs").exists()
    assert json.loads((tmp_path / "sweep.json").read_text()) == settings


@pytest.mark.parametrize(
    "name", ["results.csv", "epochs.csv", "step_sizes.csv", "environment.json"]
)
def test_a_folder_with_a_file_of_somebody_else_is_refused_before_anything_is_written(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("precious\n")
    with pytest.raises(FileExistsError, match=f"{tmp_path} holds {name} and no sweep.json"):
        run_sweep(sweep_config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious\n"


def test_a_run_folder_with_a_file_of_somebody_else_is_refused_before_anything_runs(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "runs/uniform_noise0.8_seed0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("precious\n")
    with pytest.raises(FileExistsError, match=f"{folder} holds metrics.csv and no config.json"):
        run_sweep(sweep_config(), tmp_path)
    assert [path.name for path in folder.iterdir()] == ["metrics.csv"]


def test_a_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious\n")
    folder = tmp_path / "sweep/runs/uniform_noise0.8_seed0"
    folder.mkdir(parents=True)
    (folder / "log.txt").symlink_to(outside)
    with pytest.raises(OSError, match=r"log\.txt to be a file of this folder alone"):
        run_sweep(sweep_config(), tmp_path / "sweep")
    assert outside.read_text() == "precious\n"


STARTUP = """
import os, sys
if os.environ.get("STARTUP") and "excessmtl_ext.training.sweep.worker" in " ".join(sys.orig_argv):
    exec(os.environ["STARTUP"])
"""


@pytest.mark.parametrize(
    ("startup", "log"),
    [
        ("print('hello from startup')", "hello from startup"),
        ('print(\'{"state": "finished"}\')', "finished"),
        pytest.param("sys.stdout.write('half a line')", "half a line", marks=pytest.mark.slow),
        pytest.param("os.write(1, bytes(range(256)) * 500)", "", marks=pytest.mark.slow),
    ],
)
def test_a_python_that_prints_when_it_starts_prints_into_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, startup: str, log: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(STARTUP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("STARTUP", startup)
    outcome = run_sweep(sweep_config(), tmp_path / "sweep")
    assert (outcome.num_finished, outcome.failed) == (1, ())
    assert log.encode() in (tmp_path / "sweep/runs/uniform_noise0.8_seed0/log.txt").read_bytes()


@pytest.mark.parametrize("startup", ["os._exit(3)", "raise SystemExit(3)", "os.close(0)"])
def test_a_python_that_fails_when_it_starts_is_a_failed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, startup: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(STARTUP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("STARTUP", startup)
    outcome = run_sweep(sweep_config(), tmp_path / "sweep")
    (failed,) = outcome.failed
    assert re.search(r"the process ended with status \d", failed.reason), failed.reason


def test_two_sweeps_in_one_folder_are_refused(tmp_path: Path) -> None:
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); f.write(sys.argv[2]); f.flush();"
    code += "fcntl.flock(f, fcntl.LOCK_EX); print('locked', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "sweep.lock"), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(BlockingIOError, match=f"but process {os.getpid()} works there"):
            run_sweep(sweep_config(), tmp_path)
    finally:
        holder.communicate()
    assert not (tmp_path / "sweep.json").exists()


def test_missing_data_end_a_sweep_before_it_begins(tmp_path: Path) -> None:
    output = tmp_path / "sweep"
    command = ["sweep", "multimnist", "--data-root", str(tmp_path / "no"), "--output", str(output)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert "Expected `data_root` to hold MNIST" in result.output
    assert not output.exists()


def train_config(method: str, epochs: int) -> TrainConfig:
    return TrainConfig(
        dataset="digits",
        method=method,
        noise=0.8,
        epochs=epochs,
        batch_size=64,
        lr=1e-3,
        num_train=300,
    )
