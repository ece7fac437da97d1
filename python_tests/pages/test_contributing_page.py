"""CONTRIBUTING.md: its tour names every module of the package, and nothing that does not exist."""

from __future__ import annotations

import re

from _paths import ROOT

GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TOUR = GUIDE.partition("## Tour of the modules")[2].partition("\n## ")[0]


def named_in_the_tour() -> list[str]:
    """The paths of the first column; a name without a folder is in that of the name before it."""
    paths = []
    for row in re.findall(r"^\| (`.*?) \|", TOUR, flags=re.MULTILINE):
        folder = ""
        for name in re.findall(r"`([^`]+)`", row):
            path = name if "/" in name.rstrip("/") or not folder else f"{folder}/{name}"
            folder = path.rstrip("/").rpartition("/")[0]
            paths.append(path)
    return paths


def test_the_tour_names_every_module_of_the_package():
    named = {path.rstrip("/") for path in named_in_the_tour()}
    package = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "excessmtl_ext").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    assert len(package) > 15
    assert not {path for path in package if not path.endswith("__init__.py")} - named


def test_everything_that_the_tour_names_exists():
    named = named_in_the_tour()
    assert len(named) > 20
    for path in named:
        assert (ROOT / path).exists(), f"the tour names {path}"
