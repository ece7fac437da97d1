"""Probabilities of domains: proportions times weights, and how they follow a balancer."""

from __future__ import annotations

import math

import pytest
import torch

from excessmtl_ext import GroupDRO
from excessmtl_ext.domains import DomainWeights


def test_probabilities_are_proportions_times_weights():
    weights = DomainWeights(3, proportions=[2, 1, 1])
    assert weights.probabilities.tolist() == [0.5, 0.25, 0.25]
    weights.update(torch.tensor([1.0, 2.0, 0.0]))
    assert weights.probabilities.tolist() == [0.5, 0.5, 0.0]
    assert weights.bounds() == [0.5, 1.0]


def test_smoothing_keeps_a_share_for_the_proportions():
    weights = DomainWeights(2, smoothing=0.5)
    weights.update([1.0, 0.0])
    assert weights.probabilities.tolist() == [0.75, 0.25]


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [-1.0, 2.0], [0.0, 0.0], [math.inf, 1.0]])
def test_weights_that_are_none_change_nothing(bad: list[float]):
    weights = DomainWeights(2)
    weights.update([1.0, 3.0])
    weights.update(bad)
    assert weights.probabilities.tolist() == [0.25, 0.75]


def test_they_follow_a_balancer_every_so_many_steps():
    balancer = GroupDRO(num_tasks=2, robust_step_size=1.0)
    weights = DomainWeights(2).follow(balancer, every=2)
    balancer.update_weights(losses=[1.0, 0.0])
    assert weights.probabilities.tolist() == [0.5, 0.5]
    balancer.update_weights(losses=[1.0, 0.0])
    torch.testing.assert_close(weights.probabilities, torch.tensor([2.0, 0.0]).double().softmax(0))


def test_losses_of_absent_domains_keep_their_weight():
    balancer = GroupDRO(num_tasks=3, robust_step_size=1.0)
    balancer.update_weights(losses=[torch.tensor(1.0), None, torch.tensor(0.0)])
    assert balancer.task_weights[1].item() == pytest.approx(1 / 3)
    assert balancer.task_weights[0].item() == pytest.approx(2 / 3 * math.e / (math.e + 1))
    balancer.update_weights(losses=[None, None, None])
    assert balancer.num_calls == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_domains": 2, "proportions": [1.0]}, "`proportions` to hold 2 finite numbers"),
        ({"num_domains": 2, "proportions": [1.0, -1.0]}, "`proportions` to hold 2 finite numbers"),
        ({"num_domains": 2, "proportions": [0.0, 0.0]}, "a number above 0, but all are 0"),
        ({"num_domains": 2, "smoothing": 1.0}, r"`smoothing` in \[0, 1\)"),
        ({"num_domains": 0}, "`num_domains` >= 1"),
    ],
)
def test_wrong_arguments_raise(arguments: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        DomainWeights(**arguments)  # type: ignore[arg-type]


def test_a_balancer_of_other_tasks_is_refused():
    with pytest.raises(ValueError, match=r"`weights` of shape \[3\], but got \[2\]"):
        DomainWeights(3).follow(GroupDRO(num_tasks=2))
