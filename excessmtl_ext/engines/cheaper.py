"""Steps of ExcessMTL that cost less than one pass through the encoder per task.

Each estimates the risks from less than all gradients of all tasks, moves the weights with the same
equations, and runs one ordinary pass with them. The estimate comes from, at the cost of:

- a *subset* of the shared parameters: a pass per task that ends where the subset begins;
- the *features*: the gradients that the heads' passes leave at the encoder's output;
- *rotation*: the whole gradient of some tasks, the others keep their latest risk.

Rotation may be combined with a subset, and ``update_every`` thins out any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from excessmtl_ext.arguments import checked_parameters
from excessmtl_ext.engines.exact import (
    ExactEngine,
    guarded_weights,
    show_gradients,
    step_without_task_grads,
    update_and_combine,
    weights_of_heads,
)
from excessmtl_ext.engines.undo import Before, all_or_nothing
from excessmtl_ext.passes.capture import capture_grads, nodes_of
from excessmtl_ext.passes.heads import HeadGraph, check_open
from excessmtl_ext.passes.per_task import (
    HeadGrads,
    add_scaled_grads,
    backward_per_task,
    check_reached,
    flat_rows,
    raise_if_reused,
    raise_sparse,
    start_of,
)
from excessmtl_ext.passes.reused_memory import copied
from excessmtl_ext.passes.weighted import apply_weights
from excessmtl_ext.step import (
    NO_TARGETS,
    FisherRule,
    Step,
    TaskGrads,
    WeightingRule,
    raise_argument_error,
    raise_if_nonfinite,
)
from excessmtl_ext.step_arguments import check_accumulation_hooks


def checked_subset(chosen: Iterable[Tensor], shared: Sequence[Tensor] | None) -> list[Tensor]:
    """The parameters that risks are estimated from, in the order given; raises unless all are shared ones."""
    subset = checked_parameters(chosen, "estimate_from")
    known = {id(parameter) for parameter in shared or ()}
    for index, parameter in enumerate(subset):
        if id(parameter) not in known:
            raise ValueError(
                f"Expected `estimate_from[{index}]` to be one of the shared parameters, but it is none of them. Take "
                "some of those that are given to the balancer, such as model.encoder[-1].parameters()."
            )
    return subset


class TaskRotation:
    """Whose turn it is, where a step estimates the risk of some tasks only.

    A round is over when every task has had its turn; then the weights move. A task that is absent
    from the batch in its turn gets it later in the round; if all that are left are absent, the
    round ends without them.

    Args:
        num_tasks: T.
        tasks_per_step: Turns in a step, fewer than T.
    """

    def __init__(self, num_tasks: int, tasks_per_step: int) -> None:
        self.num_tasks = num_tasks
        self.tasks_per_step = tasks_per_step
        self.waiting = list(range(num_tasks))

    @property
    def served(self) -> list[int]:
        """The tasks that have had their turn in this round."""
        return [task for task in range(self.num_tasks) if task not in self.waiting]

    def start_round(self) -> None:
        """Puts every task in line again."""
        self.waiting = list(range(self.num_tasks))

    def take_turns(self, present: Sequence[int]) -> list[int]:
        """The tasks of this step, taken out of the line; none if all that wait are absent."""
        turn = [task for task in self.waiting if task in present][: self.tasks_per_step]
        self.waiting = [task for task in self.waiting if task not in turn]
        return turn


class CheaperEngine(ExactEngine):
    """What these engines have in common: no streaming, no encoder passes that could be one, and the latest weights."""

    stream_obstacle = (
        "ExcessMTL cannot stream: `estimate_from` and `tasks_per_step` are there to save the passes it runs. "
        "Call backward(losses), or update_weights() with your own gradients."
    )
    rows_described = ""
    """The rows of gradients that live at once, in words."""

    def live_task_grads(self, rule: WeightingRule) -> tuple[float, str]:
        """The estimate's gradients in units of the shared parameters', and ``.grad``."""
        assert rule.layout is not None
        num_shared = sum(parameter.numel() for parameter in rule.shared_parameters or ())
        share = rule.layout.num_params / num_shared
        return self.num_rows(rule) * share + 1, f"{self.rows_described}; then `.grad`"

    def num_rows(self, rule: WeightingRule) -> int:
        """Tasks whose gradients live at once."""
        return rule.num_tasks

    def run(self, rule: FisherRule, step: Step) -> Sequence[int]:
        """Estimates the risks, moves the weights and applies them; all of it, or nothing."""
        check_accumulation_hooks(step.shared)
        if step.tasks and step.moves_weights:
            graph = HeadGraph(step.roots, step.shared)
            with all_or_nothing(rule, graph.parameters(step.shared)) as before:
                self.run_estimate(rule, step, before)
        elif step.tasks:
            step_without_task_grads(rule, step)
        return step.tasks

    def run_estimate(self, rule: FisherRule, step: Step, before: Before) -> None:
        """A step that moves the weights."""
        raise NotImplementedError

    def take_estimate(self, rule: FisherRule, step: Step, grads: TaskGrads, before: Before) -> None:
        """Moves the weights by the risks of the given gradients.

        Raises:
            FloatingPointError: a gradient is not finite and ``nonfinite="raise"``.
        """
        before.keep_rows(step.tasks)
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

    def run_estimate(self, rule: FisherRule, step: Step, before: Before) -> None:
        """A step that moves the weights."""
        rows = subset_rows(step, self.subset, step.tasks)
        with torch.no_grad():
            assert rule.layout is not None
            grads = TaskGrads(flat_rows(rows), rule.layout, range(rule.num_tasks))
            self.take_estimate(rule, step, grads, before)
        weights = guarded_weights(rule)
        apply_weights(step, weights, head_weights=weights_of_heads(rule, weights))


def subset_rows(
    step: Step, subset: Sequence[Tensor], tasks: Iterable[int]
) -> list[list[Tensor | None]]:
    """A row of gradients of ``subset`` for each of ``tasks``, None for the others; keeps the graphs.

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
        start = start_of(root, step.grad_scale)
        row = capture_grads(root, start, subset, retain_graph=True, keep_sparse=True)
        raise_sparse(row)
        rows[task] = copied(row) if step.copy_gradients else row
        check_reached(rows[task], task)
    raise_if_reused(dict(enumerate(rows)), of="parameter of the subset")
    return rows


