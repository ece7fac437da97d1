"""How often each domain is drawn: probabilities in shared memory, which follow a balancer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from excessmtl_ext.arguments import check_count
from excessmtl_ext.balancer import Balancer


class DomainWeights:
    r"""Probabilities :math:`P_t \propto \pi_t w_t` of T domains, where w are the weights of a balancer.

    They lie in shared memory, so that the workers of a DataLoader see them change.

    Args:
        num_domains: T.
        proportions: :math:`\pi`, T numbers >= 0: how often the domains are drawn under equal weights, such as their
            sizes. None: equally often.
        smoothing: c in [0, 1): the share of draws that follow the proportions alone, so that no domain is lost:
            :math:`(1 - c) P_t + c\, \pi_t` (DoReMi takes 1e-3).

    Attributes:
        probabilities: [T], float64, sum 1; equal to the proportions at first.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> weights = DomainWeights(2, proportions=[3, 1])
        >>> weights.update([0.25, 0.75])
        >>> weights.probabilities.tolist()
        [0.5, 0.5]
    """

    def __init__(
        self,
        num_domains: int,
        *,
        proportions: Sequence[float] | None = None,
        smoothing: float = 0.0,
    ) -> None:
        check_count("num_domains", num_domains, 1)
        given = [1.0] * num_domains if proportions is None else list(map(float, proportions))
        if len(given) != num_domains or not all(0 <= each < float("inf") for each in given):
            raise ValueError(
                f"Expected `proportions` to hold {num_domains} finite numbers >= 0, but got {given}."
            )
        if not 0 <= smoothing < 1:
            raise ValueError(f"Expected `smoothing` in [0, 1), but got {smoothing}.")
        total = sum(given)
        if total == 0:
            raise ValueError("Expected `proportions` with a number above 0, but all are 0.")
        self.num_domains = num_domains
        self.smoothing = float(smoothing)
        self.proportions = torch.tensor([each / total for each in given], dtype=torch.float64)
        self.probabilities = self.proportions.clone().share_memory_()
        self._version = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._known = -1
        self._bounds: list[float] = []

    def update(self, weights: Tensor | Sequence[float]) -> None:
        """Takes new weights [T], >= 0; waits for their device. Weights that are not finite change nothing."""
        given = torch.as_tensor(weights).detach().to("cpu", torch.float64)
        if given.shape != self.proportions.shape:
            raise ValueError(
                f"Expected `weights` of shape [{self.num_domains}], but got {list(given.shape)}."
            )
        raw = self.proportions * given
        if not (raw.isfinite().all() and raw.sum() > 0 and (given >= 0).all()):
            return
        mixed = (1 - self.smoothing) * (raw / raw.sum()) + self.smoothing * self.proportions
        self.probabilities.copy_(mixed)
        self._version += 1

    def follow(self, balancer: Balancer, *, every: int = 1) -> DomainWeights:
        """Takes the weights of ``balancer`` now and after every ``every``-th step; returns itself.

        A balancer on a GPU is waited for each time.

        Raises:
            ValueError: it has another number of tasks.
        """
        check_count("every", every, 1)
        self.update(balancer.task_weights)
        balancer.observers.append(_Follower(self, every))
        return self

    def bounds(self) -> list[float]:
        """Returns the T - 1 upper bounds of all domains but the last one, for a number drawn from [0, 1)."""
        version = int(self._version)
        if version != self._known:
            self._bounds = list(accumulate(self.probabilities.tolist()))[:-1]
            self._known = version
        return self._bounds


class _Follower:
    """Hands the weights on after a step."""

    wants_gradients = False

    def __init__(self, weights: DomainWeights, period: int) -> None:
        self.weights = weights
        self.period = period

    def on_gradients(self, rule: Any, step: Any) -> None:
        """Looks at no gradient."""

    def on_end(self, rule: Any, step: Any, tasks: Sequence[int]) -> None:
        """Takes the weights over."""
        self.weights.update(rule.task_weights)

    def restart(self) -> None:
        """Goes on with the weights there were until the next step."""
