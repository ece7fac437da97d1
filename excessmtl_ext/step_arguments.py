"""What ``backward`` and ``accumulate`` are given, checked and read into a :class:`excessmtl_ext.step.Step`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import GradientEdge

from excessmtl_ext.step import (
    Features,
    Losses,
    NumSamples,
    Root,
    Step,
    WeightingRule,
    input_metadata_of,
)
from excessmtl_ext.unfit_parameters import raise_unfit


def read_step(
    rule: WeightingRule,
    losses: Losses,
    *,
    grad_scale: Tensor | float | None = None,
    features: Features | None = None,
    num_samples: NumSamples | None = None,
    retain_graph: bool = False,
    runs_now: bool = False,
) -> Step:
    """Checks the arguments of ``backward`` and finds where each task's pass starts, and with what.

    ``runs_now``: The passes follow at once, so :func:`check_ready` is part of it.

    Raises:
        TypeError: ``losses`` or ``features`` is neither a tensor nor a list of tensors.
        ValueError: number, shape, device or graph of losses or features is not as expected.
        RuntimeError: ``accumulate`` has begun a step.
    """
    losses = in_order(rule, losses)
    roots = loss_roots(losses, rule.num_tasks)
    shared = bound_parameters(rule)
    check_device(roots, shared[0].device)
    scale = None if grad_scale is None else as_scale(grad_scale, rule.task_weights.device)
    features = None if features is None else checked_features(features, shared[0].device)
    if runs_now:
        check_ready(rule, shared)
    return Step(
        roots=roots,
        tasks=[task for task, root in enumerate(roots) if root is not None],
        shared=shared,
        starts=starts_of(roots, scale),
        losses=loss_values(losses, rule.task_weights) if "losses" in rule.requires else None,
        grad_scale=scale,
        features=features,
        num_samples=num_samples,
        moves_weights=moves_weights(rule),
        retain_graph=retain_graph,
        copy_gradients=rule.copy_gradients,
    )


def in_order(rule: WeightingRule, losses: Losses) -> Tensor | Sequence[Tensor | None]:
    """Returns the losses by task index: those of a mapping in the order of the first one that ``rule`` was given.

    Raises:
        ValueError: the keys are not those of the first mapping.
    """
    if not isinstance(losses, Mapping):
        return losses
    names = tuple(losses) if rule.task_names is None else rule.task_names
    if len(names) != rule.num_tasks:
        raise ValueError(
            f"Expected `losses` to hold {rule.num_tasks} losses, one per task, but got the keys {list(losses)}. Give a "
            "task that has no labels in this batch the value None."
        )
    if set(names) != set(losses):
        raise ValueError(
            f"Expected `losses` with the keys of the first step, {list(names)}, but got {list(losses)}. Give a task "
            "that has no labels in this batch the value None."
        )
    values = [losses[name] for name in names]
    loss_roots(values, rule.num_tasks)
    rule.task_names = names
    return values


def read_task(
    rule: WeightingRule,
    task: int,
    loss: Tensor,
    grad_scale: Tensor | float | None,
    *,
    retain_graph: bool = False,
) -> Step:
    """Checks the arguments of ``accumulate``, and that its pass may begin: a step of one task."""
    check_loss(loss, "loss")
    shared = bound_parameters(rule)
    check_device([loss], shared[0].device)
    scale = None if grad_scale is None else as_scale(grad_scale, rule.task_weights.device)
    check_grads(shared)
    check_accumulation_hooks(shared)
    return Step(
        roots=[loss],
        tasks=[task],
        shared=shared,
        starts=[start_of(loss, scale)],
        losses=loss.detach(),
        grad_scale=scale,
        moves_weights=moves_weights(rule),
        retain_graph=retain_graph,
        copy_gradients=rule.copy_gradients,
    )


def moves_weights(rule: WeightingRule) -> bool:
    """Tells whether the next step moves the weights or only applies them."""
    return rule.num_calls % rule.update_every == 0 and not rule.holds_weights


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a context without autocast, which would round sums of gradients to its type."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def start_of(root: Root, scale: Tensor | None) -> Tensor:
    """Makes the gradient that a pass starts with: ones, or the scale, in the shape and dtype of the loss."""
    if isinstance(root, Tensor):
        one = torch.ones_like(root)
    else:
        metadata = input_metadata_of(root.node)[root.output_nr]
        one = torch.ones(tuple(metadata.shape), dtype=metadata.dtype, device=metadata.device)
    return one if scale is None else one * scale.to(one)


def starts_of(roots: Sequence[Root | None], scale: Tensor | None) -> list[Tensor | None]:
    """:func:`start_of` for every present task; losses of one shape, dtype and device share one tensor."""
    known: dict[Any, Tensor] = {}
    starts: list[Tensor | None] = []
    for root in roots:
        if root is None:
            starts.append(None)
            continue
        metadata = (
            root if isinstance(root, Tensor) else input_metadata_of(root.node)[root.output_nr]
        )
        kind = (tuple(metadata.shape), metadata.dtype, metadata.device)
        if kind not in known:
            known[kind] = start_of(root, scale)
        starts.append(known[kind])
    return starts


def check_ready(rule: WeightingRule, shared: Sequence[Tensor]) -> None:
    """Raises unless passes may begin: RuntimeError in an open step, ValueError where ``shared`` is not fit for them."""
    if rule.stream is not None:
        rule.refuse_open_step("another step")
    check_grads(shared, allow_sparse="task_grads" not in rule.requires)
    if not rule.engine.allows_hooks:
        check_accumulation_hooks(shared)


def check_grads(shared: Sequence[Tensor], *, allow_sparse: bool = False) -> None:
    """Raises ValueError unless a sum can be added to the ``.grad`` that the shared parameters have."""
    for index, parameter in enumerate(shared):
        grad = parameter.grad
        if grad is None:
            continue
        if grad.layout != torch.strided:
            if allow_sparse:
                continue
            found = f"the layout {grad.layout}"
        elif grad.dtype != parameter.dtype:
            found = f"{grad.dtype} for a parameter of {parameter.dtype}"
        elif any(
            stride == 0 and size > 1 for size, stride in zip(grad.shape, grad.stride(), strict=True)
        ):
            found = f"an expanded tensor of strides {list(grad.stride())}"
        else:
            continue
        raise ValueError(
            f"Expected `.grad` of shared parameter {index}, of shape {list(parameter.shape)}, to be None or dense, "
            f"with memory of its own for each element, but got {found}. Call optimizer.zero_grad(), or set it to None."
        )


def check_accumulation_hooks(shared: Sequence[Tensor]) -> None:
    """Raises ValueError where a hook waits for a shared gradient that would be that of one task."""
    for index, parameter in enumerate(shared):
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
        if hooks or getattr(parameter, "_in_backward_optimizers", None):
            names = [getattr(hook, "__qualname__", repr(hook)) for hook in (hooks or {}).values()]
            raise ValueError(
                f"Expected shared parameters without register_post_accumulate_grad_hook(), but number {index}, of "
                f"shape {list(parameter.shape)}, has {', '.join(names) or 'an optimizer in backward()'}: one that "
                "steps there would step with the gradient of a single task. Remove the hook, and call the optimizer "
                "after backward(losses), which leaves the weighted sum in .grad."
            )


def bound_parameters(rule: WeightingRule) -> list[Tensor]:
    """Returns the shared parameters; raises ValueError where no gradients can be written to them."""
    shared = rule.shared_parameters
    if (
        shared is None
        or isinstance(shared[0], FakeTensor)
        or shared[0].is_meta
        or not any(parameter.requires_grad for parameter in shared)
        or any(parameter.requires_grad for parameter in rule.frozen_parameters.values())
    ):
        raise_unfit(rule)
    return shared


def as_scale(grad_scale: Tensor | float, device: torch.device) -> Tensor:
    """Converts the scale to a scalar tensor on ``device``, float32, or float64 where it was given so.

    Raises:
        ValueError: it is not one number.
    """
    if isinstance(grad_scale, (int, float)):  # a fill: a GPU would wait for a copy
        return torch.full((), float(grad_scale), dtype=torch.float32, device=device)
    scale = torch.as_tensor(grad_scale, device=device).detach()
    if scale.numel() != 1:
        raise ValueError(
            f"Expected `grad_scale` to be one number, but got shape {list(scale.shape)}."
        )
    return scale.reshape(()).to(torch.float64 if scale.dtype == torch.float64 else torch.float32)


def loss_roots(losses: Tensor | Sequence[Tensor | None], num_tasks: int) -> list[Root | None]:
    """Checks the losses and finds where each task's backward pass starts.

    The elements of a stacked tensor hang together: a pass from one of them would walk the graphs of
    all (with zeros), T * T graphs a step. So the pass starts at what was stacked.

    Args:
        losses: T scalar losses.
        num_tasks: T.

    Returns:
        A root per task, None for an absent task.

    Raises:
        TypeError: ``losses`` is neither a tensor nor a list of tensors and None.
        ValueError: the number of losses, a shape or ``requires_grad`` is not as expected.
    """
    if isinstance(losses, Tensor):
        if losses.dim() != 1 or losses.shape[0] != num_tasks:
            raise ValueError(
                f"Expected `losses` of shape [{num_tasks}], one scalar per task, but got {list(losses.shape)}. "
                "Stack scalars with torch.stack, or pass a list."
            )
        if not losses.requires_grad:
            raise ValueError(
                f"Expected `losses` to require grad, but got a tensor without a graph. {_way_out_without_graph()}"
            )
        if losses.grad_fn is not None and (has_hooks(losses) or losses.retains_grad):
            raise ValueError(
                "Expected `losses` without a hook or retain_grad(), as passes start at what was stacked, but got a "
                "tensor with one. Put it on the single losses, or pass them as a list."
            )
        return _stacked_roots(losses)
    if not isinstance(losses, (list, tuple)):
        raise TypeError(
            "Expected `losses` to be a tensor [T], or a list or dict of scalars, but got "
            f"{type(losses).__name__}."
        )
    if len(losses) != num_tasks:
        raise ValueError(
            f"Expected `losses` to hold {num_tasks} losses, one per task, but got {len(losses)}. "
            "Pass None for a task that has no labels in this batch."
        )
    roots: list[Root | None] = []
    for task, loss in enumerate(losses):
        if loss is None:
            roots.append(None)
            continue
        check_loss(loss, f"losses[{task}]")
        roots.append(loss)
    return roots


def check_loss(loss: object, name: str) -> None:
    """Raises unless ``loss`` is a scalar tensor with a graph."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"Expected `{name}` to be a scalar tensor, but got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise ValueError(
            f"Expected `{name}` to be a scalar, but got shape {list(loss.shape)}. Reduce it with mean() or sum()."
        )
    if not loss.requires_grad:
        raise ValueError(
            f"Expected `{name}` to require grad, but got a tensor without a graph. {_way_out_without_graph()}"
        )


