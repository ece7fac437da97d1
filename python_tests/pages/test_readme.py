"""What the README shows is what works: its example runs, its commands and files exist."""

from __future__ import annotations

import re

import pytest
from _paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_of_an_own_loop_runs_and_moves_the_weights(capsys):
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 16
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    weights = names["balancer"].task_weights  # type: ignore[attr-defined]
    assert weights.sum().item() == pytest.approx(1.0)
    assert weights.max() - weights.min() > 1e-6
    assert "tensor" in capsys.readouterr().out


def test_the_two_commands_are_the_ones_that_ci_runs():
    script = (ROOT / ".ci" / "run").read_text()
    assert 'pip install ".[test]" && pytest python_tests' in README
    assert 'pip install ".[test]"' in script
    assert re.search(r"^pytest python_tests$", script, flags=re.MULTILINE)


def test_every_file_of_the_tour_exists():
    folder = ROOT
    for row in re.findall(
        r"^\| (`(?:csrc|excessmtl_ext|bench)/.*?) \|", README, flags=re.MULTILINE
    ):
        for name in re.findall(r"`([^`]+)`", row):
            path = ROOT / name if "/" in name.rstrip("/") else folder / name
            assert path.exists(), f"the tour names {name}"
            folder = path.parent


def test_the_tour_of_the_contribution_guide_names_every_room():
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tour = guide.partition("## The tour of the house")[2].partition("\n## ")[0]
    package = [
        path
        for path in (ROOT / "excessmtl_ext").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    assert len(package) > 15
    for path in package:
        name = f"{path.name}/" if path.is_dir() else path.name
        assert name == "__init__.py" or f"`{name}`" in tour or f"/{name}`" in tour, name
