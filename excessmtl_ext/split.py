"""``split``: a balanced step as a node of the graph, for loops and trainers that call ``backward`` themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from excessmtl_ext.engines.graph_node import (
    Close,
    NodePass,
    adapters_layout,
    handle_of,
    step_in_graph,
)
from excessmtl_ext.passes.adapters import check_feature
from excessmtl_ext.step import Features, TaskGrads
from excessmtl_ext.step_arguments import as_scale


def split(
    rule: Any, close: Close, features: Features, grad_scale: Tensor | float | None = None
) -> tuple[Any, ...]:
    """See :meth:`excessmtl_ext.ExcessMTL.split`; ``close`` counts a step."""
    tensors = [features] if isinstance(features, Tensor) else list(features)
    _check(rule, tensors)
    if not (
        rule.training and torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    ):
        return tuple(features for _ in range(rule.num_tasks))
    scale = None if grad_scale is None else as_scale(grad_scale, tensors[0].device)
    if torch.compiler.is_compiling() or any(_is_traced(each) for each in tensors):
        copies = _CompiledSplit.apply(handle_of(rule), rule.num_tasks, scale, *tensors)
    else:
        copies = _Split.apply(NodePass(rule, close, scale), *tensors)
    if isinstance(features, Tensor):
        return copies
    return tuple(
        copies[start : start + len(tensors)] for start in range(0, len(copies), len(tensors))
    )


def size_for_features(rule: Any, features: Sequence[Tensor]) -> None:
    """Sizes the state of ``rule``, which estimates risks from features, as a step with these would.

    Raises:
        ValueError: the state belongs to features of other sizes.
    """
    _check(rule, features)
    layout = adapters_layout(rule, features)
    if rule.sq_grad_sum.shape[1] == 0:
        like = [feature.new_empty(1) for feature in features]
        rule.size_state(TaskGrads(like, layout, ()), features[0].device)


def _check(rule: Any, features: Sequence[Any]) -> None:
    if not features:
        raise ValueError("Expected `features` to hold at least one tensor, but got an empty list.")
    for index, feature in enumerate(features):
        name = "features" if len(features) == 1 else f"features[{index}]"
        if not isinstance(feature, Tensor):
            raise TypeError(f"Expected `{name}` to be a tensor, but got {type(feature).__name__}.")
        if not feature.is_floating_point():
            raise TypeError(
                f"Expected `{name}` of floating point, but got {feature.dtype}. Leave out what has no gradient."
            )
        if feature.device != features[0].device:
            raise ValueError(
                f"Expected all `features` on {features[0].device}, but got `{name}` on {feature.device}."
            )
        if "task_grads" in rule.requires:
            check_feature(feature, rule.feature_dim, name)
    if "task_grads" in rule.requires and rule.shared_parameters and not rule.needs_features:
        raise ValueError(
            "Expected estimate_from='features' for split(), but this balancer estimates risks from the gradients of "
            "the shared parameters it was given. Add that option, or leave the parameters out: "
            f"ExcessMTL(num_tasks={rule.num_tasks})."
        )
    if getattr(rule, "combination", None) == "per_tensor":
        raise ValueError(
            "Expected no combine='per_tensor' for split(), which takes one factor per task. combine=None brings each "
            "task's gradient to size by one number."
        )
    if rule.head_weighting != "none":
        raise ValueError(
            f"Expected head_weighting='none' for split(), but got {rule.head_weighting!r}: the gradients of heads have "
            "been written when the weights are known."
        )


def _is_traced(tensor: Tensor) -> bool:
    """Returns whether ``tensor`` stands for the value of a graph that is being made, as in ``aot_function``."""
    return type(tensor).__module__.startswith("torch._subclasses.")


class _Split(torch.autograd.Function):
    """T copies of K features, task-major; the backward pass is a step."""

    # A setup_context() would cost 0.1 ms a call, and serve transforms that a step in a backward pass is none for.
    @staticmethod
    def forward(ctx: Any, node_pass: NodePass, *features: Tensor) -> tuple[Tensor, ...]:
        ctx.node_pass = node_pass
        ctx.save_for_backward(*features)
        ctx.set_materialize_grads(False)  # None tells that a task is absent
        return tuple(
            feature.view_as(feature)
            for _ in range(node_pass.rule.num_tasks)
            for feature in features
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(ctx.saved_tensors))
        return (None, *ctx.node_pass.run(ctx.saved_tensors, grads))


class _CompiledSplit(torch.autograd.Function):
    """The same for a graph that is compiled: the step is one op, which nobody looks into."""

    @staticmethod
    def forward(
        handle: int, num_tasks: int, scale: Tensor | None, *features: Tensor
    ) -> tuple[Tensor, ...]:
        # Not views: those that leave the graph would be taken of the features again, past this node.
        return tuple(feature.clone() for _ in range(num_tasks) for feature in features)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.handle, _, ctx.scale, *features = inputs
        ctx.save_for_backward(*features)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        handed = step_in_graph(ctx.handle, ctx.scale, list(ctx.saved_tensors), list(grads))
        return (None, None, None, *handed)


class TaskSplit(nn.Module):
    """:meth:`excessmtl_ext.ExcessMTL.split` as a layer, to put between encoder and heads.

    It holds the balancer as a sub-module, so that the model's ``state_dict``, ``to`` and ``train``
    concern it, too. In evaluation mode the copies are the features themselves.

    Args:
        balancer: The balancer.

    Shape:
        features: one tensor or a list of them. Returns T of the same.

    Example:
        >>> import torch
        >>> from excessmtl_ext import ExcessMTL
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), TaskSplit(ExcessMTL(num_tasks=2)))
        >>> [tuple(z.shape) for z in model(torch.ones(3, 4))]
        [(3, 8), (3, 8)]
    """

    def __init__(self, balancer: Any) -> None:
        super().__init__()
        if not isinstance(balancer, nn.Module) or not hasattr(balancer, "split"):
            raise TypeError(
                "Expected `balancer` with a split(), such as ExcessMTL(num_tasks=3), but got "
                f"{type(balancer).__name__}."
            )
        self.balancer = balancer

    def forward(self, features: Features) -> tuple[Any, ...]:
        """Returns T copies of the features."""
        return self.balancer.split(features)  # type: ignore[operator, no-any-return]
