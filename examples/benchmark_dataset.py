"""A data set of one's own for the benchmark: two questions about a handwritten digit, one with wrong labels.

excessmtl benchmark --datasets digits,examples/benchmark_dataset.py --methods uniform,groupdro --quick
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from excessmtl_ext.data import MultiTaskData, Task
from excessmtl_ext.data.tabular import Table, make_tabular_data
from excessmtl_ext.models import EncoderHeads, mlp
from excessmtl_ext.training.benchmark.datasets import Dataset

TASKS = (Task("digit", 10), Task("is_even", 2, is_noisy=True))


def load(*, noise: float, seed: int, num_train: int | None) -> MultiTaskData:
    """Makes the splits; ``noise``: share of the training labels of ``is_even`` drawn anew."""
    digits = load_digits()
    labels = torch.from_numpy(digits.target).long()
    pixels = torch.from_numpy(digits.data)
    table = Table("digit-questions", pixels, TASKS, (labels, (labels + 1) % 2))
    return make_tabular_data(table, noise=noise, seed=seed, num_train=num_train)


def build_model(data: MultiTaskData) -> EncoderHeads:
    """Makes the network; the benchmark has seeded its initial parameters."""
    return mlp((64,), [task.num_outputs for task in data.tasks], hidden=(32,))


# Methods are ranked at the last dose.
DATASETS = [
    Dataset(
        "digit-questions",
        "Questions about a digit",
        load,
        build_model,
        doses={"none": {"noise": 0.0}, "80%": {"noise": 0.8}},
        epochs=20,
        batch_size=64,
        quick=(256, 2),
    ),
]
