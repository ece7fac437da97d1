"""The paper's figures need the committed tables alone, and say which run is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from _sweeps import KINDS, write_sweep
from click.testing import CliRunner

from excessmtl_ext.training.cli import main
from excessmtl_ext.training.pictures.paper import _converged_loss, draw_paper_figures
from excessmtl_ext.training.pictures.sweep_view import SweepView
from excessmtl_ext.training.sweep.results import read_results

ALL = ["excessmtl-official", "excessmtl-recommended", "uniform", "groupdro", "moml", "single-task"]


@pytest.mark.parametrize(
    ("dataset", "number"),
    [
        ("sarcos", 9),
        pytest.param("multimnist", 6, marks=pytest.mark.slow),
        pytest.param("nyuv2", 8, marks=pytest.mark.slow),
    ],
)
def test_draws_every_figure_that_the_tables_hold(tmp_path: Path, dataset: str, number: int) -> None:
    sweep = read_results(write_sweep(tmp_path / "sweep", dataset, ALL))
    reports = draw_paper_figures([sweep], tmp_path / "figures", draw_toy=Path.touch)
    drawn = {report.path.name for report in reports if report.path is not None}
    assert drawn == {
        "fig1_toy.png",
        f"fig2_{dataset}_excess_risk.png",
        f"fig3_{dataset}_training.png",
        f"fig4_{dataset}_loss_profile.png",
        f"fig5_{dataset}_moml.png",
        f"fig{number}_{dataset}_noise_levels.png",
    }
    for name in drawn - {"fig1_toy.png"}:
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_one_seed_one_epoch_and_one_noise_level_are_enough_for_fig_3_only(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", "multimnist", ALL[:4], [0.8], 1, 1)
    reports = draw_paper_figures([read_results(folder)], tmp_path, draw_toy=Path.touch)
    drawn = {report.path.name for report in reports if report.path is not None}
    assert drawn == {"fig1_toy.png", "fig3_multimnist_training.png"}
    missing = {report.name: report.missing for report in reports if report.path is None}
    assert "at least 2 epochs" in missing["Fig. 2, MultiMNIST: excess risk"]
    assert "--methods single-task" in missing["Fig. 4, MultiMNIST: loss profile"]
    assert "--methods moml" in missing["Fig. 5, MultiMNIST: moml"]
    assert "at least two levels" in missing["Fig. 6, MultiMNIST: noise levels"]
    assert missing["Fig. 9, SARCOS"] == "excessmtl sweep sarcos"


def test_a_clean_task_alone_serves_all_noise_levels(tmp_path: Path) -> None:
    view = SweepView(read_results(write_sweep(tmp_path / "s", "multimnist", ["single-task"])))
    assert view.clean == ["t1"]
    column = "test/t1_loss"
    assert view.alone("t1", 0.8, column) == view.alone("t1", 0.0, column) != []
    assert view.alone("t0", 0.8, "test/t0_loss") != view.alone("t0", 0.0, "test/t0_loss")


def test_the_converged_loss_is_the_lowest_of_the_task_alone(tmp_path: Path) -> None:
    view = SweepView(read_results(write_sweep(tmp_path / "a", "multimnist", ["single-task"])))
    assert _converged_loss(view, "t0", 0.8) == pytest.approx(2.8 / 2)
    without = SweepView(read_results(write_sweep(tmp_path / "b", "multimnist", ["uniform"])))
    assert _converged_loss(without, "t0", 0.8) is None


def test_tasks_of_one_kind_show_its_metric_and_mixed_ones_the_score(tmp_path: Path) -> None:
    shown = {
        dataset: SweepView(read_results(write_sweep(tmp_path / dataset, dataset, ALL))).metric
        for dataset in KINDS
    }
    assert shown == {"multimnist": "accuracy", "sarcos": "nmse", "nyuv2": "score"}


def test_titles_say_what_the_numbers_stand_on(tmp_path: Path) -> None:
    view = SweepView(read_results(write_sweep(tmp_path / "s", "multimnist", ALL)))
    assert view.describe(["uniform"]) == "1,000 training samples, 2 epochs, 2 seeds"


@pytest.mark.slow
def test_the_command_names_what_it_drew_and_what_is_missing(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", "sarcos", ALL[:3])
    result = CliRunner().invoke(main, ["figures", str(folder), "--output", str(tmp_path / "f")])
    assert result.exit_code == 0, result.output
    assert (
        f"Fig. 9, SARCOS: noise levels: {tmp_path}/f/fig9_sarcos_noise_levels.png" in result.output
    )
    assert "Fig. 5, SARCOS: moml: not drawn, needs: excessmtl sweep sarcos" in result.output
    assert (tmp_path / "f/fig1_toy.png").read_bytes().startswith(b"\x89PNG")


def test_two_sweeps_of_one_data_set_do_not_overwrite_each_other(tmp_path: Path) -> None:
    folders = [write_sweep(tmp_path / name, "sarcos", ALL[:3]) for name in ("a", "b")]
    sweeps = [read_results(folder) for folder in folders]
    reports = draw_paper_figures(sweeps, tmp_path, draw_toy=Path.touch)
    drawn = [report.path.name for report in reports if report.path is not None]
    assert len(drawn) == len(set(drawn)) == 7


def test_a_folder_without_tables_is_explained(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["figures", str(tmp_path)])
    assert result.exit_code == 1
    assert "a folder that `excessmtl sweep` has filled" in result.output
