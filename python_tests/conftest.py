"""Shared fixtures, and what a run takes: without ``--all`` the tests that the README's command has time for."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import excessmtl_ext
from excessmtl_ext import _extension

NUM_LEFT_OUT = pytest.StashKey[int]()
# The tensors of nearly all tests are small: a second thread gains nothing, and waits where the other core is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

MAX_WORKERS = 4  # processes for the whole suite; each takes some 1.5 GiB

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
    parser.addoption(
        "--probes",
        type=int,
        default=60,
        metavar="N",
        help="so many seeded probes in test_probes.py, by default 60",
    )
    parser.addoption(
        "--first-probe",
        type=int,
        default=0,
        metavar="SEED",
        help="the seed of the first probe, by default 0",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Spreads a run of the whole suite over the cores; a part of it runs in this process, as all does with ``-n 0``."""
    option = config.option
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # a worker, or a test's own pytest: neither starts workers of its own
    if getattr(option, "numprocesses", 0) is not None or option.usepdb or option.collectonly:
        return  # asked for, or no pytest-xdist
    if all(Path(argument).resolve() == Path(__file__).parent for argument in config.args):
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        num_workers = min(cores, MAX_WORKERS)
        if num_workers > 1:
            option.numprocesses = num_workers
            option.dist = "worksteal"


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
    is_worker = hasattr(config, "workerinput")  # its reports go to the process that started it
    if cache is not None and not config.option.collectonly and not is_worker:
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
        if hasattr(config, "workeroutput"):
            config.workeroutput["num_left_out"] = len(slow)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Learns from a worker of pytest-xdist how many tests were left out: this process collects none."""
    num_left_out = getattr(node, "workeroutput", {}).get("num_left_out", 0)
    node.config.stash[NUM_LEFT_OUT] = num_left_out


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
