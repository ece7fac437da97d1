"""FAMO: weights of log-losses, and logits that lift the task that falls least."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from excessmtl_ext import FAMO


def test_weights_are_those_of_log_losses() -> None:
    weights = FAMO(num_tasks=2).update_weights(losses=[1.0, 4.0])
    assert weights.tolist() == pytest.approx([0.8, 0.2])


def test_the_logits_are_those_of_algorithm_1_under_torchs_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    balancer = FAMO(num_tasks=3, learning_rate=0.1, decay=0.01)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1, weight_decay=0.01)
    for _ in range(30):
        before, after = torch.rand(2, 3, generator=generator, dtype=torch.float64) + 0.1
        weights = balancer.update_weights(losses=before)
        expected = logits.detach().softmax(0) / before
        torch.testing.assert_close(weights, expected / expected.sum(), rtol=1e-12, atol=0)
        balancer.after_step(after)
        optimizer.zero_grad()
        (logits.softmax(0) * (before.log() - after.log())).sum().backward()
        optimizer.step()
    torch.testing.assert_close(balancer.learned, logits.detach(), rtol=1e-11, atol=0)


def test_the_task_that_falls_least_gains() -> None:
    balancer = FAMO(num_tasks=2, learning_rate=0.1)
    for _ in range(20):
        balancer.update_weights(losses=[1.0, 1.0])
        balancer.after_step([0.5, 0.9])
    assert balancer.update_weights(losses=[1.0, 1.0])[1].item() > 0.6


def test_after_step_counts_once_and_only_after_a_step_that_counts() -> None:
    balancer = FAMO(num_tasks=2, learning_rate=0.1)
    balancer.after_step([0.5, 0.9])  # there was no step
    assert balancer.learned.tolist() == [0.0, 0.0]
    balancer.update_weights(losses=[1.0, 1.0])
    balancer.after_step([float("nan"), 0.9])  # says nothing
    assert balancer.learned.tolist() == [0.0, 0.0]
    balancer.after_step(torch.tensor([0.5, 0.9]))
    once = balancer.learned.tolist()
    assert once == pytest.approx([-0.1, 0.1])
    balancer.after_step([0.1, 0.9])
    balancer.update_weights(losses=[1.0, float("inf")])
    balancer.after_step([0.1, 0.9])
    assert balancer.learned.tolist() == once


def test_an_absent_task_keeps_its_logit() -> None:
    shared = nn.Parameter(torch.zeros(2))
    balancer = FAMO([shared], num_tasks=3, learning_rate=0.1, decay=0.5)
    balancer.update_weights(losses=[1.0, 1.0, 1.0])
    balancer.after_step([0.9, 0.8, 0.7])
    before = balancer.learned.clone()
    losses = [shared.sum() + 1.0, None, shared.sum() + 1.0]
    balancer.backward(losses)
    balancer.after_step([loss if loss is None else loss * 0.9 for loss in losses])
    assert balancer.learned[1] == before[1]
    assert balancer.num_learning_steps.tolist() == [2, 1, 2]


def test_a_loop_that_forgets_after_step_is_told_once() -> None:
    balancer = FAMO(num_tasks=2)
    with pytest.warns(UserWarning, match=r"10 steps without after_step\(losses\): its logits rest"):
        for _ in range(10):
            balancer.update_weights(losses=[1.0, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            balancer.update_weights(losses=[1.0, 2.0])


def test_wrong_arguments_raise() -> None:
    with pytest.raises(ValueError, match="`learning_rate` > 0, but got -1"):
        FAMO(num_tasks=2, learning_rate=-1)
    with pytest.raises(ValueError, match="`decay` >= 0 and finite, but got -1"):
        FAMO(num_tasks=2, decay=-1)
    with pytest.raises(TypeError, match="`decay` to be a number"):
        FAMO(num_tasks=2, decay=True)
    with pytest.raises(ValueError, match="`losses` to hold 2 losses, one per task, but got 3"):
        FAMO(num_tasks=2).after_step([1.0, 2.0, 3.0])
