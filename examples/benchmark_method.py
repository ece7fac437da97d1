"""A method of one's own for the benchmark: random weights, anew in every step (Lin et al., TMLR 2022).

excessmtl benchmark --methods uniform,excessmtl-recommended,examples/benchmark_method.py --quick
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from excessmtl_ext.baselines.loss_based import LossBalancer, Rows
from excessmtl_ext.training.benchmark.methods import Method


class RandomWeights(LossBalancer):
    """Weights tasks by the softmax of normal numbers.

    Args:
        shared_parameters: What all tasks share.
        scale: Standard deviation of the numbers.
    """

    def __init__(self, shared_parameters: Any, *, scale: float = 1.0, **convention: Any) -> None:
        super().__init__(shared_parameters, **convention)
        self.scale = scale

    def log_weights(self, losses: Tensor, tasks: Rows) -> Tensor:
        """Returns log-weights; the benchmark has seeded torch's global generator."""
        return self.scale * torch.randn_like(losses)


# At most five settings; the benchmark chooses one per data set, by the noisy validation labels.
METHODS = [
    Method("random", "Random weights", RandomWeights, settings=({"scale": 1.0}, {"scale": 0.3})),
]