class RotationEngine(CheaperEngine):
    """The risks of the tasks whose turn it is, and one pass for all other tasks.

    Args:
        rotation: Whose turn it is.
        subset: Estimate from these parameters only; None: from all shared ones.
    """

    def __init__(self, rotation: TaskRotation, subset: list[Tensor] | None = None) -> None:
        super().__init__()
        self.rotation = rotation
        self.subset = subset
        self.rows_described = (
            "of the tasks whose turn it is" if subset is None else "of the subset, one per task"
        )

    def num_rows(self, rule: WeightingRule) -> int:
        """Tasks whose gradients live at once."""
        return self.rotation.tasks_per_step

    def reset(self) -> None:
        """Begins a round."""
        super().reset()
        self.rotation.start_round()

    def run_estimate(self, rule: FisherRule, step: Step, before: Before) -> None:
        """A step that refreshes the risks of some tasks."""
        waiting = list(self.rotation.waiting)
        try:
            self._take_turns(rule, step, before)
        except FloatingPointError:
            raise
        except BaseException:
            self.rotation.waiting = waiting
            raise

    def _take_turns(self, rule: FisherRule, step: Step, before: Before) -> None:
        turn = self._turn(rule, step.tasks)
        before.keep_rows(turn)
        if self.subset is None:
            self._run_whole(rule, step, turn)
            return
        rows = subset_rows(step, self.subset, turn)
        with torch.no_grad():
            self._refresh(rule, step, turn, flat_rows(rows))
        weights = guarded_weights(rule)
        apply_weights(step, weights, head_weights=weights_of_heads(rule, weights))

    def _run_whole(self, rule: FisherRule, step: Step, turn: Sequence[int]) -> None:
        """Whole gradients of the tasks whose turn it is: what is applied of them needs no second pass."""
        others = [None if task in turn else root for task, root in enumerate(step.roots)]
        mine = [root if task in turn else None for task, root in enumerate(step.roots)]
        left = [task for task in step.tasks if task not in turn]
        keeps_heads = rule.head_weighting == "task_weights"
        heads = HeadGrads.of(mine, step.shared) if keeps_heads else None
        rows, tensors = backward_per_task(
            mine,
            step.shared,
            scale=step.grad_scale,
            heads=heads,
            retain_graph=step.retain_graph or bool(left),
            copy=step.copy_gradients,
        )
        with torch.no_grad():
            self._refresh(rule, step, turn, tensors)
            weights = guarded_weights(rule)
            for task in turn:
                add_scaled_grads(step.shared, rows[task], weights[task])
            head_weights = weights_of_heads(rule, weights)
            if heads is not None and head_weights is not None:
                heads.add(head_weights)
        apply_weights(replace(step, roots=others, tasks=left), weights, head_weights=head_weights)

    def _refresh(
        self, rule: FisherRule, step: Step, turn: Sequence[int], tensors: list[Tensor]
    ) -> None:
        """Refreshes the risks of the tasks whose turn it is; at the end of a round moves the weights.

        Raises:
            FloatingPointError: a gradient is not finite and ``nonfinite="raise"``.
        """
        assert rule.layout is not None
        layout, num_tensors = rule.layout, len(rule.layout.numels)
        step.task_grads = TaskGrads(tensors, layout, range(rule.num_tasks))
        rule.prepare(step)
        rule.found_nonfinite.zero_()
        rule.add_new_shares(False)  # of a step that was broken off
        for task in turn:
            grads = tensors[task * num_tensors : (task + 1) * num_tensors]
            step.task_grads = TaskGrads(grads, layout, [task])
            for observer in rule.observers:
                if observer.wants_gradients:
                    observer.on_gradients(rule, step)
            try:
                rule.take_task(replace(step, tasks=[task]))
            except RuntimeError as error:
                raise_argument_error(error)
                raise
        if self.rotation.waiting:
            rule.num_skipped_steps += rule.found_nonfinite.any()
        else:
            self._end_round(rule)
        rule.add_new_shares(True)  # of the tasks whose gradients were finite
        if rule.nonfinite == "raise":
            raise_if_nonfinite(rule)

    def _turn(self, rule: FisherRule, tasks: Sequence[int]) -> Sequence[int]:
        """The tasks whose gradients this step looks at; ends a round that only absent tasks keep open."""
        turn = self.rotation.take_turns(tasks)
        if not turn:
            with torch.no_grad():
                rule.found_nonfinite.zero_()
                self._end_round(rule)
            turn = self.rotation.take_turns(tasks)
        return turn

    def _end_round(self, rule: FisherRule) -> None:
        """Moves the weights of the tasks that had their turn; not if this step's gradients are not finite."""
        rule.move_weights(self.rotation.served)
        self.rotation.start_round()
