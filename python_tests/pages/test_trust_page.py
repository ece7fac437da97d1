"""Every row of docs/trust.md names tests, or a script that runs them, and each of them exists."""

from __future__ import annotations

import ast
import os
import re
from functools import cache
from pathlib import Path

import pytest
from _paths import ROOT, find_test_file

LINES = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8").splitlines()
# Without the head of each table and the rule below it.
ROWS = [
    line
    for line, below in zip(LINES, [*LINES[1:], ""], strict=True)
    if line.startswith("| ") and not below.startswith("|---")
]


@cache
def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_page_has_rows() -> None:
    assert len(ROWS) >= 8


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:60])
def test_every_row_names_tests_that_exist(row: str) -> None:
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    assert len(cells) == 3
    assert all(cells)
    named = re.findall(r"`([^`]+)`", cells[2])
    assert named
    for name in named:
        if name.startswith(".ci/"):
            assert os.access(ROOT / name, os.X_OK) or not (ROOT / ".ci").is_dir(), name
            continue
        file, separator, test = name.partition("::")
        assert separator, f"Expected `file.py::test_name`, but got {name}."
        assert test.startswith("test_")
        assert test in names_in(find_test_file(file)), f"{file} has no {test}"
