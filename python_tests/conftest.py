"""Shared fixtures, and which tests a run takes: without ``--all`` those that the README's command has time for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import excessmtl_ext
from excessmtl_ext import _extension

NUM_LEFT_OUT = pytest.StashKey[int]()
# The tensors of nearly all tests are small: a second thread gains nothing, and waits where the other core is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

PASSED = "excessmtl_ext/passed"  # in pytest's cache: the tests that passed in the last run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all",
        action="store_true",
        help="run the slow tests too; what they need comes with the extra `test-all`",
    )
    parser.addoption(
        "--rest",
        action="store_true",
        help="as --all, but for the tests that passed in the last run",
    )


class PassedTests:
    """Remembers the tests that pass, for ``--rest``."""

    def __init__(self, cache: pytest.Cache, before: list[str]) -> None:
        self.cache = cache
        self.passed = set(before)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.cache.set(PASSED, sorted(self.passed))


def pytest_configure(config: pytest.Config) -> None:
    cache = getattr(config, "cache", None)  # None: -p no:cacheprovider
    if cache is not None and not config.option.collectonly:
        before = cache.get(PASSED, []) if config.getoption("rest") else []
        config.pluginmanager.register(PassedTests(cache, before))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuses to pass over every test of the ops because nobody noticed that they are missing."""
    if _extension.ops_available or os.environ.get("EXCESSMTL_DISABLE_OPS") == "1":
        return
    pytest.exit(
        f"No compiled ops: {_extension.unavailable_reason}. "
        "EXCESSMTL_DISABLE_OPS=1 pytest ... tests the reference alone.",
        returncode=pytest.ExitCode.USAGE_ERROR,
    )


def pytest_report_header() -> str:
    libraries = sorted(path for path in torch.ops.loaded_libraries if "excessmtl" in path)
    ops = ", ".join(libraries) or f"none ({_extension.unavailable_reason})"
    return f"excessmtl_ext: {Path(excessmtl_ext.__file__).parent}, compiled ops: {ops}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves slow tests out unless an option or the name of a test asks for them; under ``--rest`` what has passed."""
    if config.getoption("rest"):
        has_passed = set(config.cache.get(PASSED, [])) if config.cache is not None else set()
        leave_out(config, items, {item for item in items if item.nodeid in has_passed})
        return
    is_named = any("::" in argument for argument in config.args)
    if not (config.getoption("all") or config.getoption("markexpr") or is_named):
        slow = {item for item in items if item.get_closest_marker("slow")}
        leave_out(config, items, slow)
        config.stash[NUM_LEFT_OUT] = len(slow)


def leave_out(config: pytest.Config, items: list[pytest.Item], some: set[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if item in some])
    items[:] = [item for item in items if item not in some]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    num_left_out = config.stash.get(NUM_LEFT_OUT, 0)
    if num_left_out:
        terminalreporter.write_line(
            f"{num_left_out} slow tests were left out. These too: "
            'pip install ".[test-all]" && pytest python_tests --all'
        )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return torch.device(request.param)
