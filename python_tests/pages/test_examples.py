"""The programs that the tutorials quote run, without a warning, and show what the tutorials say of them."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from typing import Any

import pytest
import torch
from _paths import ROOT, TESTS
from click.testing import CliRunner

from excessmtl_ext.training.benchmark.page import read_results
from excessmtl_ext.training.cli import main

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str) -> dict[str, Any]:
    """The program's names after it has run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sizes at which a second thread only costs
    try:
        return runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    finally:
        torch.set_num_threads(threads)


def test_own_loop_keeps_the_noisy_task_down_and_the_others_better_than_uniform(capsys):
    names = run("own_loop.py")
    uniform, balanced = names["test_errors"]["Uniform"], names["test_errors"]["ExcessMTL"]
    assert all(ours < theirs for ours, theirs in zip(balanced, uniform, strict=True))
    weights = names["balancer"].task_weights
    assert weights[names["NOISY"]] == weights.min() < 0.3
    printed = capsys.readouterr().out
    assert "torque looks noisy" in printed
    assert "bit for bit" in printed
    assert torch.equal(
        names["stateful"]["balancer"].sq_grad_sum, names["resumed"]["balancer"].sq_grad_sum
    )


def test_one_backward_keeps_the_noisy_task_down_and_counts_each_task(capsys):
    names = run("one_backward.py")
    balancer = names["balancer"]
    # 150 steps, a third of them without the first task, and one beside the network that took the state over.
    assert balancer.num_task_steps.tolist() == [101, 151, 151, 151]
    assert balancer.task_weights.argmin() == 3
    assert "validation loss" in capsys.readouterr().out


def test_amp_counts_all_steps_but_the_one_that_overflowed(capsys):
    names = run("amp.py")
    balancer = names["balancer"]
    assert balancer.num_steps.item() == 19
    assert balancer.num_skipped_steps.item() == 1
    assert names["scaler"].get_scale() != 2.0**10
    assert all(parameter.isfinite().all() for parameter in names["encoder"].parameters())
    assert "19 steps counted, 1 skipped" in capsys.readouterr().out


def test_a_graph_replays_every_step_but_those_that_warm_up(capsys):
    names = run("cuda_graph.py")
    assert names["step"].num_graphs == int(torch.cuda.is_available())
    assert names["balancer"].num_steps.item() == 32
    assert names["losses"].isfinite().all()
    assert "32 steps counted, 0 skipped" in capsys.readouterr().out


def test_a_task_without_labels_keeps_its_weight_share(capsys):
    names = run("missing_labels.py")
    assert names["balancer"].num_task_steps.tolist() == [24, 24, 12]
    weights = torch.stack(names["weights"])
    assert (weights - 1 / 3).abs().max() < 0.02  # of 12 and of 24 gradients
    assert "took part in 12 of 24 steps" in capsys.readouterr().out


def test_many_tasks_streamed_agree_with_all_at_once(capsys):
    names = run("many_tasks.py")
    assert names["balancer"].task_weights.shape == (40,)
    assert names["grads"]["streamed"][0].abs().max() > 0
    assert "agree" in capsys.readouterr().out


def test_domains_are_compared_and_a_stopped_run_goes_on(tmp_path, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        names = runpy.run_path(str(ROOT / "examples" / "domains.py"), run_name="domains")
        words = ["--quick", "--steps", "3", "--output", str(tmp_path / "runs")]
        names["main"]([*words, "--methods", "Uniform", "ExcessMTL, sampler"])
        first = capsys.readouterr().out
        folder = tmp_path / "runs_quick"
        before = (folder / "scores.csv").read_text()
        table = names["main"](words)
    finally:
        torch.set_num_threads(threads)
    assert "ExcessMTL, sampler: step 3" in first
    assert "Uniform: step" not in capsys.readouterr().out  # it was there already
    scores = names["read"](folder / "scores.csv")
    assert (folder / "scores.csv").read_text().startswith(before)
    assert len(scores) == 5 * 6  # methods, domains
    for method in names["BY_DEFAULT"]:
        rows = [row for row in scores if row["method"] == method]
        assert sum(float(row["mean_weight"]) for row in rows) == pytest.approx(1, abs=1e-3)
        # A model of bytes that has learned nothing yet needs some 8 bits for each.
        assert all(5 < float(row["bits_per_byte"]) < 10 for row in rows)
    assert len(table) == 2 + 5
    assert {row["method"] for row in names["read"](folder / "speeds.csv")} == set(names["METHODS"])


@pytest.mark.slow
def test_several_processes_end_with_the_same_weights_however_they_share_the_model():
    weights = []
    for kind in ("ddp", "fsdp"):
        printed = subprocess.run(
            [sys.executable, "-W", "error::UserWarning", "-m", "torch.distributed.run", "--standalone",
             "--nproc-per-node", "2", str(ROOT / "examples" / "several_processes.py"), kind],
            capture_output=True, text=True, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert printed.returncode == 0, printed.stderr
        assert "resumed bit for bit" in printed.stdout
        weights.append(json.loads(re.findall(r"2 processes: weights (\[.*\])", printed.stdout)[0]))
    assert weights[0] == pytest.approx(weights[1], abs=1e-5)
    assert max(weights[0]) - min(weights[0]) > 0.005


def test_the_benchmark_takes_a_method_and_a_data_set_from_one_file_each(tmp_path):
    method, dataset = (
        str(ROOT / "examples" / name) for name in ("benchmark_method.py", "benchmark_dataset.py")
    )
    words = ["benchmark", "--output", str(tmp_path), "--quick", "--seeds", "1"]
    words += ["--datasets", f"digits,{dataset}", "--methods", f"uniform,{method}"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    tables = read_results(tmp_path)["tables"]
    assert {table["dataset"] for table in tables} == {"digits", "digit-questions"}
    for table in tables:
        assert [line["label"] for line in table["methods"]] == ["Uniform", "Random weights"]
        first, second = (line["scores"]["all, selected"]["mean"] for line in table["methods"])
        assert first != second
    (noisy,) = [table for table in tables if table["dataset"] == "digit-questions"][1:]
    assert noisy["noise_shares"]["is_even"] == pytest.approx(0.4, abs=0.1)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_run_by_a_test(path):
    tests = [*TESTS.rglob("test_*.py")]
    assert any(f'"{path.name}"' in test.read_text(encoding="utf-8") for test in tests)