def _way_out_without_graph() -> str:
    if not torch.is_grad_enabled():
        return (
            "Gradients are disabled here (torch.no_grad() or inference_mode()): for a validation loss sum the losses "
            "yourself, as in sum(losses), or (balancer.task_weights * torch.stack(losses)).sum(); a balancer takes "
            "training losses, computed outside torch.no_grad()."
        )
    return (
        "Compute it outside torch.no_grad() and do not detach it; pass None for a task that has no labels in this "
        "batch."
    )


has_hooks: Callable[[Tensor], Any] = attrgetter("_backward_hooks")
"""The tensor's hooks, or None; torch has no public name for it."""


def _stacked_roots(losses: Tensor) -> list[Root | None]:
    node = losses.grad_fn
    if node is None or node.name() != "StackBackward0":
        return list(losses.unbind())
    roots: list[Root | None] = []
    for task, (parent, output_nr) in enumerate(node.next_functions):
        if parent is None:
            raise ValueError(
                f"Expected `losses[{task}]` to require grad, but it was stacked from a tensor without a graph. "
                "Pass a list with None for a task that has no labels in this batch."
            )
        roots.append(GradientEdge(parent, output_nr))
    return roots


def loss_values(losses: Tensor | Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Stacks the losses to a detached tensor [T] of the dtype and device of ``like``; NaN for an absent task."""
    if isinstance(losses, Tensor):
        return losses.detach().to(like)
    missing = torch.full((), float("nan"), dtype=like.dtype, device=like.device)
    return torch.stack(
        [missing if loss is None else loss.detach().reshape(()).to(like) for loss in losses]
    )


def _device_of(root: Root) -> torch.device:
    if isinstance(root, Tensor):
        return root.device
    return input_metadata_of(root.node)[root.output_nr].device


def check_device(roots: Iterable[Root | None], device: torch.device) -> None:
    """Raises ValueError when a loss lies on another device than the shared parameters."""
    for task, root in enumerate(roots):
        if root is not None and _device_of(root) != device:
            raise ValueError(
                f"Expected `losses[{task}]` on {device}, where the shared parameters are, but got {_device_of(root)}. "
                "Move the model or the loss."
            )


def checked_features(features: Features, device: torch.device) -> list[Tensor]:
    """Lists the features.

    Raises:
        TypeError: ``features`` is neither a tensor nor a list of tensors.
        ValueError: one of them has no graph, is repeated or lies on another device than ``device``.
    """
    if isinstance(features, Tensor):
        features = [features]
    if not isinstance(features, (list, tuple)):
        raise TypeError(
            f"Expected `features` to be a tensor or a list of tensors, but got {type(features).__name__}."
        )
    if not features:
        raise ValueError(
            "Expected `features` to hold at least one tensor, but got an empty list. Pass None to leave them out."
        )
    edges = set()
    for index, feature in enumerate(features):
        name = f"features[{index}]"
        if not isinstance(feature, Tensor):
            raise TypeError(f"Expected `{name}` to be a tensor, but got {type(feature).__name__}.")
        if feature.grad_fn is None:
            raise ValueError(
                f"Expected `{name}` to be computed from the shared parameters, but got a tensor without a graph. "
                "Pass what the encoder returned, not detached and not from torch.no_grad()."
            )
        if feature.device != device:
            raise ValueError(
                f"Expected `{name}` on {device}, where the shared parameters are, but got {feature.device}."
            )
        edge = (feature.grad_fn, feature.output_nr)
        if edge in edges:
            raise ValueError(f"Expected every tensor of `features` once, but got `{name}` again.")
        edges.add(edge)
    return list(features)
