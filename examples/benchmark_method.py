"""A method of one's own for the benchmark: random weights, anew in every step (Lin et al., TMLR 2022).

excessmtl benchmark --methods uniform,excessmtl-recommended,examples/benchmark_method.py --quick
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from excessmtl_ext.training.benchmark.methods import Method
from excessmtl_ext.training.benchmark.peers import LossWeights


class RandomWeights(LossWeights):
    """Weights tasks by the softmax of normal numbers.

    Args:
        shared_parameters: What all tasks share.
        scale: Standard deviation of the numbers.
    """

    def __init__(self, shared_parameters: Any, *, scale: float = 1.0, **convention: Any) -> None:
        super().__init__(shared_parameters, **convention)
        self.scale = scale

    def weights_from(self, losses: Tensor) -> Tensor:
        """Returns weights [T]; the benchmark has seeded torch's global generator."""
        return (self.scale * torch.randn_like(losses)).softmax(0)


# At most five settings; the benchmark chooses one per data set, by the noisy validation labels.
METHODS = [
    Method("random", "Random weights", RandomWeights, settings=({"scale": 1.0}, {"scale": 0.3})),
]
