"""Files and classes stay small enough to be read at one sitting."""

from __future__ import annotations

from pathlib import Path

import pytest

import excessmtl_ext
from excessmtl_ext import Balancer

ROOT = Path(__file__).parents[2]
PACKAGE = Path(excessmtl_ext.__file__).parent
MOST_LINES = {PACKAGE: 400, ROOT / "bench": 600, ROOT / "python_tests": 600}


@pytest.mark.parametrize("folder", MOST_LINES, ids=lambda folder: folder.name)
def test_no_file_is_longer_than_its_folder_allows(folder: Path) -> None:
    lines = {
        str(file.relative_to(folder)): len(file.read_text().splitlines())
        for file in folder.rglob("*.py")
    }
    assert lines
    assert {name: num for name, num in lines.items() if num > MOST_LINES[folder]} == {}


def test_the_base_class_has_few_methods_of_its_own() -> None:
    methods = [
        name
        for name, value in vars(Balancer).items()
        if callable(value) or isinstance(value, (property, classmethod, staticmethod))
    ]
    assert "backward" in methods
    assert len(methods) <= 25
