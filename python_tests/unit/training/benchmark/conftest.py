"""A data set of a user's own, so small that a trial takes a moment."""

from __future__ import annotations

from pathlib import Path

import pytest

OWN_DATASETS = """
import time
from pathlib import Path

from excessmtl_ext.data import load_digit_pairs
from excessmtl_ext.models import mlp
from excessmtl_ext.training.benchmark.datasets import Dataset

HERE = Path(__file__).parent


def load(*, noise, seed, num_train):
    while (HERE / f"hold_{seed}").exists():
        (HERE / f"held_{seed}").touch()
        time.sleep(0.02)
    if (HERE / "fail").exists() and seed == 1:
        raise RuntimeError("broken loader")
    return load_digit_pairs(noise=noise, seed=seed, num_train=num_train)


def build_model(data):
    return mlp((1, 12, 12), [10, 10], hidden=(8,))


DATASETS = [
    Dataset(
        name, name.upper(), load, build_model, {"none": {"noise": 0.0}, "some": {"noise": 0.5}},
        epochs=2, batch_size=64, num_train=128, quick=(64, 1),
    )
    for name in ("one", "two")
]
"""


@pytest.fixture
def own_datasets(tmp_path: Path) -> Path:
    path = tmp_path / "datasets.py"
    path.write_text(OWN_DATASETS)
    return path
