"""Passes that return gradients and touch no ``.grad``, and the one pass that adds given gradients to ``.grad``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from excessmtl_ext.passes.explain import raise_explained
from excessmtl_ext.passes.per_task import dense
from excessmtl_ext.step import Root


def nodes_of(roots: Iterable[Root]) -> Iterator[Node]:
    """Yields every node that a pass from ``roots`` may visit, once."""
    starts = (root.grad_fn if isinstance(root, Tensor) else root.node for root in roots)
    stack = list({node: None for node in starts if node is not None})
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)


def leaves_of(*roots: Root) -> dict[int, Tensor]:
    """Collects every parameter that a pass from ``roots`` reaches, by id."""
    leaves = {id(root): root for root in roots if isinstance(root, Tensor) and root.grad_fn is None}
    for node in nodes_of(roots):
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = variable
    return leaves


def capture_grads(
    root: Root,
    start: Tensor,
    parameters: Sequence[Tensor],
    *,
    retain_graph: bool,
    keep_sparse: bool = False,
) -> list[Tensor | None]:
    """Runs one pass that returns the gradients of ``parameters`` and touches no ``.grad``; sparse ones become dense.

    Nothing that waits for a gradient to be accumulated is told: DistributedDataParallel sees one
    pass per step, that of :func:`deposit_grads`.
    """
    asked = [parameter for parameter in parameters if parameter.requires_grad]
    if not asked:
        return [None] * len(parameters)
    try:
        found = iter(
            torch.autograd.grad(
                [root],  # type: ignore[list-item]
                asked,
                [start],
                retain_graph=retain_graph,
                allow_unused=True,
            )
        )
    except RuntimeError as error:
        raise_explained(error)
        raise
    # A parameter that is frozen has none.
    grads = [next(found) if parameter.requires_grad else None for parameter in parameters]
    return grads if keep_sparse else dense(grads)


def capture_batched(
    roots: Sequence[Tensor],
    starts: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    retain_graph: bool,
) -> list[list[Tensor | None]]:
    """Runs K passes in one, vectorised: like :func:`capture_grads` from ``roots`` with ``starts[:, k]``, for every k.

    Args:
        roots: M tensors.
        starts: M tensors [K, ...], of the shapes of ``roots`` behind K.
        parameters: L leaves.
        retain_graph: Keep the graph for another pass.

    Returns:
        K rows of L gradients, views of L tensors [K, ...]; None for a parameter that is frozen.

    Raises:
        RuntimeError: some layer cannot be batched; the graph is whole only with ``retain_graph``.
    """
    stacked = iter(
        torch.autograd.grad(
            list(roots),
            [parameter for parameter in parameters if parameter.requires_grad],
            list(starts),
            retain_graph=retain_graph,
            allow_unused=True,
            is_grads_batched=True,
        )
    )
    num_passes = starts[0].shape[0]
    none: list[Tensor | None] = [None] * num_passes
    columns = [
        none if not parameter.requires_grad or (grads := next(stacked)) is None else grads.unbind()
        for parameter in parameters
    ]
    return list(map(list, zip(*columns, strict=True)))


def deposit_grads(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    *,
    at_start: Callable[[], None] | None = None,
) -> None:
    """Runs one pass of the autograd engine that adds ``grads`` to ``.grad`` and runs whatever is hooked there.

    None is passed on as autograd's undefined gradient: the parameter is reported as done and its
    ``.grad`` stays as it is.

    Args:
        parameters: Leaves.
        grads: As many gradients, of the shapes of the parameters.
        at_start: Called within the pass, before the first gradient is added.
    """
    if parameters:
        with torch.enable_grad():
            _Deposit.apply(list(grads), at_start, *parameters).backward()  # type: ignore[union-attr]


class _Deposit(torch.autograd.Function):
    """A scalar whose gradients are given instead of computed."""

    @staticmethod
    def forward(
        ctx: Any,
        grads: list[Tensor | None],
        at_start: Callable[[], None] | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.grads, ctx.at_start = grads, at_start
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.at_start is not None:
            ctx.at_start()
        grads, ctx.grads = ctx.grads, None  # .grad may take the memory if nobody else holds it
        return (None, None, *grads)
