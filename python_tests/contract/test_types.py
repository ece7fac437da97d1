"""pyright, strict as configured in pyproject.toml, has nothing to say about the package, private names included."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from _paths import ROOT

PYRIGHT = shutil.which("pyright")
INTEGRATED = ("accelerate", "lightning", "transformers")
"""Optional packages whose integrations cannot be judged where they are not installed."""


@pytest.mark.slow
@pytest.mark.skipif(PYRIGHT is None, reason="no pyright on this machine")
def test_pyright_finds_no_error() -> None:
    assert PYRIGHT is not None
    ran = subprocess.run(
        [PYRIGHT, "--pythonpath", sys.executable, "--outputjson"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    report = json.loads(ran.stdout)
    assert report["summary"]["filesAnalyzed"] > 100
    missing = {name for name in INTEGRATED if importlib.util.find_spec(name) is None}
    unjudged = {ROOT / "excessmtl_ext" / "integrations" / f"{name}.py" for name in missing}
    errors = [
        f"{each['file']}:{each['range']['start']['line'] + 1}: {each['message']}"
        for each in report["generalDiagnostics"]
        if each["severity"] == "error" and Path(each["file"]) not in unjudged
    ]
    assert errors == []
