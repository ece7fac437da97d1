"""Steps of ExcessMTL that cost less than one pass through the encoder per task.

Each estimates the risks from less than all gradients of all tasks, moves the weights with the same
equations, and runs one ordinary pass with them. The estimate comes from, at the cost of:

- a *subset* of the shared parameters: a pass per task that ends where the subset begins;
- the *features*: the gradients that the heads' passes leave at the encoder's output;
- *rotation*: the gradients of some tasks (:mod:`excessmtl_ext.engines.rotation`).

``update_every`` thins out any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from excessmtl_ext.arguments import checked_parameters, trainable
from excessmtl_ext.engines.exact import (
    ExactEngine,
    guarded_weights,
    show_gradients,
    step_without_task_grads,
    update_and_combine,
    weights_of_heads,
)
from excessmtl_ext.engines.undo import all_or_nothing
from excessmtl_ext.passes.capture import capture_grads, nodes_of
from excessmtl_ext.passes.heads import HeadGraph, check_open
from excessmtl_ext.passes.per_task import (
    check_reached,
    flat_rows,
    raise_if_reused,
    raise_sparse,
)
from excessmtl_ext.passes.reused_memory import copied
from excessmtl_ext.passes.weighted import apply_weights
from excessmtl_ext.step import (
    NO_TARGETS,
    FisherRule,
    Step,
    TaskGrads,
    WeightingRule,
    raise_if_nonfinite,
)


def checked_subset(chosen: Iterable[Tensor], shared: Sequence[Tensor] | None) -> list[Tensor]:
    """Lists the parameters that risks are estimated from; raises ValueError unless all are shared ones."""
    subset = checked_parameters(chosen, "estimate_from")
    known = {id(parameter) for parameter in shared or ()}
    for index, parameter in enumerate(subset):
        if id(parameter) not in known and parameter.requires_grad:
            raise ValueError(
                f"Expected `estimate_from[{index}]` to be one of the shared parameters, but it is none of them. Take "
                "some of those that are given to the balancer, such as model.encoder[-1].parameters()."
            )
    return trainable(subset, "estimate_from")


class CheaperEngine(ExactEngine):
    """What these engines have in common: no streaming, no encoder passes that could be one, and the latest weights."""

    stream_obstacle: str | None = (
        "ExcessMTL cannot stream: `estimate_from` and `tasks_per_step` are there to save the passes it runs. "
        "Call backward(losses), or update_weights() with your own gradients."
    )
    rows_described = ""
    """The rows of gradients that live at once, in words."""

    def live_task_grads(self, rule: WeightingRule) -> tuple[float, str]:
        """Returns the estimate's gradients in units of the shared parameters', and ``.grad``."""
        assert rule.layout is not None
        num_shared = sum(parameter.numel() for parameter in rule.shared_parameters or ())
        share = rule.layout.num_params / num_shared
        return self.num_rows(rule) * share + 1, f"{self.rows_described}; then `.grad`"

    def num_rows(self, rule: WeightingRule) -> int:
        """Tasks whose gradients live at once."""
        return rule.num_tasks

    def run(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, rule: FisherRule, step: Step
    ) -> Sequence[int]:
        """Estimates the risks, moves the weights and applies them; all of it, or nothing."""
        if step.tasks and step.moves_weights:
            graph = HeadGraph(step.roots, step.shared)
            with all_or_nothing(rule, [*step.shared, *graph.heads], step.tasks):
                self.run_estimate(rule, step)
        elif step.tasks:
            step_without_task_grads(rule, step)
        return step.tasks

    def run_estimate(self, rule: FisherRule, step: Step) -> None:
        """Runs a step that moves the weights."""
        raise NotImplementedError

    def take_estimate(self, rule: FisherRule, step: Step, grads: TaskGrads) -> None:
        """Moves the weights by the risks of the given gradients.

        Raises:
            FloatingPointError: a gradient is not finite and ``nonfinite="raise"``.
        """
        step.task_grads = grads
        show_gradients(rule, step)
        update_and_combine(rule, step, NO_TARGETS)
        raise_if_nonfinite(rule)


class SubsetEngine(CheaperEngine):
    """Risks from the gradients of some shared parameters, then one pass of the weighted loss.

    Args:
        subset: The parameters, as from :func:`checked_subset`.
    """

    rows_described = "of the subset, one per task"

    def __init__(self, subset: list[Tensor]) -> None:
        super().__init__()
        self.subset = subset

    def run_estimate(self, rule: FisherRule, step: Step) -> None:
        """Runs a step that moves the weights."""
        rows = subset_rows(step, self.subset, step.tasks)
        with torch.no_grad():
            assert rule.layout is not None
            grads = TaskGrads(flat_rows(rows), rule.layout, range(rule.num_tasks))
            self.take_estimate(rule, step, grads)
        weights = guarded_weights(rule)
        apply_weights(step, weights, head_weights=weights_of_heads(rule, weights))


def subset_rows(
    step: Step, subset: Sequence[Tensor], tasks: Iterable[int]
) -> list[list[Tensor | None]]:
    """Computes a row of gradients of ``subset`` for each of ``tasks``, None for the others; keeps the graphs.

    Raises:
        ValueError: a node runs a backward pass of its own, which would write ``.grad``.
    """
    check_open(
        nodes_of(root for root in step.roots if root is not None),
        "`estimate_from` takes the gradients of some parameters only",
    )
    rows: list[list[Tensor | None]] = [[None] * len(subset) for _ in step.roots]
    for task in tasks:
        root = step.roots[task]
        assert root is not None
        start = step.starts[task]
        assert start is not None
        row = capture_grads(root, start, subset, retain_graph=True, keep_sparse=True)
        raise_sparse(row)
        rows[task] = copied(row) if step.copy_gradients else row
        check_reached(rows[task], task)
    raise_if_reused(dict(enumerate(rows)), of="parameter of the subset")
    return rows
