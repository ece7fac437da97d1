"""The graphs of a step on either side of the features, and whether passes may be cut there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from excessmtl_ext.passes.hidden import hidden_parameters, hides_parameters
from excessmtl_ext.step import Root

_backward_hooks_of: Callable[[Tensor], Any] = attrgetter("_backward_hooks")


class CutGraph:
    """What lies on either side of the features in this step's graphs.

    Args:
        roots: One per task, None where absent.
        features: As :func:`checked_features` gives them.
        shared: The shared parameters.
        retain_graph: Keep the graphs for another backward pass.

    Attributes:
        heads: Per task, the parameters between its loss and the features.
        all_heads: All of these, each once.
        reached: Per task, the indices of the features that it needs.
        edges: The features' edges, with their indices.
        entries: Per task, the nodes that hand gradients to features, with the positions at which they do.
        heads_meet: Whether a node serves several heads.
        heads_are_apart: Whether none does, and a node of its own lies between each loss and the features.
        encoder_hides: Whether a node below the features hides parameters.
        obstacle: Why passes that are cut here would not equal ordinary ones, or None.

    Raises:
        ValueError: a loss does not depend on the features, or reaches a shared parameter past them.
    """

    def __init__(
        self,
        roots: Sequence[Root | None],
        features: Sequence[Tensor],
        shared: Sequence[Tensor],
        *,
        retain_graph: bool = False,
    ) -> None:
        self.features = list(features)
        self.retain_graph = retain_graph
        self.encoder_hides = False
        self._hides = False  # whether a node above the features has parameters out of sight
        self.shared = list(shared)
        self.edges = {(z.grad_fn, z.output_nr): index for index, z in enumerate(features)}
        self._is_shared = {id(parameter) for parameter in shared}
        self.heads: list[list[Tensor]] = []
        self.reached: list[list[int]] = []
        self.entries: list[list[tuple[Node, list[int]]]] = []
        num_walked, walked = 0, set()
        for task, root in enumerate(roots):
            self.entries.append([])
            nodes, heads, reached = self._head_of(root) if root is not None else (set(), [], [])
            if root is not None:
                self._check_head(task, heads, reached)
            self.heads.append(heads)
            self.reached.append(reached)
            num_walked += len(nodes)
            walked |= nodes
        self.all_heads = list({id(leaf): leaf for heads in self.heads for leaf in heads}.values())
        self.heads_meet = len(walked) < num_walked  # a node that several tasks need
        self.heads_are_apart = not self.heads_meet and all(
            bool(entries) == (root is not None)
            for entries, root in zip(self.entries, roots, strict=True)
        )
        self.obstacle = self._find_obstacle()

    def _head_of(self, root: Root) -> tuple[set[Node], list[Tensor], list[int]]:
        """Nodes above the features, parameters among them, and the features that ``root`` needs."""
        node, output_nr = (
            (root.grad_fn, root.output_nr) if isinstance(root, Tensor) else (root[0], root[1])
        )
        if node is None or (node, output_nr) in self.edges:
            return set(), [], [] if node is None else [self.edges[node, output_nr]]
        nodes, leaves, reached = {node}, [], set()
        stack = [node]
        while stack:
            node = stack.pop()
            variable = getattr(node, "variable", None)
            if variable is not None:
                leaves.append(variable)
            self._hides = self._hides or (
                isinstance(node, BackwardCFunction) and hides_parameters(node)
            )
            handing = []
            for position, edge in enumerate(node.next_functions):
                parent = edge[0]
                if parent is None:
                    continue
                if edge in self.edges:
                    reached.add(self.edges[edge])
                    handing.append(position)
                elif parent not in nodes:
                    nodes.add(parent)
                    stack.append(parent)
            if handing:
                self.entries[-1].append((node, handing))
        return nodes, leaves, sorted(reached)

    def _check_head(self, task: int, heads: Sequence[Tensor], reached: Sequence[int]) -> None:
        past = next((leaf for leaf in heads if id(leaf) in self._is_shared), None)
        if past is not None:
            raise ValueError(
                f"Expected `losses[{task}]` to depend on the shared parameters through `features` only, but it reaches "
                f"one of shape {list(past.shape)} past them. Pass every tensor that the heads take from the encoder, "
                "or leave `features` out."
            )
        if not reached:
            raise ValueError(
                f"Expected `losses[{task}]` to depend on `features`, but it does not. Check that it is computed from "
                "the tensors that were passed and not from copies; pass None for a task that is absent from this batch."
            )

    def _find_obstacle(self) -> str | None:
        if self._hides:
            return "a node above the features runs a backward pass of its own (a reentrant checkpoint, for one)"
        if any(_backward_hooks_of(feature) or feature.retains_grad for feature in self.features):
            return "a feature has a hook or retains its gradient"
        if any(_backward_hooks_of(leaf) for leaf in self.all_heads):
            return "a parameter of a head has a hook"
        stack = list({node: None for node, _ in self.edges if node is not None})
        seen = set(stack)
        while stack:
            node = stack.pop()
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) not in self._is_shared:
                return "parameters that are not shared lie below the features"
            if isinstance(node, BackwardCFunction) and hides_parameters(node):
                found = hidden_parameters(node)
                if found is None or any(id(each) not in self._is_shared for each in found):
                    return "a node below the features hides parameters that may not be shared"
                self.encoder_hides = True
            for edge in node.next_functions:
                parent = edge[0]
                if edge in self.edges:
                    return "one feature is computed from another"
                if parent is not None and parent not in seen:
                    seen.add(parent)
                    stack.append(parent)
        return None

    def obstacle_to_batching(self) -> str | None:
        """Says why a vectorised pass of the encoder would differ from T passes or waste most of its work; or None."""
        present = [set(reached) for reached in self.reached if reached]
        if len(present) < 2:
            return "fewer than two tasks are present"
        if self.encoder_hides:
            return "the encoder runs a backward pass of its own (a reentrant checkpoint, for one)"
        if any(_backward_hooks_of(parameter) for parameter in self.shared):
            return "a shared parameter has a hook"
        if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in self.shared):
            return "a shared parameter has a hook"
        if any(sum(index in reached for reached in present) < 2 for index in set().union(*present)):
            return "a task has features of its own"
        return None
