"""Parameters that are not shared (heads), by the tasks whose losses reach them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from torch.autograd.graph import Node

from excessmtl_ext.step import Root


def head_leaves(roots: Sequence[Root | None], shared: Sequence[Tensor]) -> list[list[Tensor]]:
    """Per task, every parameter that its loss reaches and that is not shared."""
    is_shared = {id(parameter) for parameter in shared}
    nodes = [
        None if root is None else root.grad_fn if isinstance(root, Tensor) else root.node
        for root in roots
    ]
    parents_of = _parents_below([node for node in nodes if node is not None])
    others = {
        node: variable
        for node, parents in parents_of.items()
        if not parents
        and (variable := getattr(node, "variable", None)) is not None
        and id(variable) not in is_shared
    }
    leads_there = _nodes_above(others, parents_of)
    leaves: list[list[Tensor]] = []
    for root, first in zip(roots, nodes, strict=True):
        if first is None:
            is_head = isinstance(root, Tensor) and id(root) not in is_shared
            leaves.append([root] if is_head else [])  # type: ignore[list-item]
            continue
        found: list[Tensor] = []
        stack, seen = [first], {first}
        while stack:
            node = stack.pop()
            if node in others:
                found.append(others[node])
            for parent in parents_of[node]:
                if parent not in seen and parent in leads_there:
                    seen.add(parent)
                    stack.append(parent)
        leaves.append(found)
    return leaves


def _parents_below(starts: Iterable[Node]) -> dict[Node, list[Node]]:
    """Every node that a pass from ``starts`` may visit, with those it hands its gradients to.

    So the encoder, which all tasks have in common, is walked once and not once for each of them.
    """
    parents_of: dict[Node, list[Node]] = {}
    stack = list(starts)
    while stack:
        node = stack.pop()
        if node not in parents_of:
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            parents_of[node] = parents
            stack += parents
    return parents_of


def _nodes_above(targets: Iterable[Node], parents_of: Mapping[Node, Sequence[Node]]) -> set[Node]:
    """``targets``, and every node whose gradients some of them receive."""
    children_of: dict[Node, list[Node]] = {}
    for node, parents in parents_of.items():
        for parent in parents:
            children_of.setdefault(parent, []).append(node)
    stack = list(targets)
    above = set(stack)
    while stack:
        for child in children_of.get(stack.pop(), ()):
            if child not in above:
                above.add(child)
                stack.append(child)
    return above
