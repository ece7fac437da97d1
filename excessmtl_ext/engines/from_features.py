"""Risks from the gradients of what the encoder returned: the mode in which ``backward`` is given ``features``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from excessmtl_ext.engines.cheaper import CheaperEngine
from excessmtl_ext.engines.exact import guarded_weights, weights_of_heads
from excessmtl_ext.given_gradients import given_task_grads
from excessmtl_ext.passes.adapters import adapter_grads, check_feature
from excessmtl_ext.passes.cut import Cut
from excessmtl_ext.passes.per_task import HeadGrads
from excessmtl_ext.step import FisherRule, Step

if TYPE_CHECKING:
    import torch.distributed as dist


class FeatureEngine(CheaperEngine):
    """Risks from the gradients of the features, which the heads' passes give, then one pass of the encoder.

    Args:
        process_group: The ranks that come through ``split``; None for all.
        has_ranks: Whether the options name several ranks, with which ``backward`` does not work.
    """

    rows_described = "of the features' adapter, one per task"

    def __init__(
        self, process_group: dist.ProcessGroup | None = None, *, has_ranks: bool = False
    ) -> None:
        super().__init__()
        self.process_group = process_group
        self._has_ranks = has_ranks

    def run(self, rule: FisherRule, step: Step) -> Sequence[int]:
        """Runs a step as all engines do; one process only."""
        if self._has_ranks:
            raise NotImplementedError(
                "Expected one process for backward(losses, features=z) with estimate_from='features': several ranks "
                "take their steps in the graph. Use z_1, ..., z_T = balancer.split(z), then sum(losses).backward()."
            )
        return super().run(rule, step)

    def run_estimate(self, rule: FisherRule, step: Step) -> None:
        """Runs a step that moves the weights."""
        cut = _cut_at_features(rule, step)
        feature_grads, head_grads = cut.walk_heads(step)
        with torch.no_grad():
            rows = _adapter_rows(rule, cut, feature_grads)
            grads, _ = given_task_grads(rule, rows)
            self.take_estimate(rule, step, grads)
            weights = guarded_weights(rule)
        cut.walk_encoder_weighted(feature_grads, weights)
        if rule.head_weighting == "none":
            cut.deposit_heads(head_grads)
        else:
            present = {task: grads for task, grads in enumerate(head_grads) if grads}
            factors = weights_of_heads(rule, weights)
            assert factors is not None
            HeadGrads(cut.heads, present).add(factors)


def _cut_at_features(rule: FisherRule, step: Step) -> Cut:
    if step.features is None:
        raise ValueError(
            "Expected `features` with estimate_from='features': risks are estimated from their gradients. Call "
            "backward(losses, features=z) with what the encoder returned."
        )
    for index, z in enumerate(step.features):
        check_feature(z, rule.feature_dim, f"features[{index}]")
    cut = Cut(step.roots, step.features, step.shared, retain_graph=step.retain_graph)
    if cut.obstacle is not None:
        raise ValueError(
            f"Expected `features` where the passes can be cut, but {cut.obstacle}. Remove that, or estimate risks from "
            "parameters."
        )
    return cut


def _adapter_rows(
    rule: FisherRule, cut: Cut, feature_grads: Sequence[Sequence[Tensor | None]]
) -> list[list[Tensor | None]]:
    """Returns T rows of one adapter's gradient per feature; an empty one for an absent task."""
    of_task = [
        dict(zip(reached, grads, strict=True))
        for reached, grads in zip(cut.reached, feature_grads, strict=True)
    ]
    columns = [
        adapter_grads(
            z, [grads.get(index) for grads in of_task], rule.feature_dim, rule.feature_adapter
        )
        for index, z in enumerate(cut.features)
    ]
    rows = [list(row) for row in zip(*columns, strict=True)]
    return [row if cut.reached[task] else [] for task, row in enumerate(rows)]
