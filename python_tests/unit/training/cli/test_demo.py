"""The demo names the noisy task, shows the report, says what each method gains or pays, and what to do next."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from excessmtl_ext.training import cli
from excessmtl_ext.training.cli.demo import tell
from excessmtl_ext.training.sweep.demo import (
    DEMO_METHODS,
    DemoResult,
    Finding,
    MethodSummary,
    Statistic,
)


def demo(*arguments: str | Path, charset: str = "utf-8", columns: int = 100) -> Result:
    runner = CliRunner(env={"COLUMNS": str(columns)}, charset=charset)
    return runner.invoke(cli.main, ["demo", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    return folder, demo("--output", folder, "--seeds", "2", "--epochs", "1")


def test_the_demo_compares_and_draws(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    assert result.exit_code == 0, result.output
    for label in ("ExcessMTL, recommended", "ExcessMTL, official", "Uniform", "GroupDRO"):
        assert label in result.output
    assert f"Figure: {folder / 'demo.png'}" in result.output
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "±" in result.output


def test_what_is_told_are_the_numbers_of_the_runs(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    gains: list[float] = []
    for seed in range(2):
        ours, uniform = (
            json.loads((folder / method / f"seed_{seed}" / "metrics.json").read_text())
            for method in ("excessmtl-official", "uniform")
        )
        name = "test/bottom_right_accuracy"
        gains.append(100 * (ours["selected"][name] - uniform["selected"][name]))
    mean = sum(gains) / 2
    told = re.search(r"ExcessMTL, official: .*the noisy task (.*)", result.output)
    assert told is not None
    number = re.search(r"([+-]?[\d.]+) ± ([\d.]+)", told[1])
    assert number is not None
    assert abs(float(number[1])) == pytest.approx(abs(mean), abs=0.051)
    assert float(number[2]) == pytest.approx(abs(gains[0] - mean) * 2**0.5, abs=0.051)


def test_the_report_of_the_balancer_is_shown_and_kept(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    kept = json.loads((folder / "excessmtl-recommended/seed_0/balancer_report.json").read_text())
    assert "balancer.report() of seed 0:" in result.output
    for line in kept["text"].splitlines():
        assert line in result.output
    assert "ExcessMTL after 32 steps" in result.output
    assert not (folder / "uniform/seed_0/balancer_report.json").exists()


def test_a_finished_demo_is_told_again_and_not_run_again(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    arguments = ("--output", folder, "--seeds", "2", "--epochs", "1")
    refused = demo(*arguments)
    assert refused.exit_code == 1
    assert "--resume" in refused.output
    resumed = demo(*arguments, "--resume")
    assert resumed.exit_code == 0
    title = "80% of one task's training labels replaced"
    assert resumed.output.partition(title)[2] == result.output.partition(title)[2]


@pytest.mark.parametrize("charset", ["ascii", "latin-1"])
def test_a_terminal_that_takes_no_unicode_gets_the_whole_demo(
    finished: tuple[Path, Result], charset: str
) -> None:
    folder, _ = finished
    result = demo("--output", folder, "--seeds", "2", "--epochs", "1", "--resume", charset=charset)
    assert result.exit_code == 0, result.output
    assert f"Figure: {folder / 'demo.png'}" in result.output
    assert ("+-" if charset == "ascii" else "±") in result.output


def test_somebody_elses_picture_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "demo.png").write_text("precious\n")
    result = demo("--output", tmp_path)
    assert result.exit_code == 1
    assert "demo.png to be absent or written by this command" in " ".join(result.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]


# ---- what is told of which numbers


def make_result(
    clean: tuple[float, ...], noisy: tuple[float, ...], found: tuple[tuple[str, ...], ...]
) -> DemoResult:
    level = Statistic.of([0.5] * len(clean))
    nothing = Statistic.of([0.0] * len(clean))
    summaries = [
        MethodSummary(
            method,
            level,
            level,
            level,
            Statistic.of(clean) if method == DEMO_METHODS[0] else nothing,
            Statistic.of(noisy) if method == DEMO_METHODS[0] else nothing,
        )
        for method in DEMO_METHODS
    ]
    findings = [Finding(seed, names, f"table {seed}") for seed, names in enumerate(found)]
    return DemoResult(tuple(summaries), tuple(findings), "left", "right")


@pytest.mark.parametrize(
    ("clean", "noisy", "expected"),
    [
        ((0.02, 0.03, 0.025), (-0.1, -0.12, -0.11), "left is better off .* right, .* pays for it"),
        ((0.02, 0.03, 0.025), (-0.1, 0.12, 0.0), "left is better off .* costs right nothing"),
        ((0.02, 0.03, 0.025), (0.1, 0.12, 0.11), "left is better off .* and so is right"),
        ((0.02, -0.03, 0.005), (-0.1, -0.12, -0.11), "left is no better off .* Keep Uniform"),
        ((-0.02, -0.03, -0.025), (0.1, 0.12, 0.11), "left is worse off .* Keep Uniform"),
        ((0.02,), (-0.1,), "One seed tells no gain from chance"),
    ],
)
def test_the_verdict_is_what_the_numbers_say(
    clean: tuple[float, ...], noisy: tuple[float, ...], expected: str
) -> None:
    text = "\n".join(tell(make_result(clean, noisy, (("right",),))))
    assert re.search(expected, text), text
    assert "ExcessMTL(model.encoder.parameters(), num_tasks=2)" in text


def test_gains_are_told_in_points_and_as_the_same_where_seeds_differ_by_more() -> None:
    lines = tell(make_result((0.02, 0.03, 0.025), (0.01, -0.01, 0.003), ()))
    (line,) = [line for line in lines if line.startswith("    ExcessMTL, recommended:")]
    assert (
        line
        == "    ExcessMTL, recommended: the clean task gains 2.5 ± 0.5, the noisy task the same (+0.1 ± 1.0)"
    )
    assert lines[0].startswith("No report")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ((("right",), ("right",)), "right in 2 of 2 runs. Which it is."),
        ((("right",), ()), "right in 1 of 2 runs. Which it is."),
        ((("left",), ("right",)), "left in 1 of 2 runs, right in 1 of 2 runs. It is right."),
        (((), ()), "no task. It is right."),
        ((("right",),), "right in 1 of 1 run. Which it is."),
    ],
)
def test_what_was_found_is_counted(found: tuple[tuple[str, ...], ...], expected: str) -> None:
    lines = tell(make_result((0.0, 0.0), (0.0, 0.0), found))
    assert lines[0] == f"Found noisy without being told: {expected}"
    assert "    table 0" in lines
