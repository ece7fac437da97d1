"""Passes cut in two where heads meet the encoder: heads from the losses to the features, then the encoder T times.

Every head's graph is walked once and freed before the first gradient of the encoder exists. What
is left, T gradients of the same features, is what a batched pass needs.

The cut changes no result. Where it could (see :attr:`Cut.obstacle`), the step takes ordinary
passes, which never need to know where the features are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from excessmtl_ext.passes.capture import capture_batched, capture_grads, deposit_grads
from excessmtl_ext.passes.explain import raise_explained
from excessmtl_ext.passes.hidden import hidden_parameters, hides_parameters
from excessmtl_ext.passes.node_hooks import reading, scaling
from excessmtl_ext.passes.per_task import (
    GradRows,
    HeadGrads,
    Pass,
    check_reached,
    flat_rows,
    raise_if_reused,
    run_backward,
    run_passes,
    starts_of,
)
from excessmtl_ext.passes.reused_memory import copied
from excessmtl_ext.step import Root, Step

_backward_hooks_of: Callable[[Tensor], Any] = attrgetter("_backward_hooks")


class Cut:
    """What lies on either side of the features in this step's graphs.

    Args:
        roots: One per task, None where absent.
        features: As :func:`checked_features` gives them.
        shared: The shared parameters.
        retain_graph: Keep the graphs for another backward pass.

    Attributes:
        heads: Per task, the parameters between its loss and the features.
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
        self._retain = retain_graph
        self._copy = False
        self._encoder_hides = False
        self._hides = False  # whether a node above the features has parameters out of sight
        self.shared = list(shared)
        self._edges = {(z.grad_fn, z.output_nr): index for index, z in enumerate(features)}
        self._is_shared = {id(parameter) for parameter in shared}
        self.heads: list[list[Tensor]] = []
        self.reached: list[list[int]] = []  # per task, which features
        self._entries: list[
            list[tuple[Node, list[int]]]
        ] = []  # per task, what hands gradients to features
        num_walked, walked = 0, set()
        for task, root in enumerate(roots):
            self._entries.append([])
            nodes, heads, reached = self._head_of(root) if root is not None else (set(), [], [])
            if root is not None:
                self._check_head(task, heads, reached)
            self.heads.append(heads)
            self.reached.append(reached)
            num_walked += len(nodes)
            walked |= nodes
        self._heads_meet = len(walked) < num_walked  # a node that several tasks need
        self.obstacle = self._find_obstacle()

    def _head_of(self, root: Root) -> tuple[set[Node], list[Tensor], list[int]]:
        """Nodes above the features, parameters among them, and the features that ``root`` needs."""
        node, output_nr = (
            (root.grad_fn, root.output_nr) if isinstance(root, Tensor) else (root[0], root[1])
        )
        if node is None or (node, output_nr) in self._edges:
            return set(), [], [] if node is None else [self._edges[node, output_nr]]
        nodes, leaves, reached = {node}, [], set()
        stack = [node]
        while stack:
            node = stack.pop()
            variable = getattr(node, "variable", None)
            if variable is not None:
                leaves.append(variable)
            self._hides = self._hides or hides_parameters(node)
            handing = []
            for position, edge in enumerate(node.next_functions):
                parent = edge[0]
                if parent is None:
                    continue
                if edge in self._edges:
                    reached.add(self._edges[edge])
                    handing.append(position)
                elif parent not in nodes:
                    nodes.add(parent)
                    stack.append(parent)
            if handing:
                self._entries[-1].append((node, handing))
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
        if any(_backward_hooks_of(leaf) for leaf in self.all_heads()):
            return "a parameter of a head has a hook"
        stack = list({node: None for node, _ in self._edges if node is not None})
        seen = set(stack)
        while stack:
            node = stack.pop()
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) not in self._is_shared:
                return "parameters that are not shared lie below the features"
            if hides_parameters(node):
                found = hidden_parameters(node)
                if found is None or any(id(each) not in self._is_shared for each in found):
                    return "a node below the features hides parameters that may not be shared"
                self._encoder_hides = True
            for edge in node.next_functions:
                parent = edge[0]
                if edge in self._edges:
                    return "one feature is computed from another"
                if parent is not None and parent not in seen:
                    seen.add(parent)
                    stack.append(parent)
        return None

    def all_heads(self) -> list[Tensor]:
        """Every parameter above the features once."""
        return list({id(leaf): leaf for heads in self.heads for leaf in heads}.values())

    def task_grads(
        self,
        step: Step,
        *,
        keep_heads: bool,
        walk_encoder: Callable[[Cut, list[list[Tensor | None]]], GradRows] | None = None,
    ) -> tuple[GradRows, HeadGrads | None]:
        """Gradients of every task, from the losses to the features and on to the shared parameters.

        Args:
            step: Gives roots and scale.
            keep_heads: Return the gradients of heads, per task, instead of adding them to ``.grad``.
            walk_encoder: Runs the encoder's passes; None for one per task.
        """
        feature_grads, head_grads = self.walk_heads(step)
        rows = (walk_encoder or Cut.walk_encoder)(self, feature_grads)
        if not keep_heads:
            self.deposit_heads(head_grads)
            return rows, None
        return rows, HeadGrads(self.heads, dict(enumerate(head_grads)))

    def walk_heads(self, step: Step) -> tuple[list[list[Tensor | None]], list[list[Tensor | None]]]:
        """One pass from every loss to the features and the parameters of its head; no ``.grad`` is touched.

        Returns:
            Per task, gradients of the features it reached, and of its ``heads``.
        """
        roots, starts = step.roots, starts_of(step.roots, step.grad_scale)
        self._copy = step.copy_gradients
        if self._heads_are_apart(roots) and not self._copy:
            return self._walk_heads_at_once(roots, starts)
        present = [task for task, root in enumerate(roots) if root is not None]
        feature_grads: list[list[Tensor | None]] = [[] for _ in roots]
        head_grads: list[list[Tensor | None]] = [[] for _ in roots]
        for task in present:
            root, start, reached = roots[task], starts[task], self.reached[task]
            assert root is not None
            assert start is not None
            grads = capture_grads(
                root,
                start,
                [*(self.features[index] for index in reached), *self.heads[task]],
                retain_graph=self._retain or (self._heads_meet and task != present[-1]),
                keep_sparse=True,
            )
            grads = copied(grads) if self._copy else grads
            feature_grads[task] = grads[: len(reached)]
            head_grads[task] = grads[len(reached) :]
        raise_if_reused(dict(enumerate(feature_grads)), of="feature", starts=starts)
        raise_if_reused(dict(enumerate(head_grads)), of="the head's parameter", starts=starts)
        return feature_grads, head_grads

    def _heads_are_apart(self, roots: Sequence[Root | None]) -> bool:
        """Whether no node serves two heads and a node of its own lies between each loss and the features."""
        return not self._heads_meet and all(
            bool(entries) == (root is not None)
            for entries, root in zip(self._entries, roots, strict=True)
        )

    def _walk_heads_at_once(
        self, roots: Sequence[Root | None], starts: Sequence[Tensor | None]
    ) -> tuple[list[list[Tensor | None]], list[list[Tensor | None]]]:
        """:meth:`walk_heads` in one pass from all losses: what a head hands to the features is read off on the way.

        T calls of the engine cost more than small heads do.
        """
        found: list[dict[int, Tensor]] = [{} for _ in roots]
        handles = [
            node.register_hook(reading(self._edges_at(node, positions), found[task]))
            for task, entries in enumerate(self._entries)
            for node, positions in entries
        ]
        used = sorted({index for reached in self.reached for index in reached})
        heads = self.all_heads()
        try:
            grads = torch.autograd.grad(
                [root for root in roots if root is not None],  # type: ignore[arg-type]
                [*(self.features[index] for index in used), *heads],
                [start for start in starts if start is not None],
                retain_graph=self._retain,
                allow_unused=True,
            )
        except RuntimeError as error:
            raise_explained(error)
            raise
        finally:
            for handle in handles:
                handle.remove()
        of_head = dict(zip(map(id, heads), grads[len(used) :], strict=True))
        taken = {task: list(grads.values()) for task, grads in enumerate(found)}
        raise_if_reused(taken, of="feature", starts=starts)
        return (
            [
                [found[task].get(index) for index in reached]
                for task, reached in enumerate(self.reached)
            ],
            [[of_head[id(leaf)] for leaf in leaves] for leaves in self.heads],
        )

    def _edges_at(self, node: Node, positions: Sequence[int]) -> list[tuple[int, int]]:
        """For each of these inputs of a node: its position, and which feature it is."""
        edges = node.next_functions
        return [(position, self._edges[edges[position]]) for position in positions]  # type: ignore[index]

    def deposit_heads(self, head_grads: Sequence[Sequence[Tensor | None]]) -> None:
        """Adds every task's gradients of its head to ``.grad``, in one pass, so that what is hooked there runs once."""
        totals: dict[int, Tensor] = {}
        for heads, grads in zip(self.heads, head_grads, strict=True):
            for leaf, grad in zip(heads, grads, strict=True):
                if grad is not None:
                    known = totals.get(id(leaf))
                    totals[id(leaf)] = grad if known is None else known + grad
        reached = [leaf for leaf in self.all_heads() if id(leaf) in totals]
        deposit_grads(reached, [totals[id(leaf)] for leaf in reached])

    def encoder_root(
        self, task: int, feature_grads: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Where the encoder's pass of ``task`` starts, and with what."""
        pairs = [
            (self.features[index], grad)
            for index, grad in zip(self.reached[task], feature_grads, strict=True)
            if grad is not None
        ]
        return [feature for feature, _ in pairs], [grad for _, grad in pairs]

    def walk_encoder(self, feature_grads: Sequence[Sequence[Tensor | None]]) -> GradRows:
        """One pass of the encoder per present task, as ``per_task.backward_per_task``."""
        passes = [
            Pass(task, *self.encoder_root(task, feature_grads[task]))
            for task, reached in enumerate(self.reached)
            if reached
        ]
        return run_passes(
            passes,
            len(feature_grads),
            self.shared,
            retain_graph=self._retain,
            copy=self._copy,
        )

    def obstacle_to_batching(self) -> str | None:
        """Why a vectorised pass of the encoder would not equal T passes, or would waste most of its work; or None."""
        present = [set(reached) for reached in self.reached if reached]
        if len(present) < 2:
            return "fewer than two tasks are present"
        if self._encoder_hides:
            return "the encoder runs a backward pass of its own (a reentrant checkpoint, for one)"
        if any(_backward_hooks_of(parameter) for parameter in self.shared):
            return "a shared parameter has a hook"
        if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in self.shared):
            return "a shared parameter has a hook"
        if any(sum(index in reached for reached in present) < 2 for index in set().union(*present)):
            return "a task has features of its own"
        return None

    def walk_encoder_batched(
        self, feature_grads: Sequence[Sequence[Tensor | None]], *, retain_graph: bool
    ) -> GradRows:
        """:meth:`walk_encoder` in one vectorised pass; touches no ``.grad``.

        Raises:
            RuntimeError: some layer cannot be batched.
        """
        present = [task for task, reached in enumerate(self.reached) if reached]
        used = sorted(set().union(*(self.reached[task] for task in present)))
        features = [self.features[index] for index in used]
        starts = [self._stacked(index, present, feature_grads) for index in used]
        keep = retain_graph or self._retain
        rows = capture_batched(features, starts, self.shared, retain_graph=keep)
        task_grads: list[list[Tensor | None]] = [[None] * len(self.shared) for _ in feature_grads]
        for task, row in zip(present, rows, strict=True):
            task_grads[task] = row
        check_reached(rows[0], present[0])
        return GradRows(task_grads, flat_rows(task_grads))

    def _stacked(
        self,
        index: int,
        tasks: Sequence[int],
        feature_grads: Sequence[Sequence[Tensor | None]],
    ) -> Tensor:
        """Gradients of one feature for ``tasks``, [K, ...]; zeros where a task does not need it."""
        found = [
            dict(zip(self.reached[task], feature_grads[task], strict=True)).get(index)
            for task in tasks
        ]
        zeros = torch.zeros_like(self.features[index]) if any(g is None for g in found) else None
        return torch.stack([grad if grad is not None else zeros for grad in found])  # type: ignore[misc]

    def weighted_backward(self, step: Step, task_weights: Tensor) -> None:
        """Applies given weights to the shared gradients only: one pass where heads have no node in common."""
        if self._heads_are_apart(step.roots):
            self._one_weighted_pass(step, task_weights)
            return
        feature_grads, head_grads = self.walk_heads(step)
        self.walk_encoder_weighted(feature_grads, task_weights)
        self.deposit_heads(head_grads)

    def _one_weighted_pass(self, step: Step, task_weights: Tensor) -> None:
        """One pass from all losses, in which what a head hands to the features is multiplied by its task's weight."""
        of_dtype = task_weights.to(self.features[0].dtype).unbind()
        handles = [
            node.register_hook(scaling(positions, weight))
            for entries, weight in zip(self._entries, of_dtype, strict=True)
            for node, positions in entries
        ]
        starts = starts_of(step.roots, step.grad_scale)
        try:
            run_backward(
                [root for root in step.roots if root is not None],
                [start for start in starts if start is not None],
                retain_graph=self._retain,
            )
        finally:
            for handle in handles:
                handle.remove()

    def walk_encoder_weighted(
        self, feature_grads: Sequence[Sequence[Tensor | None]], task_weights: Tensor
    ) -> None:
        """One pass of the encoder from the weighted sum of the features' gradients; adds to the shared ``.grad``."""
        present = [task for task, reached in enumerate(self.reached) if reached]
        used = sorted(set().union(*(self.reached[task] for task in present)))
        # Not by a list as index, which a GPU would wait for.
        everyone = len(present) == len(self.reached)
        weights = task_weights if everyone else torch.stack([task_weights[i] for i in present])
        starts = [
            torch.tensordot(
                weights.to(self.features[index].dtype),
                self._stacked(index, present, feature_grads),
                dims=1,
            )
            for index in used
        ]
        run_backward([self.features[index] for index in used], starts, retain_graph=self._retain)
