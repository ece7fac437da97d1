"""The README: its length, its example, its table of results, and that its commands and files exist."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType
from urllib.parse import urlsplit

import pytest
from _paths import ROOT
from _snippets import blocks, run_blocks

PAGE = ROOT / "README.md"
README = PAGE.read_text(encoding="utf-8")


def test_the_readme_fits_on_two_screens():
    assert len(README.splitlines()) <= 90
    assert len(README.split()) <= 700


def test_the_example_of_an_own_loop_runs_and_moves_the_weights(capsys):
    (example,) = blocks(PAGE, "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 16
    weights = run_blocks(PAGE)["balancer"].task_weights
    assert weights.sum().item() == pytest.approx(1.0)
    assert weights.max() - weights.min() > 1e-6
    assert "tensor" in capsys.readouterr().out


def test_the_diff_is_the_change_that_the_example_shows():
    (diff,) = blocks(PAGE, "diff")
    (example,) = blocks(PAGE, "python")
    added = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    assert len(diff.splitlines()) == 3
    for line in added:
        assert line.replace("model.encoder", "encoder") in example


def test_the_two_commands_are_the_ones_that_ci_runs():
    script = (ROOT / ".ci" / "run").read_text()
    assert 'pip install ".[test]" && pytest python_tests' in README
    assert 'pip install ".[test]"' in script
    assert re.search(r"^pytest python_tests$", script, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def headline() -> ModuleType:
    """bench/reproduction/headline.py as a module; bench is no package."""
    path = ROOT / "bench" / "reproduction" / "headline.py"
    spec = importlib.util.spec_from_file_location("headline", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_results_is_that_of_the_committed_benchmark(headline):
    results = headline.read_benchmark()
    assert headline.with_table(README, headline.table(results)) == README
    page = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
    assert headline.table(results) in page
    rows = [line for line in headline.table(results).splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + sum(table["is_ranked"] for table in results["tables"])
    assert f"{headline.benchmark_folder().relative_to(ROOT)}/README.md" in README


def test_the_table_shows_what_each_group_of_tasks_gains_or_pays(headline):
    """Against the benchmark's own page, whose cells have the means with three decimals."""
    page = (headline.benchmark_folder() / "README.md").read_text(encoding="utf-8")
    for row in headline.table(headline.read_benchmark()).splitlines()[2:]:
        name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        section = page.partition(f"## {name}\n")[2].partition("##")[0]
        shown = {
            label: [cell.split("±")[0].strip() for cell in re.findall(r"\|([^|]+)", line)[1:3]]
            for label in ("Uniform", "**ExcessMTL, default**")
            for line in section.splitlines()
            if line.startswith(f"| {label} |")
        }
        uniform, ours = (list(map(float, values)) for values in shown.values())
        wanted = []
        for base, value in zip(uniform, ours, strict=True):
            wanted += [f"{base:.3f}", f"{value:.3f} ({value - base:+.3f})"]
        assert cells == [cell.replace("-", "−") for cell in wanted]


def test_a_readme_without_the_marks_is_refused(headline):
    with pytest.raises(ValueError, match="two marks"):
        headline.with_table("no marks here", "| a table |")


def test_links_of_the_readme_work_in_the_repository():
    targets = re.findall(r"\]\(([^)\s]+)\)", README)
    assert len(targets) > 15
    for target in targets:
        if urlsplit(target).scheme:
            continue
        workflow = re.match(r"\.\./\.\./actions/workflows/([\w.]+)", target)
        if workflow:  # what GitHub shows beside the files; an sdist has no workflows
            folder = ROOT / ".github" / "workflows"
            assert not folder.is_dir() or (folder / workflow[1]).is_file(), target
            continue
        assert (ROOT / target.partition("#")[0]).exists(), target
