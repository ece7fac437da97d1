"""The graphs above the encoder: which parameters are whose, and where a task's own graph ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from excessmtl_ext.passes.hidden import described, hidden_parameters, hides_parameters
from excessmtl_ext.step import Root

_SEVERAL = -1
"""Owner of a node that more than one task's pass visits."""


class HeadGraph:
    """What the passes of a step visit.

    Each node belongs to the one task whose pass visits it, or to several. Every node is visited at
    most twice, so the encoder is not walked once per task.

    Args:
        roots: One per task, None where absent.
        shared: The shared parameters.
        finds_borders: Whether to look for ``borders``.

    Attributes:
        leaves: Per task, every parameter that its pass reaches and that is not shared.
        heads: All of these, each once.
        unseen: A node whose parameters cannot be told (:mod:`excessmtl_ext.passes.hidden`), or None.
        hides: Whether some node hides parameters, known or not.
        borders: Per task, the nodes that hand gradients out of its own graph, with the positions at which they do.
            Outside are the shared parameters and every node that several tasks visit. None where no factor at the
            border weighs the shared gradients and leaves those of heads alone: where a parameter that is not shared
            lies outside, or one that is shared is hidden inside.
    """

    def __init__(
        self,
        roots: Sequence[Root | None],
        shared: Sequence[Tensor],
        *,
        finds_borders: bool = False,
    ) -> None:
        self._is_shared = {id(parameter) for parameter in shared}
        self._roots = roots
        self._nodes = [
            None if root is None else root.grad_fn if isinstance(root, Tensor) else root.node
            for root in roots
        ]
        self._edges: dict[Node, tuple[tuple[Node | None, int], ...]] = {}
        self._owner: dict[Node, int] = {}
        for task, node in enumerate(self._nodes):
            if node is not None:
                self._claim(task, node)
        self._variables: dict[Node, list[Tensor]] = {}
        self.unseen: Node | None = None
        self.hides = False
        for node, edges in self._edges.items():
            variable = None if edges else getattr(node, "variable", None)
            if variable is not None:
                self._variables[node] = [variable]
            elif edges and isinstance(node, BackwardCFunction) and hides_parameters(node):
                self._uncover(node)
        self.leaves = self._head_leaves()
        self.heads = list({id(leaf): leaf for each in self.leaves for leaf in each}.values())
        finds_borders = finds_borders and self.unseen is None
        self.borders = self._find_borders() if finds_borders else None

    def _claim(self, task: int, start: Node) -> None:
        stack = [start]
        while stack:
            node = stack.pop()
            owner = self._owner.get(node)
            if owner in (task, _SEVERAL):
                continue
            if owner is None:
                self._edges[node] = node.next_functions
            self._owner[node] = task if owner is None else _SEVERAL
            stack += [parent for parent, _ in self._edges[node] if parent is not None]

    def _uncover(self, node: Node) -> None:
        self.hides = True
        found = hidden_parameters(node)
        if found is None:
            self.unseen = node
        else:
            self._variables[node] = found

    def _head_leaves(self) -> list[list[Tensor]]:
        heads = {
            node: others
            for node, variables in self._variables.items()
            if (others := [each for each in variables if id(each) not in self._is_shared])
        }
        several = {node for node in heads if self._owner[node] == _SEVERAL}
        leaves: list[list[Tensor]] = [[] for _ in self._nodes]
        for node, variables in heads.items():
            if node not in several:
                leaves[self._owner[node]] += variables
        if several:
            leads_there = self._nodes_above(several)
            for task, start in enumerate(self._nodes):
                leaves[task] += self._reached(start, several, leads_there, heads)
        for task, (root, node) in enumerate(zip(self._roots, self._nodes, strict=True)):
            if node is None and isinstance(root, Tensor) and id(root) not in self._is_shared:
                leaves[task].append(root)
        return [list({id(leaf): leaf for leaf in each}.values()) for each in leaves]

    def _reached(
        self,
        start: Node | None,
        targets: set[Node],
        leads_there: set[Node],
        heads: dict[Node, list[Tensor]],
    ) -> list[Tensor]:
        found: list[Tensor] = []
        stack = [] if start is None or start not in leads_there else [start]
        seen = set(stack)
        while stack:
            node = stack.pop()
            if node in targets:
                found += heads[node]
            for parent, _ in self._edges[node]:
                if parent is not None and parent not in seen and parent in leads_there:
                    seen.add(parent)
                    stack.append(parent)
        return found

    def _nodes_above(self, targets: Iterable[Node]) -> set[Node]:
        """Collects ``targets`` and every node whose gradients some of them receive."""
        children_of: dict[Node, list[Node]] = {}
        for node, edges in self._edges.items():
            for parent, _ in edges:
                if parent is not None:
                    children_of.setdefault(parent, []).append(node)
        stack = list(targets)
        above = set(stack)
        while stack:
            for child in children_of.get(stack.pop(), ()):
                if child not in above:
                    above.add(child)
                    stack.append(child)
        return above

    def _find_borders(self) -> list[list[tuple[Node, list[int]]]] | None:
        for node, variables in self._variables.items():
            is_outside = self._owner[node] == _SEVERAL or not self._edges[node]
            for variable in variables:
                if id(variable) in self._is_shared:
                    if not is_outside:
                        return None
                elif self._owner[node] == _SEVERAL:
                    return None
        borders: list[list[tuple[Node, list[int]]]] = [[] for _ in self._nodes]
        for root, start in zip(self._roots, self._nodes, strict=True):
            if root is not None and (start is None or self._is_outside(start)):
                return None
        for node, edges in self._edges.items():
            owner = self._owner[node]
            if owner == _SEVERAL:
                continue
            handing = [
                position
                for position, (parent, _) in enumerate(edges)
                if parent is not None and self._is_outside(parent)
            ]
            if handing:
                borders[owner].append((node, handing))
        return borders

    def _is_outside(self, node: Node) -> bool:
        if self._owner[node] == _SEVERAL:
            return True
        variables = self._variables.get(node, ())
        return not self._edges[node] and any(id(each) in self._is_shared for each in variables)

    def raise_if_unseen(self, purpose: str) -> None:
        """Raises ValueError where some parameters cannot be told; ``purpose`` says what needs them."""
        if self.unseen is not None:
            raise ValueError(
                f"Expected graphs whose parameters can be seen, as {purpose}, but {described(self.unseen)} hides "
                "those below it. Call checkpoint with use_reentrant=False, keep the Function's modules in its ctx, "
                "or take head_weighting='none' without `features`, `estimate_from` and `process_group`."
            )


def check_open(nodes: Iterable[Node], purpose: str) -> None:
    """Raises ValueError if one of ``nodes`` runs a backward pass of its own; ``purpose`` says what rules it out."""
    for node in nodes:
        if isinstance(node, BackwardCFunction) and hides_parameters(node):
            raise ValueError(
                f"Expected graphs without a backward pass inside a node, as {purpose}, but got "
                f"{described(node).rstrip(',')}. Call checkpoint with use_reentrant=False, or leave the option out."
            )
