"""A batch in which all labels of a task are ignored: a loss of NaN with a gradient of 0 teaches nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from _asserts import assert_equal_bits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from excessmtl_ext import (
    FAMO,
    IMTL,
    Balancer,
    DualBalancing,
    DynamicWeightAverage,
    GradNorm,
    GroupDRO,
    SmoothTchebycheff,
    UncertaintyWeights,
)

MAKERS: dict[str, Callable[..., Balancer]] = {
    "group_dro": GroupDRO,
    "gradnorm": GradNorm,
    "uncertainty": UncertaintyWeights,
    "dwa": DynamicWeightAverage,
    "famo": FAMO,
    "stch": SmoothTchebycheff,
    "dbmtl": DualBalancing,
    "imtl_l": lambda parameters, **options: IMTL(parameters, variant="L", **options),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_step_is_flagged_and_skipped_and_moves_no_weight(name: str) -> None:
    torch.manual_seed(0)
    encoder, heads = nn.Linear(4, 3), [nn.Linear(3, 2) for _ in range(2)]
    balancer = MAKERS[name](encoder.parameters(), num_tasks=2)
    inputs, labels = torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)

    def losses(is_ignored: bool) -> list[Tensor]:
        features = encoder(inputs)
        given = torch.full_like(labels, -100) if is_ignored else labels
        return [cross_entropy(heads[0](features), labels), cross_entropy(heads[1](features), given)]

    balancer.backward(losses(is_ignored=False))
    names = balancer.state_tensors().keys() - {"found_nonfinite", "num_skipped_steps"}
    before = [balancer.state_tensors()[each].clone() for each in names]
    encoder.zero_grad()
    balancer.backward(losses(is_ignored=True))
    assert balancer.found_nonfinite.tolist() == [False, True]
    assert int(balancer.num_skipped_steps) == 1
    assert_equal_bits([balancer.state_tensors()[each] for each in names], before)
    assert encoder.weight.grad is not None
    assert bool(encoder.weight.grad.isnan().all())  # so that a guard skips the optimizer, too
