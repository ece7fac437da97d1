"""A config refuses values that no run can have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from excessmtl_ext.training import TrainConfig, train

INF, NAN = float("inf"), float("nan")


def make_config(**change: Any) -> TrainConfig:
    values: dict[str, Any] = {"dataset": "digits", "method": "uniform"}
    return TrainConfig(**{**values, "epochs": 1, "batch_size": 1, "lr": 1e-3, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "Expected `epochs` of at least 1, but got 0"),
        ({"epochs": 10**30}, r"Expected `epochs` of at most 1,000,000, but got 1e\+30"),
        ({"epochs": 1.5}, "Expected `epochs` to be a whole number, but got 1.5"),
        ({"epochs": True}, "Expected `epochs` to be a whole number, but got True"),
        ({"batch_size": -1}, "Expected `batch_size` of at least 1, but got -1"),
        ({"batch_size": 2**63}, "Expected `batch_size` of at most 10,000,000"),
        ({"num_workers": -1}, "Expected `num_workers` of at least 0, but got -1"),
        ({"num_workers": 10**6}, "Expected `num_workers` of at most 256"),
        ({"task_weight_interval": "3"}, "Expected `task_weight_interval` to be a whole number"),
        ({"seed": 2**63}, "Expected `seed` of at most 9,223,372,036,854,775,807, but got 9.22"),
        ({"seed": -(2**64)}, "Expected `seed` of at least -9223372036854775808"),
        ({"num_train": 0}, "Expected `num_train` of at least 1, but got 0"),
        ({"num_train": 10**40}, "Expected `num_train` of at most 1,000,000,000"),
        ({"image_size": 10**9}, "Expected `image_size` of at most 4,096"),
        ({"network_width": 10**9}, "Expected `network_width` of at most 4,096"),
        ({"lr": 0.0}, "Expected `lr` > 0, but got 0.0"),
        ({"lr": NAN}, "Expected `lr` > 0, but got nan"),
        ({"lr": INF}, "Expected `lr` to be finite, but got inf"),
        ({"lr": "fast"}, "Expected `lr` to be a number, but got 'fast'"),
        ({"weight_decay": -0.1}, "Expected `weight_decay` >= 0, but got -0.1"),
        ({"weight_decay": INF}, "Expected `weight_decay` to be finite, but got inf"),
        ({"noise": 1.1}, r"Expected `noise` in \[0, 1\], but got 1.1"),
        ({"noise": NAN}, r"Expected `noise` in \[0, 1\], but got nan"),
        ({"robust_step_size": INF}, "Expected `robust_step_size` to be finite, but got inf"),
        ({"robust_step_size": -1.0}, "Expected `robust_step_size` > 0, but got -1.0"),
        ({"device": None}, "Expected `device` to be a string, but got None"),
        ({"distributed": "dp"}, "Expected `distributed` to be 'ddp', 'fsdp' or None"),
        ({"method_options": {"eps": NAN}}, "Expected `method_options` that config.json can hold"),
        ({"method_options": {"eps": print}}, "Expected `method_options` that config.json can hold"),
    ],
)
def test_values_out_of_range_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**change)


def test_a_folder_of_data_may_be_a_path(tmp_path: Path) -> None:
    assert make_config(data_root=tmp_path).data_root == str(tmp_path)


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_every_seed_that_is_taken_can_be_run(tmp_path: Path, seed: int) -> None:
    config = make_config(seed=seed, batch_size=50, num_train=50)
    assert train(config, tmp_path)["final"]["step"] == 1
