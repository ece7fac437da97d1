"""A config refuses values that no run can have."""

from __future__ import annotations

from typing import Any

import pytest

from excessmtl_ext.training import TrainConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "Expected `epochs` of at least 1, but got 0"),
        ({"batch_size": -1}, "Expected `batch_size` of at least 1, but got -1"),
        ({"num_workers": -1}, "Expected `num_workers` of at least 0, but got -1"),
        ({"lr": 0.0}, "Expected `lr` > 0, but got 0.0"),
        ({"lr": float("nan")}, "Expected `lr` > 0, but got nan"),
        ({"weight_decay": -0.1}, "Expected `weight_decay` >= 0, but got -0.1"),
        ({"noise": 1.1}, r"Expected `noise` in \[0, 1\], but got 1.1"),
    ],
)
def test_values_out_of_range_are_errors(change: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"dataset": "digits", "method": "uniform"}
    values |= {"epochs": 1, "batch_size": 1, "lr": 1e-3, **change}
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)
