"""The command line: runs, resumes, stops on Ctrl-C, and explains what is wrong in one message."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

import excessmtl_ext
from excessmtl_ext.training import cli
from excessmtl_ext.training.cli import console
from excessmtl_ext.training.run import loop
from excessmtl_ext.training.run.record import read_table

SMALL = ["--epochs", "2", "--batch-size", "64", "--num-train", "300", "--noise", "0.8"]


def excessmtl(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(cli.main, [str(a) for a in arguments])


def test_train_leaves_a_run_and_a_figure(tmp_path: Path) -> None:
    result = excessmtl("train", "digits", "--method", "groupdro", *SMALL, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert "bottom_right (noisy) │ accuracy" in result.output
    assert str(tmp_path / "training.png") in result.output
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {
        "config.json",
        "environment.json",
        "metrics.csv",
        "metrics.json",
        "task_weights.csv",
        "training.png",
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["method"], config["noise"], config["num_train"]) == ("groupdro", 0.8, 300)


def test_default_output_names_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert excessmtl("train", "digits", *SMALL, "--seed", "7").exit_code == 0
    assert (tmp_path / "runs/digits/excessmtl_noise0.8_seed7/metrics.json").is_file()


def test_a_second_run_into_the_folder_is_refused(tmp_path: Path) -> None:
    excessmtl("train", "digits", *SMALL, "--output", tmp_path)
    again = excessmtl("train", "digits", *SMALL, "--output", tmp_path)
    assert again.exit_code == 1
    assert "holds one already. Pass --resume" in again.output
    other = excessmtl("train", "digits", *SMALL, "--output", tmp_path, "--resume", "--lr", "0.5")
    assert other.exit_code == 1
    assert "`lr`: 0.001 there, 0.5 here" in other.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_a_signal_saves_a_checkpoint_and_resume_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    arguments = ["train", "digits", *SMALL, "--output"]
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    assert excessmtl(*arguments, undisturbed).exit_code == 0

    ordinary_step = loop._Run._train_step

    def step_with_signal(self: Any, indices: Any) -> None:
        ordinary_step(self, indices)
        if self.state.step == 7:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_train_step", step_with_signal)
        result = excessmtl(*arguments, stopped)
    assert result.exit_code == 128 + number
    assert "Stopped after step 7 of 10." in result.output
    assert "--resume" in result.output
    assert signal.getsignal(number) == before
    assert not (stopped / "metrics.json").exists()

    assert excessmtl(*arguments, stopped, "--resume").exit_code == 0
    for name in ("metrics.csv", "task_weights.csv", "metrics.json"):
        assert (stopped / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "adam"], "'adam' is not one of 'excessmtl'"),
        (["--noise", "1.5"], "1.5 is not in the range 0<=x<=1"),
        (["--epochs", "0"], "0 is not in the range x>=1"),
        (["--lr", "-1"], "Expected `lr` > 0, but got -1.0"),
        (["--device", "abacus"], "Expected `device` such as cpu"),
        (["--device", "meta"], "Expected `device` such as cpu"),
        (["--lr", "inf"], "Expected `lr` to be finite, but got inf"),
        (["--weight-decay", "nan"], "Expected `weight_decay` >= 0, but got nan"),
        (["--seed", "1" + "0" * 30], "Expected `seed` of at most"),
        (["--epochs", "1" + "0" * 30], "Expected `epochs` of at most"),
        (["--batch-size", "1" + "0" * 30], "Expected `batch_size` of at most"),
        (["--option", "eps=NaN"], "Expected `method_options` that config.json can hold"),
        (["--robust-step-size", "-2"], "Expected `robust_step_size` > 0, but got -2.0"),
        (["--num-train", "0"], "0 is not in the range x>=1"),
    ],
)
def test_bad_values_are_explained_without_a_traceback(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = excessmtl("train", "digits", *SMALL, "--output", tmp_path / "run", *arguments)
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_a_missing_data_folder_is_explained(tmp_path: Path) -> None:
    root = tmp_path / "nowhere"
    result = excessmtl("train", "multimnist", "--data-root", root, "--output", tmp_path / "run")
    assert result.exit_code == 1
    assert "Expected `data_root` to hold MNIST" in result.output
    assert "download=True" in result.output


def test_a_second_ctrl_c_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(KeyboardInterrupt), console.stop_on_signal(Console()) as should_stop:
        assert not should_stop()
        signal.raise_signal(signal.SIGINT)
        assert should_stop()
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on after the second")
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_processes_of_torchrun_get_each_signal_twice_and_finish_their_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    with console.stop_on_signal(Console()) as should_stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert should_stop()


def test_without_click_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "click", None)
    assert cli.__file__ is not None
    spec = importlib.util.spec_from_file_location("cli_without_click", cli.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(
        ModuleNotFoundError, match=r'needs click.*pip install "\.\[train\]" in a clone'
    ):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.real_data
@pytest.mark.slow
def test_real_multimnist_learns_and_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = os.environ.get("EXCESSMTL_DATA")
    if root is None:
        pytest.skip("EXCESSMTL_DATA does not name a folder with MNIST")
    arguments = ["train", "multimnist", "--data-root", root, "--noise", "0.8", "--epochs", "1"]
    arguments += ["--num-train", "10000", "--batch-size", "128", "--output"]
    assert excessmtl(*arguments, tmp_path / "undisturbed").exit_code == 0
    (row,) = read_table(tmp_path / "undisturbed/metrics.csv")
    assert row["test/top_left_accuracy"] > 0.5

    ordinary_step = loop._Run._train_step

    def step_with_ctrl_c(self: Any, indices: Any) -> None:
        ordinary_step(self, indices)
        if self.state.step == 40:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_train_step", step_with_ctrl_c)
        assert excessmtl(*arguments, tmp_path / "stopped").exit_code == 130
    assert excessmtl(*arguments, tmp_path / "stopped", "--resume").exit_code == 0
    for name in ("metrics.csv", "task_weights.csv", "metrics.json"):
        first, second = tmp_path / "undisturbed" / name, tmp_path / "stopped" / name
        assert first.read_bytes() == second.read_bytes()


def test_options_of_the_balancer_reach_the_run(tmp_path: Path) -> None:
    options = ["--option", "gradient_momentum=0.9", "--option", "fisher=linear"]
    result = excessmtl("train", "digits", *SMALL, *options, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["method_options"] == {"gradient_momentum": 0.9, "fisher": "linear"}
    assert "gradient_momentum=0.9" in config["balancer"]
    assert "fisher='linear'" in config["balancer"]


def test_an_option_without_a_value_is_an_error(tmp_path: Path) -> None:
    result = excessmtl("train", "digits", "--option", "fisher", "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "Expected NAME=VALUE, but got 'fisher'" in result.output


def test_a_second_ctrl_c_ends_the_command_with_one_line_and_resume_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    arguments = ["train", "digits", *SMALL, "--output"]
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    assert excessmtl(*arguments, undisturbed).exit_code == 0
    ordinary_step = loop._Run._train_step

    def step_with_signals(self: Any, indices: Any) -> None:
        ordinary_step(self, indices)
        if self.state.step == 7:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_train_step", step_with_signals)
        result = excessmtl(*arguments, stopped)
    assert result.exit_code == 130
    assert result.output.endswith("Stopped.\n")
    assert "Traceback" not in result.output
    assert excessmtl(*arguments, stopped, "--resume").exit_code == 0
    for name in ("metrics.csv", "task_weights.csv", "metrics.json"):
        assert (stopped / name).read_bytes() == (undisturbed / name).read_bytes()


THIRD = """
import signal, sys
sys.path[:] = sys.argv.pop(1).split(":")
from excessmtl_ext.training.cli import console
with console.stop_on_signal(console.make_console()) as should_stop:
    try:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.raise_signal(signal.SIGINT)
        print("went on after the third")
