"""The plain step: the whole gradient of every task where the rule asks for it, one weighted pass where it does not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from excessmtl_ext.dense_order import order_of
from excessmtl_ext.engines.heap_pin import LEAST_NUMEL, HeapPin
from excessmtl_ext.engines.undo import all_or_nothing
from excessmtl_ext.passes.cut import Cut
from excessmtl_ext.passes.heads import HeadGraph
from excessmtl_ext.passes.per_task import GradRows, HeadGrads, backward_per_task, flat_rows
from excessmtl_ext.passes.stacked import Stacker
from excessmtl_ext.passes.targets import assign_grads, combine_targets
from excessmtl_ext.passes.vectorised import EncoderPasses
from excessmtl_ext.passes.weighted import apply_weights
from excessmtl_ext.step import (
    NO_TARGETS,
    Batched,
    Step,
    Targets,
    TaskGrads,
    WeightingRule,
    raise_argument_error,
    raise_if_nonfinite,
)


class ExactEngine:
    """Runs one pass per task, or one vectorised pass; combines the gradients under the weights they give.

    Args:
        batched: See :class:`excessmtl_ext.Balancer`.

    Attributes:
        stacker: Computes weight gradients beside the passes, or None.
    """

    stream_obstacle: str | None = None
    statistics_obstacle: str | None = None
    allows_hooks = False
    shards_state = False

    def __init__(self, batched: Batched = False) -> None:
        self.batched: Batched = batched
        self.heap_pin = HeapPin()
        self._encoder = EncoderPasses(batched)
        self.stacker: Stacker | None = self._encoder.stacker

    @property
    def backward_mode(self) -> str:
        """How the latest step that needed task gradients ran the encoder's passes, and why."""
        return str(self._encoder)

    @property
    def num_held_bytes(self) -> int:
        """Bytes of the gradient that is kept between steps."""
        return self.heap_pin.num_bytes

    def live_task_grads(self, rule: WeightingRule) -> tuple[float, str]:
        """Returns the most gradients of all shared parameters that live at once, and what they are."""
        if "task_grads" in rule.requires:
            return rule.num_tasks, "one per task; `.grad` is one of them"
        return 1, "`.grad`"

    def run(self, rule: WeightingRule, step: Step) -> Sequence[int]:
        """Runs the passes, moves the weights and adds the weighted sum to ``.grad``."""
        if not step.tasks:
            return step.tasks
        if not step.moves_weights or "task_grads" not in rule.requires:
            step_without_task_grads(rule, step)
            return step.tasks
        grads, heads = self._passes(step, keep_heads=rule.head_weighting == "task_weights")
        with torch.no_grad():
            assert rule.layout is not None
            if rule.follows_order and not all(map(Tensor.is_contiguous, step.shared)):
                step.order = order_of(step.shared)
            if step.order is not None:
                rows = list(map(step.order.seen, grads.rows))
                grads = GradRows(rows, flat_rows(rows))
            step.task_grads = TaskGrads(grads.tensors, rule.layout, range(rule.num_tasks))
            show_gradients(rule, step)
            if rule.nonfinite == "raise":
                update_or_raise(rule, step)
            targets = combine_targets(step.shared, grads.rows, step.order)
            if rule.nonfinite == "raise":
                rule.combine(step, targets)
            else:
                update_and_combine(rule, step, targets)
            assign_grads(step.shared, targets, step.order)
            if heads is not None:
                heads.add(rule.head_weights())
        if rule.num_tasks * rule.layout.num_params >= LEAST_NUMEL:
            self.heap_pin.move(grads.tensors)
        return step.tasks

    def _passes(self, step: Step, *, keep_heads: bool) -> tuple[GradRows, HeadGrads | None]:
        encoder = self._encoder
        obstacle: str | None = "no features were given"
        if step.features is not None:
            cut = Cut(step.roots, step.features, step.shared, retain_graph=step.retain_graph)
            obstacle = cut.obstacle
            if obstacle is None and encoder.batched is not False:
                return cut.task_grads(step, keep_heads=keep_heads, walk_encoder=encoder.walk)
            if obstacle is None:
                encoder.is_batched, encoder.reason = False, "batched=False"
                return cut.task_grads(step, keep_heads=keep_heads)
        if encoder.is_batched is None or encoder.batched is not False:
            encoder.note(obstacle or "")
        heads = HeadGrads.of(step.roots, step.shared) if keep_heads else None
        rows = backward_per_task(
            step.roots,
            step.starts,
            step.shared,
            heads=heads,
            retain_graph=step.retain_graph,
            copy=step.copy_gradients,
            stacker=self.stacker,
        )
        return rows, heads

    def update(self, rule: WeightingRule, step: Step) -> Sequence[int]:
        """Moves the weights from what the caller has; touches no ``.grad``."""
        if not step.tasks:
            return step.tasks
        with torch.no_grad():
            if not step.moves_weights:
                rule.found_nonfinite.zero_()
            elif "task_grads" not in rule.requires:
                update(rule, step)
            else:
                show_gradients(rule, step)
                update_and_combine(rule, step, NO_TARGETS)
            if step.moves_weights:
                raise_if_nonfinite(rule)
        return step.tasks

    def refuse(self, rule: WeightingRule, error: Exception) -> None:
        """Does nothing: no other process waits for this step."""

    def reset(self) -> None:
        """Forgets what was measured, and holds nothing."""
        self._encoder.forget()
        self.heap_pin.release()


