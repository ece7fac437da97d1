"""Where the checkout and its tests are."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


def find_test_file(name: str) -> Path:
    """The test file that a page calls ``test_x.py`` or ``folder/test_x.py``."""
    found = [
        path for path in TESTS.rglob("test_*.py") if f"/{path.as_posix()}".endswith(f"/{name}")
    ]
    assert len(found) == 1, f"Expected one file {name} in python_tests, but found {len(found)}."
    return found[0]
