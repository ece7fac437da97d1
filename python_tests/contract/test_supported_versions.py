"""What .ci/versions installs is what pyproject.toml allows, and a warning fails a test as docs/trust.md says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from _paths import ROOT

VERSIONS = ROOT / ".ci" / "versions"
PYPROJECT = ROOT / "pyproject.toml"

pytestmark = pytest.mark.skipif(
    not VERSIONS.is_file(), reason="the tests run outside a checkout, without .ci"
)


def only_match(pattern: str) -> str:
    """The one number that pyproject.toml gives; Python 3.10 has no parser for the file."""
    (found,) = re.findall(pattern, PYPROJECT.read_text(encoding="utf-8"), re.MULTILINE)
    return found


def test_the_oldest_environment_is_made_of_the_lower_bounds() -> None:
    python = only_match(r'^requires-python = ">=([\d.]+)"$')
    torch = only_match(r'^    "torch>=([\d.]+)",')
    torchvision = only_match(r'^    "torchvision>=([\d.]+)",')
    said = subprocess.run([VERSIONS, "plan"], capture_output=True, text=True, check=True).stdout
    oldest, newest = said.splitlines()
    assert oldest == f"oldest: Python {python}, torch=={torch}.* torchvision=={torchvision}.*"
    version = re.fullmatch(r"newest: Python (\d+)\.(\d+)\.\S+, torch torchvision", newest)
    assert version is not None, newest
    assert (int(version[1]), int(version[2])) >= tuple(map(int, python.split(".")))


def test_the_workflow_tests_both_ends_on_every_push() -> None:
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert "\n  push:\n" in workflow
    pythons = re.findall(r'^ +python: "([\d.]+)"$', workflow, re.MULTILINE)
    torches = re.findall(r'^ +torch: "(.*)"$', workflow, re.MULTILINE)
    oldest, newest = only_match(r'^requires-python = ">=([\d.]+)"$'), only_match(r"cp3(\d+)-\*\"$")
    assert pythons == [oldest, f"3.{newest}"]
    bounds = [only_match(rf'^    "{name}>=([\d.]+)",') for name in ("torch", "torchvision")]
    assert torches == ["torch=={}.* torchvision=={}.*".format(*bounds), "torch torchvision"]
    commands = re.findall(r"^ +- run: (.*)$", workflow, re.MULTILINE)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {'pip install ".[test]"', "pytest python_tests"} <= set(commands)
    assert 'pip install ".[test]" && pytest python_tests' in readme


def test_a_warning_fails_a_test(tmp_path: Path) -> None:
    categories = ["UserWarning", "DeprecationWarning", "FutureWarning"]
    tests = [f"def test_{each}(): warnings.warn('old', {each})\n" for each in categories]
    test = tmp_path / "test_that_warns.py"
    test.write_text("import warnings\n" + "".join(tests))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        str(PYPROJECT),
        "--rootdir",
        str(tmp_path),
    ]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(test)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout + result.stderr
    assert "3 failed" in result.stdout
    for category in categories:
        assert f"{category}: old" in result.stdout
