"""Long runs: what 100,000 steps show (bench/long_run.py), over fewer; and where float32 sums stop growing."""

from __future__ import annotations

import gc
import importlib.util
import json
import sys

import pytest
import torch
from _paths import ROOT
from _published import published

from excessmtl_ext import functional as F
from excessmtl_ext.functional import ParamLayout, StepOptions, init_state

BENCH = ROOT / "bench"
RESULTS = sorted((BENCH / "results").glob("long_run_*/measurements.json"))


def assert_steady(result: dict, *, growth_mib: float) -> None:
    assert result["largest_error_of_the_sum"] < 1e-12
    assert len(set(result["tensors_after_a_tenth_and_at_the_end"])) == 1
    early, late = result["rss_mib_after_a_tenth_and_at_the_end"]
    assert late < early + growth_mib
    assert result["sq_grad_sum_relative_error"] < result["sq_grad_sum_bound"]
    assert result["task_weights_relative_error"] < 1e-3
    assert result["smallest_weight"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not BENCH.is_dir(), reason="the tests run outside a checkout")
def test_3000_steps_keep_sum_and_memory(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("long_run", BENCH / "long_run.py")
    assert spec is not None and spec.loader is not None
    long_run = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "long_run", long_run)
    spec.loader.exec_module(long_run)
    assert_steady(long_run.run(3_000), growth_mib=8.0)


def test_a_late_step_makes_the_calls_of_an_early_one():
    """Those of Python and of built-ins: what a step costs, counted instead of timed."""
    balancer = published(num_tasks=7, robust_step_size=0.02)
    generator = torch.Generator().manual_seed(0)

    def num_calls_of_a_step() -> int:
        rows = [[row] for row in torch.randn(7, 50, generator=generator)]
        num_calls = 0

        def count(frame, event, argument):
            nonlocal num_calls
            num_calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            balancer.update_weights(rows)
        finally:
            sys.setprofile(None)
        return num_calls

    gc.collect()
    gc.disable()  # finalisers of what other tests left would count
    try:
        counts = {step: num_calls_of_a_step() for step in range(600)}
    finally:
        gc.enable()
    assert counts[599] > 0
    assert {counts[step] for step in range(500, 600)} <= {counts[step] for step in range(100, 200)}


@pytest.mark.skipif(not RESULTS, reason="the tests run outside a checkout")
@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_the_committed_run_of_100000_steps_was_steady(path):
    result = json.loads(path.read_text())["result"]
    assert result["num_steps"] == 100_000
    assert_steady(result, growth_mib=8.0)
    assert result["step_us_in_the_last_tenth"] < 1.2 * result["step_us_in_the_first_tenth"]


def test_a_float32_sum_of_equal_squares_stops_at_2_to_the_24_of_them():
    """2^24 + 1 is no float32. Until there (16.8e6 steps) the sum is exact; then the risk stays at g^2 / sqrt(S)."""
    layout, options = ParamLayout([1]), StepOptions(num_warmup_steps=0)
    state = init_state(1, layout)
    state.sq_grad_sum[0, 0] = 2.0**24 - 1
    seen = []
    for _ in range(3):
        F.fused_step_([torch.ones(1)], layout, state, options)
        seen.append(state.sq_grad_sum[0, 0].item())
    assert seen == [2.0**24] * 3
    assert state.excess_risk.item() == pytest.approx(2.0**-12, rel=1e-6)
    assert int(state.num_skipped_steps) == 0


def test_small_squares_that_float32_drops_cost_at_most_2_to_the_minus_24_of_the_sum_each():
    """Worst case: every square is just below half a unit in the last place, and none is added."""
    num_steps, layout, options = 1_000, ParamLayout([1]), StepOptions(num_warmup_steps=0)
    narrow = init_state(1, layout)
    wide = init_state(1, layout, dtype=torch.float64)
    gradient = torch.full((1,), 0.999 * 2.0**-12)
    for state in (narrow, wide):
        state.sq_grad_sum[0, 0] = 1.0
    for _ in range(num_steps):
        F.fused_step_([gradient], layout, narrow, options)
        F.fused_step_([gradient], layout, wide, options)
    assert narrow.sq_grad_sum[0, 0].item() == 1.0
    error = 1.0 - narrow.sq_grad_sum[0, 0].item() / wide.sq_grad_sum[0, 0].item()
    assert 0.9 * num_steps * 2.0**-24 < error < num_steps * 2.0**-24
    assert narrow.excess_risk.item() == pytest.approx(
        wide.excess_risk.item(), rel=num_steps * 2.0**-25 + 1e-6
    )
