"""States saved before the engines were split from the balancer load to the bit, and training goes on from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _asserts import assert_equal_bits
from _published import PUBLISHED
from torch import nn

import excessmtl_ext
from excessmtl_ext import Balancer

SAVED: dict[str, dict[str, Any]] = torch.load(
    Path(__file__).parent / "saved_states" / "first_format.pt", weights_only=True
)
"""By name: the method, its options and its state after 5 steps of 3 tasks on ``nn.Linear(4, 3)``."""


def made_for(entry: dict[str, Any], encoder: nn.Module) -> Balancer:
    """The balancer that the state was saved by."""
    options = dict(entry["options"])
    if "state_dtype" in options:
        options["state_dtype"] = getattr(torch, options["state_dtype"])
    if entry["method"] == "ExcessMTL":
        options = {**PUBLISHED, **options}
    return getattr(excessmtl_ext, entry["method"])(encoder.parameters(), num_tasks=3, **options)


@pytest.mark.parametrize("name", SAVED)
def test_an_older_state_loads_to_the_bit_and_the_next_step_counts(name: str) -> None:
    torch.manual_seed(1)
    encoder, heads = nn.Linear(4, 3), [nn.Linear(3, 1) for _ in range(3)]
    balancer, saved = made_for(SAVED[name], encoder), SAVED[name]["state"]
    balancer.load_state_dict(saved)
    loaded = balancer.state_dict()
    tensors = [key for key, value in saved.items() if isinstance(value, torch.Tensor)]
    assert "task_weights" in tensors
    assert_equal_bits([loaded[key] for key in tensors], [saved[key] for key in tensors])
    assert balancer.num_calls == saved["_extra_state"]["num_calls"] == 5
    before = int(balancer.num_steps)
    features = encoder(torch.randn(6, 4))
    losses = [head(features).square().mean() for head in heads]
    balancer.backward(losses)
    assert balancer.num_calls == 6
    assert int(balancer.num_steps) == before + (name != "excess_mtl_rotation" or 6 % 3 == 0)
    assert bool(balancer.task_weights.isfinite().all())
