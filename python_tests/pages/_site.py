"""Builds the documentation site for the tests that read it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _paths import ROOT

PACKAGES = ("sphinx", "furo", "myst_parser", "latex2mathml")


def build_site(output: Path) -> Path:
    """The site in ``output``, built strictly in a process of its own; skips where Sphinx is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install '.[docs]'")
    result = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html",
         "-d", str(output / "doctrees"), str(ROOT / "docs"), str(output / "html")],
        capture_output=True, text=True, check=False, cwd=output,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return output / "html"
