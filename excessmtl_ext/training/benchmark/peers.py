"""Published methods that the benchmark takes from other packages, under the package's own contract.

Each takes the gradients of a step in which every task is present. Weights sum to 1 and act on the
shared parameters; heads get the gradient of their own loss, as under every method of the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from excessmtl_ext.baselines.gramian import GramianBalancer, Matrix


class UPGrad(GramianBalancer):
    """Projects each gradient onto the cone of no conflict and averages (Quinton & Rey 2024, arXiv 2406.16232)."""

    requires = frozenset({"task_grads"})

    def _solve(self, gramian: Matrix) -> Matrix | None:
        from scipy.optimize import nnls

        # The projection of gradient i is the shortest combination with weights of at least those of i alone.
        values, vectors = np.linalg.eigh(gramian / np.trace(gramian))
        root = np.sqrt(values.clip(0))[:, None] * vectors.T
        weights = np.eye(len(gramian))
        for row in weights:
            row += nnls(root, -root @ row)[0]
        total = weights.sum(0)
        return total / total.sum()


class GramianWeights(GramianBalancer):
    """Weights that a ``Weighting`` of torchjd makes from the Gramian.

    Args:
        shared_parameters: What all tasks share.
        make: Makes the weighting.
    """

    requires = frozenset({"task_grads"})

    def __init__(
        self, shared_parameters: Iterable[Tensor], *, make: Callable[[], Any], **convention: Any
    ) -> None:
        super().__init__(shared_parameters, **convention)
        self._weighting = make()

    def _solve(self, gramian: Matrix) -> Matrix | None:
        weights = self._weighting(torch.from_numpy(gramian / np.trace(gramian))).numpy()
        total = weights.sum()
        return weights / total if total > 1e-12 * np.abs(weights).sum() else None
