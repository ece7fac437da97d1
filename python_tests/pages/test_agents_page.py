"""AGENTS.md: what it tells a coding assistant to write works, and its five mistakes are mistakes."""

from __future__ import annotations

import re

import pytest
import torch
from _paths import ROOT
from _snippets import run_blocks
from torch import nn

from excessmtl_ext import ExcessMTL, Uniform

PAGE = ROOT / "AGENTS.md"
TEXT = PAGE.read_text(encoding="utf-8")


def small_model() -> tuple[nn.Module, nn.ModuleList, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(6, 4), nn.ModuleList([nn.Linear(4, 1) for _ in range(2)]), torch.randn(8, 6)


def losses_of(encoder, heads, x) -> list[torch.Tensor]:
    z = encoder(x)
    return [(head(z) - task).square().mean() for task, head in enumerate(heads)]


def test_the_loop_runs_with_a_task_that_is_absent_from_every_second_batch():
    names = run_blocks(PAGE)
    balancer = names["balancer"]
    assert balancer.num_steps.item() == 20
    assert balancer.num_task_steps.tolist() == [20, 10]
    assert balancer.excess_risk.min() > 0
    assert balancer.risk_share_sum.max() > 0
    resumed = ExcessMTL.from_preset("recommended", names["encoder"].parameters(), num_tasks=2)
    resumed.load_state_dict(names["checkpoint"]["balancer"])
    assert torch.equal(resumed.sq_grad_sum, balancer.sq_grad_sum)


def test_there_are_five_mistakes():
    mistakes = TEXT.partition("## The five mistakes")[2].partition("\n## ")[0]
    assert re.findall(r"^(\d)\. \*\*", mistakes, flags=re.MULTILINE) == list("12345")


def test_every_verb_and_option_of_the_page_exists():
    for name in re.findall(r"balancer\.(\w+)", TEXT):
        assert hasattr(ExcessMTL, name) or name in ExcessMTL(num_tasks=2).state_tensors(), name
    named = re.findall(r"\b(model|estimate_from|update_every|num_samples|features)=", TEXT)
    assert set(named) >= {"model", "estimate_from", "num_samples", "features"}


def test_heads_among_the_shared_parameters_are_weighted_and_enlarge_the_state():
    encoder, heads, x = small_model()
    everything = [*encoder.parameters(), *heads.parameters()]
    right = ExcessMTL(encoder.parameters(), num_tasks=2)
    right.backward(losses_of(encoder, heads, x))
    of_own_loss = heads[0].weight.grad.clone()
    for parameter in everything:
        parameter.grad = None
    wrong = ExcessMTL(everything, num_tasks=2)
    wrong.backward(losses_of(encoder, heads, x))
    torch.testing.assert_close(heads[0].weight.grad, of_own_loss / 2)
    assert wrong.sq_grad_sum.numel() > right.sq_grad_sum.numel()


def test_a_loss_of_zero_counts_as_a_step_of_the_task_and_none_does_not():
    steps = {}
    for missing in (0.0, None):
        encoder, heads, x = small_model()
        balancer = ExcessMTL(encoder.parameters(), num_tasks=2)
        balancer.backward(losses_of(encoder, heads, x))
        for _ in range(2):
            first, second = losses_of(encoder, heads, x)
            balancer.backward([first, None if missing is None else second * missing])
        steps[missing] = balancer.num_task_steps.tolist()
    assert steps == {0.0: [3, 3], None: [3, 1]}


def test_uniform_flags_no_gradient_and_the_total_norm_finds_it():
    encoder, heads, x = small_model()
    balancer = Uniform(encoder.parameters(), num_tasks=2)
    first, second = losses_of(encoder, heads, x)
    balancer.backward([first, second * float("nan")])
    assert not balancer.found_nonfinite.any()
    parameters = [*encoder.parameters(), *heads.parameters()]
    (check,) = re.findall(r"`(torch\.nn\.utils\.get_total_norm\(.*?\)\.isfinite\(\))`", TEXT)
    assert not eval(check, {"torch": torch, "parameters": parameters})


def test_one_pass_at_the_features_is_what_the_page_says():
    encoder, heads, x = small_model()
    balancer = ExcessMTL.from_preset(
        "recommended", encoder.parameters(), num_tasks=2, estimate_from="features"
    )
    for _ in range(5):
        z = encoder(x)
        losses = [(head(z) - task).square().mean() for task, head in enumerate(heads)]
        balancer.backward(losses, features=z)
    assert balancer.excess_risk.min() > 0
    assert balancer.risk_share_sum.max() > 0


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)\s:]+)\)", TEXT))
def test_links_of_the_page_work_in_the_repository(target):
    assert (ROOT / target).exists()
