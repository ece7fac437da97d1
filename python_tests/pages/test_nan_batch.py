"""The loops that people copy survive a batch with a NaN: it costs one step, and training goes on."""

from __future__ import annotations

import runpy
from functools import partial
from typing import Any

import pytest
import torch
from _paths import ROOT
from _snippets import NanTarget, parameters_of, run_blocks
from torch import nn

from excessmtl_ext import ExcessMTL, SkippedStepsWarning, Uniform

LOOPS = {  # page: shape of the targets, steps
    "README.md": ((32, 3), 100),
    "docs/quickstart.md": ((32, 3), 100),
    "AGENTS.md": ((32, 1), 20),
}


@pytest.mark.parametrize("page", LOOPS)
def test_one_nan_target_costs_one_step(page, monkeypatch):
    shape, num_steps = LOOPS[page]
    monkeypatch.setattr(torch, "randn", NanTarget(shape, call=5))
    names = run_blocks(ROOT / page)
    balancer = names["balancer"]
    assert balancer.num_skipped_steps.item() == 1
    assert balancer.num_steps.item() == num_steps - 1
    assert all(parameter.isfinite().all() for parameter in parameters_of(names))
    assert balancer.task_weights.std() > 0
    steps = {state["step"].item() for state in names["optimizer"].state.values()}
    assert max(steps) == num_steps - 1  # training went on to the end


@pytest.mark.parametrize("page", LOOPS)
def test_without_the_guard_the_same_target_ruins_the_model(page, monkeypatch, tmp_path):
    """The test above can fail: what it asserts does not hold without the guard."""
    text = (ROOT / page).read_text(encoding="utf-8")
    guard = "if not balancer.found_nonfinite.any():"
    assert guard in text
    copy = tmp_path / "page.md"
    copy.write_text(text.replace(guard, "if True:"), encoding="utf-8")
    monkeypatch.setattr(torch, "randn", NanTarget(LOOPS[page][0], call=5))
    with pytest.warns(SkippedStepsWarning, match="10 steps in a row"):
        names = run_blocks(copy)
    assert not all(parameter.isfinite().all() for parameter in parameters_of(names))


@pytest.fixture(scope="module")
def own_loop() -> dict[str, Any]:
    """The names of examples/own_loop.py after it has run."""
    return runpy.run_path(str(ROOT / "examples" / "own_loop.py"), run_name="__main__")


@pytest.mark.parametrize("make_balancer", [Uniform, partial(ExcessMTL.from_preset, "recommended")])
def test_the_own_loop_survives_under_every_method(make_balancer, own_loop):
    names = own_loop
    torch.manual_seed(0)
    model, y = names["Network"](), names["y"].clone()
    y[7, 1] = float("nan")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    balancer = make_balancer(model.encoder.parameters(), num_tasks=3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):
        names["train_epoch"](model, balancer, optimizer, names["x"], y)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert all(
        not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)
    )
    (steps,) = {int(state["step"]) for state in optimizer.state.values()}
    assert steps == 2 * 32 - 2  # one batch of each epoch holds the NaN


def test_the_step_for_a_graph_skips_on_the_device():
    names = runpy.run_path(str(ROOT / "examples" / "cuda_graph.py"), run_name="__main__")
    parameters = [*names["encoder"].parameters(), *names["heads"].parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    bad = names["y"][:64].clone()
    bad[3, 1] = float("nan")
    names["step"]((names["x"][:64], bad))
    assert all(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
    names["step"]((names["x"][:64], names["y"][:64]))
    assert all(parameter.isfinite().all() for parameter in parameters)
    assert not any(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
    assert names["balancer"].num_skipped_steps.item() == 1


def test_a_streamed_step_with_a_nan_is_skipped():
    names = runpy.run_path(str(ROOT / "examples" / "many_tasks.py"), run_name="__main__")
    balancer, optimizer = names["balancer"], names["optimizer"]
    parameters = [*names["encoder"].parameters(), *names["heads"].parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.zero_grad()
    for task in range(names["NUM_TASKS"]):
        balancer.accumulate(task, names["task_loss"](task) * (float("nan") if task == 3 else 1.0))
    balancer.finish()
    if not balancer.found_nonfinite.any():
        optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
    assert nn.utils.get_total_norm([p.grad for p in parameters]).isnan()
