"""States saved by older releases load to the bit, and training goes on from them."""

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

FOLDER = Path(__file__).parent / "saved_states"
FIRST, SECOND = (
    torch.load(FOLDER / name, weights_only=True) for name in ("first_format.pt", "second_format.pt")
)
SAVED: dict[str, dict[str, Any]] = {
    **{f"first_{name}": entry for name, entry in FIRST.items()},
    **{f"second_{name}": entry for name, entry in SECOND.items()},
}
"""By name: the method, its options and its state after 5 steps of 3 tasks on ``nn.Linear(4, 3)``, or before them.

The first were saved when Eq. 9 was the default; the second by the last release whose
``_extra_state`` was a dict.
"""


def made_for(name: str, encoder: nn.Module) -> Balancer:
    """The balancer that the state was saved by."""
    entry = SAVED[name]
    options = dict(entry["options"])
    if "state_dtype" in options:
        options["state_dtype"] = getattr(torch, options["state_dtype"])
    if entry["method"] == "ExcessMTL" and name.startswith("first"):
        options = {**PUBLISHED, **options}
    return getattr(excessmtl_ext, entry["method"])(encoder.parameters(), num_tasks=3, **options)


@pytest.mark.parametrize("name", SAVED)
def test_an_older_state_loads_to_the_bit_and_the_next_step_counts(name: str) -> None:
    torch.manual_seed(1)
    encoder, heads = nn.Linear(4, 3), [nn.Linear(3, 1) for _ in range(3)]
    balancer, saved = made_for(name, encoder), SAVED[name]["state"]
    num_calls = 0 if "before_the_first_step" in name else 5
    balancer.load_state_dict(saved)
    loaded = balancer.state_tensors()
    tensors = [key for key, value in saved.items() if isinstance(value, torch.Tensor)]
    assert "task_weights" in tensors
    sized = [key for key in tensors if saved[key].numel() > 0]
    assert_equal_bits([loaded[key] for key in sized], [saved[key] for key in sized])
    for key in set(tensors) - set(sized):  # the size came with the first step then
        assert not bool(loaded[key].any())
    assert balancer.num_calls == saved["_extra_state"]["num_calls"] == num_calls
    before = int(balancer.num_steps)
    features = encoder(torch.randn(6, 4))
    losses = [head(features).square().mean() for head in heads]
    balancer.backward(losses)
    assert balancer.num_calls == num_calls + 1
    assert int(balancer.num_steps) == before + ("rotation" not in name or 6 % 3 == 0)
    assert bool(balancer.task_weights.isfinite().all())


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_of_an_older_state_holds_the_same(name: str) -> None:
    old, new = (made_for(name, nn.Linear(4, 3)) for _ in range(2))
    old.load_state_dict(SAVED[name]["state"])
    state = old.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    new.load_state_dict(state)
    assert_equal_bits(list(new.state_tensors().values()), list(old.state_tensors().values()))
    assert new.host_state() == old.host_state()