def step_without_task_grads(rule: WeightingRule, step: Step) -> None:
    """Runs a step whose weights need no gradients, or stay as they are: one weighted pass."""
    is_uniform = rule.has_uniform_weights
    graph, parameters = None, step.shared
    if not is_uniform:
        are_plain = rule.head_weighting == "none"
        graph = HeadGraph(step.roots, step.shared, finds_borders=are_plain)
        parameters = [*step.shared, *graph.heads]
    with all_or_nothing(rule, parameters) as before:
        with torch.no_grad():
            if step.moves_weights:
                step.has_no_labels = tasks_without_labels(rule, step)
                rule.update(step)
                if rule.nonfinite == "raise":
                    raise_if_nonfinite(rule)
            else:
                rule.found_nonfinite.zero_()  # the flags are those of the latest step
            weights = guarded_weights(rule) if "losses" in rule.requires else rule.pass_weights()
        apply_weights(
            step,
            weights,
            head_weights=weights_of_heads(rule, weights),
            is_uniform=is_uniform,
            graph=graph,
        )
        if step.has_no_labels is not None:
            with torch.no_grad():
                before.restore_where(gives_nonfinite(step), step.has_no_labels)
                if rule.nonfinite == "raise":
                    raise_if_nonfinite(rule)


def tasks_without_labels(rule: WeightingRule, step: Step) -> Tensor | None:
    """Returns [T] bool, where a loss is NaN, its gradient still unknown; None: nowhere, or losses are not asked for.

    On a GPU, whose losses the host does not wait for, always a tensor.
    """
    if "losses" not in rule.requires or step.losses is None:
        return None
    is_nan = step.losses.isnan()
    for task in set(range(rule.num_tasks)).difference(step.tasks):
        is_nan[task] = False
    return None if can_read(is_nan) and not bool(is_nan.any()) else is_nan


def can_read(tensor: Tensor) -> bool:
    """Returns whether the host may read values without a wait."""
    return tensor.device.type == "cpu"


def gives_nonfinite(step: Step) -> Tensor:
    """Returns [] bool, whether a loss is NaN and the shared gradients, after the pass, are not finite."""
    assert step.has_no_labels is not None
    grads = [parameter.grad for parameter in step.shared if parameter.grad is not None]
    return step.has_no_labels.any() & ~norm_of(grads).isfinite()


def norm_of(grads: Sequence[Tensor]) -> Tensor:
    """Returns [], the norm of all gradients together, also sparse ones; in a few launches on a GPU."""
    dense = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    return torch.nn.utils.get_total_norm([grad for grad in dense if grad.numel() > 0])


def show_gradients(rule: WeightingRule, step: Step) -> None:
    """Shows the observers the task gradients, which combining may overwrite."""
    for observer in rule.observers:
        if observer.wants_gradients:
            observer.on_gradients(rule, step)


def guarded_weights(rule: WeightingRule) -> Tensor:
    """Returns the pass weights [T]; NaN after a step that does not count, so that a guard of the optimizer sees it."""
    return torch.where(rule.found_nonfinite.any(), float("nan"), rule.pass_weights())


def weights_of_heads(rule: WeightingRule, pass_weights: Tensor) -> Tensor | None:
    """Factors [T] of head gradients in a step of one pass: ``pass_weights`` itself where they are equal; None: 1."""
    if rule.head_weighting == "none":
        return None
    head_weights = rule.head_weights()
    if rule.pass_weights() is head_weights:
        return pass_weights
    return torch.where(rule.found_nonfinite.any(), float("nan"), head_weights)


def update(rule: WeightingRule, step: Step) -> None:
    """Calls ``rule.update``; a complaint of an op about an argument is a ValueError."""
    try:
        rule.update(step)
    except RuntimeError as error:
        raise_argument_error(error)
        raise


def update_and_combine(rule: WeightingRule, step: Step, targets: Targets) -> None:
    """Calls ``rule.update_and_combine``; a complaint of an op about an argument is a ValueError."""
    try:
        rule.update_and_combine(step, targets)
    except RuntimeError as error:
        raise_argument_error(error)
        raise


def update_or_raise(rule: WeightingRule, step: Step) -> None:
    """Moves the weights; raises FloatingPointError, the state as before, if a gradient is not finite."""
    update(rule, step)
    raise_if_nonfinite(rule)
