"""Passes cut in two where heads meet the encoder: heads from the losses to the features, then the encoder T times.

Every head's graph is walked once and freed before the first gradient of the encoder exists. What
is left, T gradients of the same features, is what a batched pass needs.

The cut changes no result. Where it could (see :attr:`Cut.obstacle`), the step takes ordinary
passes, which never need to know where the features are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from excessmtl_ext.passes.capture import capture_batched, capture_grads, deposit_grads
from excessmtl_ext.passes.cut_graph import CutGraph
from excessmtl_ext.passes.explain import raise_explained
from excessmtl_ext.passes.per_task import (
    GradRows,
    HeadGrads,
    Pass,
    check_reached,
    flat_rows,
    raise_if_reused,
    run_backward,
    run_passes,
)
from excessmtl_ext.passes.reused_memory import copied
from excessmtl_ext.passes.stacked import Stacker
from excessmtl_ext.step import Root, Step


class Cut(CutGraph):
    """The passes of a step that is cut at its features; takes the arguments of :class:`CutGraph`."""

    copies = False
    """Whether the gradients of a pass are copied before the next one."""

    def task_grads(
        self,
        step: Step,
        *,
        keep_heads: bool,
        walk_encoder: Callable[[Cut, list[list[Tensor | None]]], GradRows] | None = None,
    ) -> tuple[GradRows, HeadGrads | None]:
        """Computes the gradients of every task, from the losses to the features and on to the shared parameters.

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
        """Runs one pass from every loss to the features and the parameters of its head; touches no ``.grad``.

        Returns:
            Per task, gradients of the features it reached, and of its ``heads``.
        """
        roots, starts = step.roots, step.starts
        self.copies = step.copy_gradients
        if self.heads_are_apart and not self.copies:
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
                retain_graph=self.retain_graph or (self.heads_meet and task != present[-1]),
                keep_sparse=True,
            )
            grads = copied(grads) if self.copies else grads
            feature_grads[task] = grads[: len(reached)]
            head_grads[task] = grads[len(reached) :]
        raise_if_reused(dict(enumerate(feature_grads)), of="feature", starts=starts)
        raise_if_reused(dict(enumerate(head_grads)), of="the head's parameter", starts=starts)
        return feature_grads, head_grads

    def _walk_heads_at_once(
        self, roots: Sequence[Root | None], starts: Sequence[Tensor | None]
    ) -> tuple[list[list[Tensor | None]], list[list[Tensor | None]]]:
        """:meth:`walk_heads` in one pass from all losses: what a head hands to the features is read off on the way.

        T calls of the engine cost more than small heads do.
        """
        found: list[dict[int, Tensor]] = [{} for _ in roots]
        handles = [
            node.register_hook(_reading(self._edges_at(node, positions), found[task]))
            for task, entries in enumerate(self.entries)
            for node, positions in entries
        ]
        used = sorted({index for reached in self.reached for index in reached})
        heads = self.all_heads
        try:
            grads = torch.autograd.grad(
                [root for root in roots if root is not None],  # type: ignore[arg-type]
                [*(self.features[index] for index in used), *heads],
                [start for start in starts if start is not None],
                retain_graph=self.retain_graph,
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
        """Returns for each of these inputs of a node its position, and which feature it is."""
        edges = node.next_functions
        return [(position, self.edges[edges[position]]) for position in positions]  # type: ignore[index]

    def deposit_heads(self, head_grads: Sequence[Sequence[Tensor | None]]) -> None:
        """Adds every task's gradients of its head to ``.grad``, in one pass, so that hooks there run once."""
        totals: dict[int, Tensor] = {}
        for heads, grads in zip(self.heads, head_grads, strict=True):
            for leaf, grad in zip(heads, grads, strict=True):
                if grad is not None:
                    known = totals.get(id(leaf))
                    totals[id(leaf)] = grad if known is None else known + grad
        reached = [leaf for leaf in self.all_heads if id(leaf) in totals]
        deposit_grads(reached, [totals[id(leaf)] for leaf in reached])

    def encoder_root(
        self, task: int, feature_grads: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Finds where the encoder's pass of ``task`` starts, and with what."""
        pairs = [
            (self.features[index], grad)
            for index, grad in zip(self.reached[task], feature_grads, strict=True)
            if grad is not None
        ]
        return [feature for feature, _ in pairs], [grad for _, grad in pairs]

    def walk_encoder(
        self, feature_grads: Sequence[Sequence[Tensor | None]], stacker: Stacker | None = None
    ) -> GradRows:
        """Runs one pass of the encoder per present task, as ``per_task.backward_per_task``."""
        passes = [
            Pass(task, *self.encoder_root(task, feature_grads[task]))
            for task, reached in enumerate(self.reached)
            if reached
        ]
        return run_passes(
            passes,
            len(feature_grads),
            self.shared,
            retain_graph=self.retain_graph,
            copy=self.copies,
            stacker=stacker,
        )

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
        keep = retain_graph or self.retain_graph
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

    def walk_encoder_weighted(
        self, feature_grads: Sequence[Sequence[Tensor | None]], task_weights: Tensor
    ) -> None:
        """Runs one pass of the encoder from the weighted features' gradients; adds to the shared ``.grad``."""
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
        run_backward(
            [self.features[index] for index in used], starts, retain_graph=self.retain_graph
        )


def _reading(
    positions: Sequence[tuple[int, int]], found: dict[int, Tensor]
) -> Callable[[Sequence[Tensor | None], Sequence[Tensor | None]], None]:
    """Makes a node's hook that adds what it passes on at each position to ``found``, by feature."""

    def read(grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]) -> None:
        for position, feature in positions:
            grad = grad_inputs[position]
            if grad is not None:
                found[feature] = found[feature] + grad if feature in found else grad

    return read
