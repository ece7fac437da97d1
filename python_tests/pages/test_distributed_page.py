"""docs/distributed.md: its promises name tests that exist, its tables are those that the bench prints."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from typing import Any

import pytest
from _paths import ROOT, find_test_file
from test_trust_page import names_in

PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
PROMISES = [
    line
    for line in PAGE.partition("## Promises and their tests")[2].splitlines()
    if line.startswith("| ") and "::" in line
]


@pytest.mark.parametrize("row", PROMISES, ids=lambda row: row.split("|")[1].strip()[:60])
def test_every_promise_names_tests_that_exist(row: str) -> None:
    for name in re.findall(r"`(\S+)::", row):
        find_test_file(name)
    for file, test in re.findall(r"`(\S+)::(\w+)`", row):
        assert test in names_in(find_test_file(file)), f"{file} has no {test}"


def test_there_are_promises() -> None:
    assert len(PROMISES) > 10


@pytest.fixture(scope="module")
def bench() -> Any:
    """bench/bench_distributed.py as a module; bench is no package."""
    path = ROOT / "bench" / "bench_distributed.py"
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location("bench_distributed", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(path.parent))


def test_the_model_on_paper_is_the_one_that_the_bench_computes(bench: Any) -> None:
    assert bench.paper_table() in PAGE


def test_the_committed_bytes_follow_the_formulas_of_the_page(bench: Any) -> None:
    folders = sorted((ROOT / "bench" / "results").glob("distributed_*"))
    assert folders
    for folder in folders:
        content = json.loads((folder / "measurements.json").read_text())
        assert bench.scaling_table(content["rows"]) in (folder / "README.md").read_text()
        assert f"{folder.name}/README.md" in PAGE
        num_params, num_tasks = content["config"]["num_params"], content["config"]["num_tasks"]
        gradients = {
            "DDP, no balancer": 2,
            "DDP, risks": 2,
            "DDP, grads": num_tasks + 1,
            "fully_shard, no balancer": 4,
            "fully_shard, balanced": 3 * num_tasks + 1,
        }
        for row in content["rows"]:
            share = (row["processes"] - 1) / row["processes"]
            expected = share * gradients[row["variant"]] * num_params * 4
            # The heads, their messages, and the two exchanges.
            assert row["bytes_sent"] == pytest.approx(expected, rel=0.01, abs=10_000)
