"""A docstring of a function says what it does: a verb in the third person comes first."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from _paths import ROOT

PACKAGE = ROOT / "excessmtl_ext"
FILES = sorted(PACKAGE.rglob("*.py"))
OTHER_BEGINNINGS = (":func:", ":meth:", "See ", "Streaming: ")
"""What points elsewhere instead, and one label."""


def documented_functions(path: Path) -> list[tuple[str, str]]:
    """Names and docstrings of the functions; a property is named by a noun, and a command tells its user what to do."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            text = ast.get_docstring(node)
            if text and "property" not in decorators and "click." not in decorators:
                found.append((node.name, text))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_function_s_docstring_begins_with_a_verb_in_the_third_person(path: Path) -> None:
    others = [
        f"{name}: {text.splitlines()[0]}"
        for name, text in documented_functions(path)
        if not text.startswith(OTHER_BEGINNINGS) and not text.split()[0].strip(".,:;").endswith("s")
    ]
    assert others == []