"""


def test_a_third_ctrl_c_does_not_wait_until_everything_is_closed() -> None:
    environment = {name: v for name, v in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    result = subprocess.run(
        [sys.executable, "-c", THIRD, ":".join(sys.path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 130
    assert "Traceback" not in result.stderr
    assert "went on" not in result.stdout


# As pip writes it.
SCRIPT = """
import sys
from excessmtl_ext.training.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""
# An import that waits until somebody has interrupted it.
SLOW_TORCH = """
import sys
print("importing torch", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["script", "module"])
def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path: Path, how: str) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(SLOW_TORCH)
    (tmp_path / "excessmtl").write_text(SCRIPT)
    package = Path(excessmtl_ext.__file__).parents[1]
    words = (
        [str(tmp_path / "excessmtl")] if how == "script" else ["-m", "excessmtl_ext.training.cli"]
    )
    process = subprocess.Popen(
        [sys.executable, *words, "demo"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{package}"},
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing torch\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors == "\nStopped.\n"


def test_a_program_that_imports_the_package_handles_ctrl_c_itself() -> None:
    code = "import sys; sys.path[:] = sys.argv[1:]; import signal, excessmtl_ext; "
    code += "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    words = [sys.executable, "-c", code, *sys.path]
    assert subprocess.check_output(words, text=True) == "True\n"
