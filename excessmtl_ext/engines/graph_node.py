"""A balanced step inside somebody else's backward pass: the node that ``split`` puts behind the encoder.

Forward it hands out the features T times. Backward it runs once the gradients of all copies are
there: it estimates the risks from them, moves the weights, and hands on the weighted sum. What lies
above gets the gradient of its own loss, what lies below that of the weighted one.

Symbols: T tasks, K features. Copies and their gradients are task-major, T * K.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from excessmtl_ext import functional
from excessmtl_ext.engines.exact import guarded_weights, show_gradients, update_and_combine
from excessmtl_ext.engines.node_exchange import group_of, joined_over_ranks
from excessmtl_ext.passes.adapters import Adapter, adapter_grads, adapter_numel
from excessmtl_ext.passes.per_task import flat_rows
from excessmtl_ext.state import ParamLayout
from excessmtl_ext.step import NO_TARGETS, Step, TaskGrads, raise_if_nonfinite
from excessmtl_ext.step_arguments import moves_weights, without_autocast

Close = Callable[[Step, Sequence[int]], None]


@dataclass
class NodePass:
    """One forward pass through ``split``, and what is to happen in its backward pass.

    Attributes:
        rule: A method whose weights follow from task gradients, or from nothing.
        close: Counts a step and shows it to the observers.
        grad_scale: [], the factor that the gradients carry, or None.
        has_run: Whether a backward pass has made its step.
    """

    rule: Any
    close: Close
    grad_scale: Tensor | None = None
    has_run: bool = False

    def run(self, features: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
        """Runs the step: returns the K gradients to hand on.

        Raises:
            RuntimeError: this pass, or another one through the same balancer in this backward pass,
                has made its step already.
        """
        rule = self.rule
        num = len(features)
        rows = [list(grads[first : first + num]) for first in range(0, len(grads), num)]
        tasks = [task for task, row in enumerate(rows) if any(grad is not None for grad in row)]
        rule.refuse_open_step("a backward pass through split()")
        if not rule.holds_weights:
            self._raise_if_stepped()
        step = Step(
            roots=[],
            tasks=tasks,
            shared=[],
            grad_scale=self.grad_scale,
            moves_weights=moves_weights(rule),
        )
        rule.begin(step)
        with torch.no_grad(), without_autocast(features[0].device):
            weights = self._weights(step, features, rows)
        handed = [
            _weighted_sum(feature, [row[index] for row in rows], weights)
            for index, feature in enumerate(features)
        ]
        if not rule.holds_weights:
            self.has_run = True
            _LATEST_PASS[rule] = torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateUsage]
        self.close(step, step.tasks)
        return handed

    def _weights(
        self, step: Step, features: Sequence[Tensor], rows: list[list[Tensor | None]]
    ) -> Tensor:
        """Returns the pass weights [T] of this step."""
        rule = self.rule
        if not step.moves_weights:
            rule.found_nonfinite.zero_()  # the flags are those of the latest step
            return rule.pass_weights()
        if "task_grads" not in rule.requires:
            rule.update(step)
            return rule.pass_weights()
        step.task_grads = self._task_grads(step, features, rows)
        show_gradients(rule, step)
        update_and_combine(rule, step, NO_TARGETS)
        raise_if_nonfinite(rule)
        return guarded_weights(rule)

    def _task_grads(
        self, step: Step, features: Sequence[Tensor], rows: list[list[Tensor | None]]
    ) -> TaskGrads:
        """Gradients of the adapters, of the joined batch; sets the tasks that some rank has."""
        rule = self.rule
        adapter: Adapter = rule.feature_adapter
        dim: int = rule.feature_dim
        layout = adapters_layout(rule, features)
        columns = [
            adapter_grads(feature, [row[index] for row in rows], dim, adapter)
            for index, feature in enumerate(features)
        ]
        adapters = [list(row) for row in zip(*columns, strict=True)]
        group = group_of(getattr(rule.engine, "process_group", None))
        adapters, step.tasks = joined_over_ranks(adapters, step.tasks, layout, group)
        return TaskGrads(flat_rows(adapters), layout, range(rule.num_tasks))

    def _raise_if_stepped(self) -> None:
        if self.has_run:
            raise RuntimeError(
                "Expected one backward pass through the copies of balancer.split(), but an earlier one has moved the "
                "weights already. Call backward once, on the sum of the losses; passes that are not to move the "
                "weights belong into `with balancer.hold_weights():`."
            )
        graph_task = torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateUsage]
        if graph_task >= 0 and _LATEST_PASS.get(self.rule) == graph_task:
            raise RuntimeError(
                "Expected one balancer.split() in a backward pass, but this one has come through another already, "
                "which has moved the weights. Give all features to one call, balancer.split([z1, z2]), or call "
                "backward after each."
            )


def adapters_layout(rule: Any, features: Sequence[Tensor]) -> ParamLayout:
    """Returns the sizes of the adapters of the features; the first ones become those of ``rule``.

    Raises:
        ValueError: they are not those of the first features.
    """
    dim: int = rule.feature_dim
    layout = ParamLayout(
        [adapter_numel(rule.feature_adapter, feature.shape[dim]) for feature in features]
    )
    if rule.layout is None:
        rule.layout = layout
    elif rule.layout != layout:
        raise ValueError(
            f"Expected features whose adapters have {list(rule.layout.numels)} elements, as in the first step, but "
            f"got {list(layout.numels)}. Call reset() to start on a new model."
        )
    return rule.layout


_LATEST_PASS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""Of each balancer, the backward pass that its latest step was in."""


