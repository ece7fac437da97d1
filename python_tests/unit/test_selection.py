"""Which tests conftest.py takes into a run, tried on a suite of three tests."""

from __future__ import annotations

import pytest
from _paths import TESTS

pytest_plugins = ["pytester"]

CONFTEST = (TESTS / "conftest.py").read_text(encoding="utf-8")
SUITE = """
import pytest

def test_quick(): pass

@pytest.mark.slow
def test_slow(): pass

def test_that_lacks_a_package(): pytest.importorskip("a_package_that_is_nowhere")
"""
QUICK, SLOW, LACKING = "test_quick", "test_slow", "test_that_lacks_a_package"


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_suite=SUITE)
    pytester.makeini("[pytest]\nmarkers = slow\naddopts = --strict-markers -v\n")
    return pytester


def run(suite: pytest.Pytester, *arguments: str) -> tuple[set[str], str]:
    """The tests that ran or skipped, and all that was printed."""
    result = suite.runpytest_inprocess(*arguments)
    lines = [line for line in result.outlines if line.startswith("test_suite.py::")]
    names = {line.split("::")[1].split(" ")[0] for line in lines}
    return names, "\n".join([*result.outlines, *result.errlines])


def test_slow_tests_are_left_out_and_the_command_for_them_is_printed(
    suite: pytest.Pytester,
) -> None:
    names, printed = run(suite)
    assert names == {QUICK, LACKING}
    assert "1 slow tests were left out" in printed
    assert 'pip install ".[test-all]" && pytest python_tests --all' in printed
    assert "compiled ops: " in printed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--all"], {QUICK, SLOW, LACKING}),
        (["-m", "slow"], {SLOW}),
        (["test_suite.py::test_slow"], {SLOW}),
        (["-k", "slow"], set()),
    ],
)
def test_slow_tests_run_where_they_are_asked_for(
    suite: pytest.Pytester, arguments: list[str], expected: set[str]
) -> None:
    names, printed = run(suite, *arguments)
    assert names == expected
    assert ("were left out" in printed) == (arguments[0] == "-k")


def test_the_rest_is_what_has_not_passed_yet(suite: pytest.Pytester) -> None:
    run(suite)
    for expected in ({SLOW, LACKING}, {LACKING}):  # what passes now is done
        assert run(suite, "--rest")[0] == expected
    assert run(suite, "--all")[0] == {QUICK, SLOW, LACKING}


def test_a_suite_without_ops_says_so_and_stops(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = (
        "_extension = type('Missing', (), dict(ops_available=False, unavailable_reason='LOST'))"
    )
    suite.makeconftest(CONFTEST.replace("\nNUM_LEFT_OUT", f"\n{missing}\nNUM_LEFT_OUT"))
    monkeypatch.delenv("EXCESSMTL_DISABLE_OPS", raising=False)
    names, printed = run(suite)
    assert names == set()
    assert "No compiled ops: LOST. EXCESSMTL_DISABLE_OPS=1 pytest" in printed
    monkeypatch.setenv("EXCESSMTL_DISABLE_OPS", "1")
    assert run(suite)[0] == {QUICK, LACKING}
