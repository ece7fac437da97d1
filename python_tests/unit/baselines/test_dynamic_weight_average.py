"""DynamicWeightAverage: Eq. 7 of Liu et al. over the epochs' mean losses."""

from __future__ import annotations

import math

import pytest
import torch

from excessmtl_ext import DynamicWeightAverage


def test_three_epochs_by_hand() -> None:
    balancer = DynamicWeightAverage(num_tasks=2, temperature=2.0)
    for means in ([4.0, 1.0], [2.0, 1.0]):
        assert balancer.update_weights(losses=[1.0, 9.0]).tolist() == [0.5, 0.5]
        balancer.end_epoch(torch.tensor(means))
    # The losses are 1/2 and 1 of those before.
    odds = math.exp((1.0 - 0.5) / 2)
    weights = balancer.update_weights(losses=[1.0, 9.0]).tolist()
    assert weights == pytest.approx([1 / (1 + odds), odds / (1 + odds)])
    balancer.end_epoch([1.0, 2.0])
    odds = math.exp((2.0 - 0.5) / 2)
    assert balancer.update_weights(losses=[1.0, 9.0])[0].item() == pytest.approx(1 / (1 + odds))


def test_the_means_are_those_of_the_steps_since_the_last_epoch() -> None:
    shared = torch.nn.Parameter(torch.zeros(2))
    balancer = DynamicWeightAverage([shared], num_tasks=2)

    def step(*losses: float | None) -> None:
        balancer.backward([None if loss is None else shared.sum() + loss for loss in losses])

    step(4.0, 1.0)
    step(2.0, None)
    step(float("nan"), 1.0)  # does not count
    balancer.end_epoch()
    assert balancer.epoch_means[1].tolist() == [3.0, 1.0]
    step(6.0, None)
    balancer.end_epoch()
    # A task without a loss keeps its latest mean: its ratio is 1.
    assert balancer.epoch_means.tolist() == [[3.0, 1.0], [6.0, 1.0]]
    step(1.0, 1.0)
    odds = math.exp((2.0 - 1.0) / 2.0)
    assert balancer.task_weights[0].item() == pytest.approx(odds / (1 + odds))
    before = balancer.epoch_means.clone()
    balancer.end_epoch()
    balancer.end_epoch()  # an epoch without a step says nothing
    assert balancer.epoch_means.tolist() == [before[1].tolist(), [1.0, 1.0]]


def test_wrong_arguments_raise() -> None:
    with pytest.raises(ValueError, match="`temperature` > 0, but got -1"):
        DynamicWeightAverage(num_tasks=2, temperature=-1)
    with pytest.raises(ValueError, match=r"`mean_losses` of shape \[2\].*but got \[3\]"):
        DynamicWeightAverage(num_tasks=2).end_epoch([1.0, 2.0, 3.0])
