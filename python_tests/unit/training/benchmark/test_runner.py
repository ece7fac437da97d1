"""A benchmark runs trials in workers, chooses settings, goes on after a kill, and leaves tables, ranks and a page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from excessmtl_ext.training.benchmark.page import PAGE, README, RESULTS
from excessmtl_ext.training.benchmark.plan import TUNING_SEED, BenchmarkConfig, Plan
from excessmtl_ext.training.benchmark.runner import Progress, run_benchmark
from excessmtl_ext.training.benchmark.trial import Trial
from excessmtl_ext.training.cli import main
from excessmtl_ext.training.cli.benchmark import format_left

METHODS = ("uniform", "groupdro", "excessmtl-recommended")


def config_of(path: Path, **changes: Any) -> BenchmarkConfig:
    fields = {"datasets": (str(path),), "methods": METHODS, "num_seeds": 2, "is_quick": True}
    return BenchmarkConfig(**{**fields, **changes})


def trial_files(output: Path) -> dict[str, float]:
    return {
        path.relative_to(output).as_posix(): path.stat().st_mtime_ns
        for path in output.rglob("trials/**/*.json")
    }


def test_a_benchmark_from_the_command_to_its_page(own_datasets: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = ["benchmark", "--output", str(output), "--datasets", str(own_datasets), "--quick"]
    words += ["--methods", ",".join(METHODS)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    # Two data sets, two doses, two seeds, three methods; four settings of GroupDRO to choose from.
    assert len(trial_files(output)) == 2 * 2 * 2 * 3 + 2 * 4
    for name in (README, PAGE, RESULTS, "ranks_clean.png", "ranks_noisy.png", "ranks_all.png"):
        assert (output / name).stat().st_size > 100
    assert "Mean rank" in done.output

    results = json.loads((output / RESULTS).read_text())
    assert [(t["dataset"], t["dose"], t["is_ranked"]) for t in results["tables"]] == [
        ("one", "none", False), ("one", "some", True), ("two", "none", False), ("two", "some", True),
    ]  # fmt: skip
    for table in results["tables"]:
        assert [line["method"] for line in table["methods"]] == list(METHODS)
        for line in table["methods"]:
            assert line["num_seeds"] == 2
            assert 0 <= line["scores"]["clean, selected"]["mean"] <= 1
        assert table["methods"][0]["cost"] == 1.0
    # The two data sets are one under two names: their numbers agree, and so does every rank.
    assert (
        results["tables"][1]["methods"][0]["scores"] == results["tables"][3]["methods"][0]["scores"]
    )
    (ranking,) = [
        r for r in results["rankings"] if (r["group"], r["epoch"]) == ("clean", "selected")
    ]
    assert sum(ranking["mean_ranks"].values()) == pytest.approx(1 + 2 + 3)
    readme = (output / README).read_text()
    page = (output / PAGE).read_text()
    for text in (readme, page):
        assert "quick" in text
        assert "TWO, some" in text
    assert "**ExcessMTL, default**" in readme
    assert "src=" in page
    assert "http" not in page.replace("http-equiv", "")

    # The same command: refused without --resume, nothing to do with it.
    before = trial_files(output)
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 1
    assert "Pass --resume" in again.output
    assert CliRunner().invoke(main, [*words, "--resume"]).exit_code == 0
    assert trial_files(output) == before

    # With one more method it is extended; another version of a file would be trained again.
    more = CliRunner().invoke(main, [*words, "--methods", "mgda", "--resume"])
    assert more.exit_code == 0, more.output
    assert len(trial_files(output)) == len(before) + 2 * 2 * 2
    assert before.items() <= trial_files(output).items()


def test_a_setting_is_chosen_by_the_labels_a_user_has(own_datasets: Path, tmp_path: Path) -> None:
    plan = Plan(config_of(own_datasets, methods=("groupdro",)), tmp_path / "out")
    assert {trial.seed for trial in plan.waiting()} == {TUNING_SEED}
    assert {trial.dose for trial in plan.waiting()} == {"some"}
    # Clean labels would choose the first, the observed ones the third.
    observed = [0.2, 0.1, 0.6, 0.6]
    for number, trial in enumerate(plan.tuning_trials("one", "groupdro")):
        scores = {"test": 1 - number, "validation": 1 - number, "observed": observed[number]}
        rows = [{"scores": {name: {"task": value} for name, value in scores.items()}}]
        content = {"fingerprint": plan.fingerprint(trial), "trial": {}, "epochs": rows}
        if number == 3:
            content = {**content, "diverged": "no finite step"}
        plan.path(trial).parent.mkdir(parents=True, exist_ok=True)
        plan.path(trial).write_text(json.dumps(content))
    assert plan.choice("one", "groupdro") == 2
    reported = [trial for trial in plan.waiting() if trial.dataset == "one"]
    assert [(trial.setting, trial.seed) for trial in reported] == [(2, 0), (2, 0), (2, 1), (2, 1)]


def test_a_result_of_other_settings_is_none(own_datasets: Path, tmp_path: Path) -> None:
    config = config_of(own_datasets, methods=("uniform",))
    plan = Plan(config, tmp_path / "out")
    trial = Trial("one", "some", "uniform", 0, 0, is_quick=True)
    plan.path(trial).parent.mkdir(parents=True)
    plan.path(trial).write_text(json.dumps({"fingerprint": plan.fingerprint(trial), "trial": {}}))
    assert Plan(config, tmp_path / "out").result(trial) is not None
    own_datasets.write_text(own_datasets.read_text().replace("epochs=2", "epochs=3"))
    assert (
        Plan(config_of(own_datasets, methods=("uniform",)), tmp_path / "out").result(trial) is None
    )
    plan.path(trial).write_text("{")
    with pytest.raises(ValueError, match=plan.path(trial).name):
        Plan(config, tmp_path / "out").result(trial)


@pytest.mark.slow
def test_a_trial_that_fails_is_named_and_the_others_go_on(
    own_datasets: Path, tmp_path: Path
) -> None:
    (tmp_path / "fail").touch()
    lines: list[str] = []
    progress: list[Progress] = []
    config = config_of(own_datasets, methods=("uniform",))
    failed = run_benchmark(
        config, tmp_path / "out", jobs=2, announce=lines.append, report=progress.append
    )
    assert {(one.trial.dataset, one.trial.seed) for one in failed} == {("one", 1), ("two", 1)}
    assert all(one.reason == "RuntimeError: broken loader" for one in failed)
    assert len(trial_files(tmp_path / "out")) == 4
    assert sum("FAILED" in line for line in lines) == 4
    assert "RuntimeError: broken loader" in (tmp_path / "out" / "log.txt").read_text()
    assert max(len(each.running) for each in progress) == 2
    assert progress[-1].num_done == 4
    assert progress[-1].num_trials == 8
    # Mended, the same call does what is missing.
    (tmp_path / "fail").unlink()
    assert run_benchmark(config, tmp_path / "out", resume=True) == []
    assert len(trial_files(tmp_path / "out")) == 8


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists():
        assert process.poll() is None, "the benchmark has ended"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_benchmark_goes_on_after_it_was_killed(
    own_datasets: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "out"
    (tmp_path / "hold_1").touch()  # the loader of seed 1 waits for this file to go
    words = [sys.executable, "-c", "from excessmtl_ext.training.cli import main; main()"]
    words += ["benchmark", "--output", str(output), "--datasets", str(own_datasets), "--quick"]
    words += ["--methods", "uniform"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with (tmp_path / "printed").open("wb") as printed:
        process = subprocess.Popen(words, env=environment, stdout=printed, stderr=printed)
    wait_for(tmp_path / "held_1", process)
    before = trial_files(output)
    assert len(before) == 4  # all of seed 0
    process.send_signal(number)
    if number == signal.SIGINT:
        # It waits for its worker, which waits for the file.
        (tmp_path / "hold_1").unlink()
        assert process.wait() == 130
        assert "--resume goes on" in (tmp_path / "printed").read_text()
        assert (output / PAGE).is_file()
    else:
        process.wait()
        (tmp_path / "hold_1").unlink()
    assert trial_files(output).keys() <= before.keys() | {
        f"trials/{name}/{dose}/uniform_0_seed1.json"
        for name in ("one", "two")
        for dose in ("none", "some")
    }
    failed = run_benchmark(config_of(own_datasets, methods=("uniform",)), output, resume=True)
    assert failed == []
    after = trial_files(output)
    assert len(after) == 8
    assert before.items() <= after.items()


def test_what_cannot_run_is_said_and_nothing_at_all_is_an_error(tmp_path: Path) -> None:
    config = BenchmarkConfig(datasets=("sarcos", "digits"))
    assert list(config.found_datasets) == ["digits"]
    assert config.left_out()[0] == "SARCOS: needs its data on disk, pass --data-root"
    with pytest.raises(ValueError, match=r"got none: SARCOS: needs its data on disk"):
        run_benchmark(BenchmarkConfig(datasets=("sarcos",)), tmp_path)
    with pytest.raises(ValueError, match=r"`num_seeds` in \[1, 99\], but got 0"):
        BenchmarkConfig(num_seeds=0)


def test_files_of_others_are_not_overwritten(own_datasets: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / README).write_text("my notes\n")
    words = ["benchmark", "--output", str(output), "--datasets", str(own_datasets), "--quick"]
    done = CliRunner().invoke(main, [*words, "--methods", "uniform", "--seeds", "1"])
    assert done.exit_code == 1
    assert README in done.output
    assert not (output / "trials").exists()  # found out before anything was trained
    assert (output / README).read_text() == "my notes\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "time left unknown"),
        (20, "under a minute left"),
        (300, "5 min left"),
        (3 * 3600 + 120, "3 h 02 min left"),
    ],
)
def test_the_time_left_is_said_as_people_say_it(seconds: float | None, text: str) -> None:
    assert format_left(seconds) == text
