"""What is committed of a sweep draws the same pictures, and its README and claims quote its tables."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from _paths import ROOT
from _sweeps import write_sweep

from excessmtl_ext.training.pictures.paper import draw_paper_figures
from excessmtl_ext.training.run.methods import METHODS, make_balancer
from excessmtl_ext.training.run.workloads import WORKLOADS
from excessmtl_ext.training.sweep.results import read_results

REPRODUCTION = ROOT / "bench" / "reproduction"
RESULTS = REPRODUCTION / "results"
SWEEPS = sorted(path.parent for path in RESULTS.glob("*/sweep.json"))
SOME_METHODS = ["excessmtl-official", "excessmtl-recommended", "uniform", "moml", "single-task"]


@pytest.fixture(autouse=True)
def _keep_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes back what the study registers when it is imported."""
    for registry, key, stand_in in (
        (METHODS, "candidate", METHODS["uniform"]),
        (WORKLOADS, "multimnist-14px", WORKLOADS["multimnist"]),
    ):
        monkeypatch.setitem(registry, key, stand_in)


def run_script(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.syspath_prepend(REPRODUCTION)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    importlib.import_module(name).main()


def draw(folder: Path, output: Path) -> dict[str, bytes]:
    draw_paper_figures([read_results(folder)], output, draw_toy=Path.touch)
    return {path.name: path.read_bytes() for path in output.glob("*.png")}


@pytest.mark.slow
def test_what_is_kept_of_a_sweep_draws_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = write_sweep(tmp_path / "sarcos", "sarcos", SOME_METHODS, (0.0, 0.4, 0.8), num_epochs=4)
    (sweep / "step_sizes.csv").write_text("method,step_size\n")
    run_script("keep_results", monkeypatch, sweep, tmp_path / "kept" / "sarcos")
    kept = tmp_path / "kept" / "sarcos"
    assert (kept / "results.csv").read_bytes() == (sweep / "results.csv").read_bytes()
    assert (kept / "step_sizes.csv").is_file()
    epochs = read_results(kept).epochs
    assert {row["epoch"] for row in epochs if row["noise"] == 0.8} == {1, 2, 3, 4}
    assert {row["epoch"] for row in epochs if row["noise"] != 0.8} == {4}
    before, after = draw(sweep, tmp_path / "before"), draw(kept, tmp_path / "after")
    assert len(before) >= 6
    assert after == before


def test_the_summary_gives_mean_and_spread_over_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Offsets of the made-up runs: 0 for the first method, 0.2 for the third; accuracy 0.6 - offset / 10."""
    sweep = write_sweep(tmp_path / "sweep", "multimnist", SOME_METHODS)
    run_script("summary", monkeypatch, sweep)
    shown = capsys.readouterr().out
    assert shown.startswith("multimnist, 2 seed(s), ")
    clean = shown[shown.index("| clean tasks, accuracy, at noise | 0 | 0.8 |") :]
    assert "| ExcessMTL, official | 0.6000 ± 0.0000 | 0.6000 ± 0.0000 |" in clean
    assert "| Uniform | 0.5800 ± 0.0000 | 0.5800 ± 0.0000 |" in clean
    weight = shown[shown.index("| clean tasks' weight") :]
    assert "| Uniform | 0.1000 ± 0.0000 | 0.2600 ± 0.0000 |" in weight
    assert "Single task" not in weight


@pytest.mark.parametrize("folder", SWEEPS, ids=lambda folder: folder.name)
def test_the_readme_of_a_committed_sweep_quotes_its_tables(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script("summary", monkeypatch, folder)
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert tables
    quoted = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in tables if line not in quoted] == []


def test_every_committed_sweep_has_its_command_environment_and_figures() -> None:
    assert SWEEPS
    for folder in SWEEPS:
        assert "excessmtl sweep" in (folder / "README.md").read_text(encoding="utf-8")
        assert (folder / "environment.json").is_file()
        assert list(folder.glob("fig*.png"))


def test_claims_point_to_what_is_committed() -> None:
    page = (REPRODUCTION / "CLAIMS.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((results/[^)#]+)\)", page)
    assert links
    assert [link for link in links if not (REPRODUCTION / link).is_file()] == []
    named = {link.split("/")[1] for link in links}
    assert {folder.name for folder in SWEEPS} <= named


def test_the_estimator_studys_readme_quotes_its_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = RESULTS.glob("estimator_*")
    run_script("estimator.report", monkeypatch, folder, "--table")
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert (
        sum("Uniform" in line for line in lines) == 4
    )  # results and weights, of two data sets at full size
    text = (folder / "README.md").read_text()
    assert [line for line in lines if line not in text] == []


def test_the_readme_of_the_unbiased_estimates_follows_from_its_tables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(REPRODUCTION / "estimator")
    halves = importlib.import_module("halves")
    (folder,) = RESULTS.glob("halves_*")
    facts = json.loads((folder / "environment.json").read_text())
    readme = "\n".join(halves.make_readme(folder, facts)).rstrip() + "\n"
    assert readme == (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "table", "num_rows"),
    [
        ("bound", "scores.csv", 7 * 3 * 5 * 2 * 2),
        ("optimizers", "scores.csv", (6 * 5 + 1) * 2 * 3 * 3 * 2),
        ("report_check", "findings.csv", 384),
    ],
)
def test_the_readme_of_a_study_follows_from_its_table(
    monkeypatch: pytest.MonkeyPatch, name: str, table: str, num_rows: int
) -> None:
    monkeypatch.syspath_prepend(REPRODUCTION)
    study = importlib.import_module(name)
    (folder,) = RESULTS.glob(f"{name}_*")
    facts = json.loads((folder / "environment.json").read_text())
    rows = study.read_rows(folder / table)
    readme = "\n".join(study.make_readme(rows, facts)).rstrip() + "\n"
    assert readme == (folder / "README.md").read_text()
    assert len(rows) == num_rows


def test_the_readme_of_the_domains_follows_from_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the guide quotes its table."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.syspath_prepend(REPRODUCTION)
    domains = importlib.import_module("text_domains")
    (folder,) = RESULTS.glob("domains_*")
    facts = json.loads((folder / "environment.json").read_text())
    lines = domains.make_readme(folder, facts)
    assert "\n".join(lines).rstrip() + "\n" == (folder / "README.md").read_text()
    guide = (ROOT / "docs" / "tutorials" / "domains.md").read_text(encoding="utf-8").splitlines()
    table = domains.example.summary(
        domains.read_rows(folder / "scores.csv"), domains.read_rows(folder / "speeds.csv")
    )
    assert [line for line in table if line not in guide] == []


def test_an_estimate_without_bias_leaves_nothing_of_pure_variance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(REPRODUCTION / "estimator")
    halves = importlib.import_module("halves")
    grads = torch.randn(400, 1, 5000, generator=torch.Generator().manual_seed(0))
    squares = grads.square().sum(0)
    mean = torch.zeros(1, 5000)
    for grad in grads:
        mean.lerp_(grad, 1 - 0.98)
    mean = mean / (1 - 0.98 ** len(grads))
    kept = float(halves.quadratic(mean, mean, squares)) * len(grads) / 5000
    assert kept == pytest.approx(halves.variance_left(len(grads)), rel=0.05)
    product = float(halves.quadratic(grads[-2], grads[-1], squares)) * len(grads) / 5000
    assert abs(product) < 0.05  # its deviation is 1 / sqrt(5000)


def test_draws_an_office_home_that_the_loader_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from excessmtl_ext.data.office_home import load_office_home

    run_script("draw_office_home", monkeypatch, tmp_path, "--images", 3, "--size", 8)
    data = load_office_home(tmp_path, noise=0.0, seed=0, image_size=8)
    assert [task.num_outputs for task in data.tasks] == [65] * 4
    assert len(data.train) == 65
    shutil.rmtree(tmp_path / "OfficeHome")


def test_the_study_takes_from_a_sweep_only_the_run_that_a_cell_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(REPRODUCTION / "estimator")
    screen = importlib.import_module("screen")
    cells = list(screen.full_cells("sarcos"))
    assert len({cell.key() for cell in cells}) == len(cells) == 6 * 6 * 3
    run = tmp_path / "runs" / "excessmtl-recommended_noise0.8_seed1"
    run.mkdir(parents=True)
    (run / "metrics.json").write_text(json.dumps({"tasks": [{}] * 7}))
    balancer = make_balancer(
        "excessmtl",
        [torch.zeros(1, requires_grad=True)],
        num_tasks=7,
        robust_step_size=3.0,
        options={"fisher": "linear", "eps": 1e-7, "gradient_momentum": 0.98, "combine": "sum"},
    )
    config = next(cell for cell in cells if (cell.noise, cell.seed) == (0.8, 1)).config(None)
    record = {**dataclasses.asdict(config), "num_train": 13_219, "balancer": repr(balancer)}
    (run / "config.json").write_text(json.dumps(record))
    found = [cell for cell in cells if screen.find_run(tmp_path, cell)]
    assert [
        (cell.noise, cell.seed, cell.step_size, cell.options["relative"]) for cell in found
    ] == [(0.8, 1, 3.0, True)]
    (run / "config.json").write_text(json.dumps({**record, "epochs": 59}))
    assert not [cell for cell in cells if screen.find_run(tmp_path, cell)]