def _weighted_sum(feature: Tensor, grads: Sequence[Tensor | None], weights: Tensor) -> Tensor:
    """Returns the sum of one feature's gradients; differentiable where the pass is (``create_graph``)."""
    present = [grad for grad in grads if grad is not None]
    if not present:
        return torch.zeros_like(feature)
    if not torch.is_grad_enabled() and all(type(grad) is Tensor for grad in present):
        output = torch.empty_like(feature, memory_format=torch.contiguous_format)
        none = feature.new_empty(0)
        rows = [none if grad is None else grad.contiguous() for grad in grads]
        functional.weighted_sum_(rows, [output], _layout_of(output.numel()), weights)
        return output
    # Not by a list as index, which a GPU would wait for.
    everyone = len(present) == len(grads)
    factors = (
        weights
        if everyone
        else torch.stack([weights[task] for task, grad in enumerate(grads) if grad is not None])
    )
    return torch.tensordot(factors.to(feature.dtype), torch.stack(present), dims=1)


@functools.cache
def _layout_of(numel: int) -> ParamLayout:
    return ParamLayout([numel])


# ---- compiled graphs

_RULES: WeakValueDictionary[int, Any] = WeakValueDictionary()
_HANDLES: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


@torch._dynamo.assume_constant_result  # pyright: ignore[reportPrivateUsage]
def handle_of(rule: Any) -> int:
    """Returns a number for ``rule``, by which a compiled graph finds it."""
    if rule not in _HANDLES:
        _HANDLES[rule] = len(_HANDLES)
        _RULES[_HANDLES[rule]] = rule
    return _HANDLES[rule]


@torch.library.custom_op("excessmtl_ext::step_in_graph", mutates_args=())
def step_in_graph(
    handle: int,
    grad_scale: Tensor | None,
    features: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> list[Tensor]:
    """:meth:`NodePass.run` as an op."""
    rule = _RULES[handle]
    return NodePass(rule, rule._close, grad_scale).run(features, grads)


@step_in_graph.register_fake
def _(
    handle: int,
    grad_scale: Tensor | None,
    features: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> list[Tensor]:
    return [
        torch.empty_like(feature, memory_format=torch.contiguous_format) for feature in features
    ]
