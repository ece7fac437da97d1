"""Steps that estimate the risks of some tasks only, in rotation; the others keep their latest one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from excessmtl_ext.engines.cheaper import CheaperEngine, subset_rows
from excessmtl_ext.engines.exact import step_without_task_grads, weights_of_heads
from excessmtl_ext.engines.undo import Before, all_or_nothing
from excessmtl_ext.passes.capture import capture_grads
from excessmtl_ext.passes.heads import HeadGraph
from excessmtl_ext.passes.per_task import (
    HeadGrads,
    add_scaled_grads,
    backward_per_task,
    check_reached,
    flat_rows,
    flattened,
    raise_sparse,
)
from excessmtl_ext.passes.weighted import apply_weights
from excessmtl_ext.step import (
    FisherRule,
    Step,
    TaskGrads,
    WeightingRule,
    raise_argument_error,
    raise_if_nonfinite,
)


class TaskRotation:
    """Whose turn it is, where a step estimates the risk of some tasks only.

    A round is over when every task has had its turn; then the weights move. A task that is absent
    from the batch in its turn gets it later in the round; if all that are left are absent, the
    round ends without them.

    Args:
        num_tasks: T.
        tasks_per_step: Turns in a step, fewer than T.

    Attributes:
        waiting: The tasks whose turn is still to come in this round.
        measured: The tasks whose gradients are known to have a size.
    """

    def __init__(self, num_tasks: int, tasks_per_step: int) -> None:
        self.num_tasks = num_tasks
        self.tasks_per_step = tasks_per_step
        self.waiting = list(range(num_tasks))
        self.measured: frozenset[int] = frozenset()

    @property
    def served(self) -> list[int]:
        """The tasks that have had their turn in this round."""
        return [task for task in range(self.num_tasks) if task not in self.waiting]

    def start_round(self) -> None:
        """Begins a round: every task waits for its turn again."""
        self.waiting = list(range(self.num_tasks))

    def restart(self) -> None:
        """Forgets everything: another state is to come."""
        self.start_round()
        self.measured = frozenset()

    def take_turns(self, present: Sequence[int]) -> list[int]:
        """Takes the tasks of this step out of the line; none if all that wait are absent."""
        turn = [task for task in self.waiting if task in present][: self.tasks_per_step]
        self.waiting = [task for task in self.waiting if task not in turn]
        return turn


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
        self.rotation.restart()

    def run(self, rule: FisherRule, step: Step) -> Sequence[int]:
        """Refreshes the risks of the tasks whose turn it is and applies the weights; all of it, or nothing."""
        if not step.tasks:
            return step.tasks
        if not step.moves_weights:
            step_without_task_grads(rule, step)
            return step.tasks
        graph = HeadGraph(step.roots, step.shared)
        rotation, waiting = self.rotation, list(self.rotation.waiting)
        measured = rotation.measured
        before: Before | None = None
        try:
            served = rotation.served
            turn = rotation.take_turns(step.tasks)
            ends_first = not turn  # only absent tasks keep the round open
            if ends_first:
                rotation.start_round()
                turn = rotation.take_turns(step.tasks)
            with all_or_nothing(rule, [*step.shared, *graph.heads], turn) as before:
                if not graph.hides:  # such a task weighs nothing until its turn
                    self._measure(rule, step, turn, before)
                if ends_first:
                    with torch.no_grad():
                        rule.found_nonfinite.zero_()
                        rule.move_weights(served)
                if self.subset is None:
                    self._run_whole(rule, step, turn)
                else:
                    self._run_subset(rule, step, turn, self.subset)
                if rule.task_weights.device.type == "cpu" and bool(rule.found_nonfinite.any()):
                    self._give_turns_back(rule, before, waiting)
                    rotation.measured = measured
        except FloatingPointError:
            assert before is not None
            self._give_turns_back(rule, before, waiting)
            rotation.measured = measured
            raise
        except BaseException:
            rotation.waiting, rotation.measured = waiting, measured
            raise
        return step.tasks

    def _measure(self, rule: FisherRule, step: Step, turn: Sequence[int], before: Before) -> None:
        """Measures the gradients of tasks that have had none but zeros and whose turn is still to come.

        The sum of this step brings all gradients to one size. A pass per such task, one gradient alive at a time.
        """
        rotation = self.rotation
        unknown = [task for task in step.tasks if task not in rotation.measured]
        if not unknown:
            return
        without = rule.tasks_without_size(unknown)
        rotation.measured |= set(unknown).difference(without)
        before.keep_whole("tensor_mean_square", "num_tensor_steps")
        parameters = step.shared if self.subset is None else self.subset
        for task in without:
            if task in turn:
                continue
            root, start = step.roots[task], step.starts[task]
            assert root is not None
            assert start is not None
            row = capture_grads(root, start, parameters, retain_graph=True, keep_sparse=True)
            raise_sparse(row)
            check_reached(row, task)
            with torch.no_grad():
                assert rule.layout is not None
                grads = TaskGrads(flattened(row), rule.layout, [task])
                rule.take_size(replace(step, tasks=[task], task_grads=grads))

    def _give_turns_back(self, rule: FisherRule, before: Before, waiting: list[int]) -> None:
        """Makes a step that does not count one that never was, but for its flags and its count.

        Not on a GPU, whose flags the host does not wait for: there the turn is over, and the tasks of it whose
        gradients are finite have been taken in.
        """
        flags = rule.found_nonfinite.clone()
        before.restore()
        rule.found_nonfinite.copy_(flags)
        rule.num_skipped_steps += 1
        self.rotation.waiting = waiting

    def _run_subset(
        self, rule: FisherRule, step: Step, turn: Sequence[int], subset: list[Tensor]
    ) -> None:
        """Gradients of the subset, then one pass of all tasks."""
        rows = subset_rows(step, subset, turn)
        with torch.no_grad():
            weights = self._refresh(rule, step, turn, flat_rows(rows))
        apply_weights(step, weights, head_weights=_head_weights(rule, weights))

    def _run_whole(self, rule: FisherRule, step: Step, turn: Sequence[int]) -> None:
        """Takes whole gradients of the tasks whose turn it is: what is applied of them needs no second pass."""
        left = [task for task in step.tasks if task not in turn]
        mine = [root if task in turn else None for task, root in enumerate(step.roots)]
        keeps_heads = rule.head_weighting == "task_weights"
        heads = HeadGrads.of(mine, step.shared) if keeps_heads else None
        rows, tensors = backward_per_task(
            mine,
            step.starts,
            step.shared,
            heads=heads,
            retain_graph=step.retain_graph or bool(left),
            copy=step.copy_gradients,
        )
        with torch.no_grad():
            weights = self._refresh(rule, step, turn, tensors)
            for task in turn:
                add_scaled_grads(step.shared, rows[task], weights[task])
            head_weights = _head_weights(rule, weights)
            if heads is not None and head_weights is not None:
                heads.add(head_weights)
        others = replace(
            step,
            roots=[None if task in turn else root for task, root in enumerate(step.roots)],
            starts=[None if task in turn else start for task, start in enumerate(step.starts)],
            tasks=left,
        )
        apply_weights(others, weights, head_weights=head_weights)

    def _refresh(
        self, rule: FisherRule, step: Step, turn: Sequence[int], tensors: list[Tensor]
    ) -> Tensor:
        """Refreshes the risks of the tasks whose turn it is; at the end of a round moves the weights.

        Returns:
            [T], as of :meth:`FisherRule.take_turns`.

        Raises:
            FloatingPointError: a gradient is not finite and ``nonfinite="raise"``.
        """
        assert rule.layout is not None
        layout, num_tensors = rule.layout, len(rule.layout.numels)
        step.task_grads = TaskGrads(tensors, layout, range(rule.num_tasks))
        turns: list[Step] = []
        for task in turn:
            grads = tensors[task * num_tensors : (task + 1) * num_tensors]
            turns.append(replace(step, tasks=[task], task_grads=TaskGrads(grads, layout, [task])))
            for observer in rule.observers:
                if observer.wants_gradients:
                    observer.on_gradients(rule, turns[-1])
        served = None if self.rotation.waiting else self.rotation.served
        try:
            weights = rule.take_turns(step, turns, served)
        except RuntimeError as error:
            raise_argument_error(error)
            raise
        if served is not None:
            self.rotation.start_round()
        if rule.nonfinite == "raise":
            raise_if_nonfinite(rule)
        return weights


def _head_weights(rule: FisherRule, weights: Tensor) -> Tensor | None:
    """Factors [T] of head gradients, or None for 1."""
    return None if rule.head_weighting == "none" else weights_of_heads(rule, weights)
