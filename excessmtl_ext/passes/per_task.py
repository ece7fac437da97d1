"""A backward pass per task: each pass's gradient is taken from ``.grad`` before the next pass begins.

``AccumulateGrad`` puts a gradient into ``.grad``; it is taken from there as it is, without a copy.
Parameters that are not shared (heads) receive their gradient from the same passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain, compress, repeat
from operator import attrgetter, is_not, methodcaller
from typing import NamedTuple

import torch
from torch import Tensor

from excessmtl_ext.passes.explain import raise_explained
from excessmtl_ext.passes.heads import HeadGraph
from excessmtl_ext.passes.reused_memory import BEFORE, copied, separated, storages_of
from excessmtl_ext.passes.stacked import Stacker
from excessmtl_ext.step import Root

_grad_of = attrgetter("grad")
_is_sparse = attrgetter("is_sparse")
_storage_of = methodcaller("untyped_storage")
_address_of = methodcaller("data_ptr")
_NO_GRAD: dict[torch.device, Tensor] = {}


def run_backward(
    roots: Sequence[Root],
    starts: Sequence[Tensor],
    *,
    retain_graph: bool,
    inputs: Sequence[Tensor] | None = None,
) -> None:
    """Runs one pass of the engine from all ``roots``; adds to ``.grad`` of every leaf, or of ``inputs`` only."""
    try:
        torch.autograd.backward(
            roots,  # type: ignore[arg-type]
            grad_tensors=starts,
            retain_graph=retain_graph,
            inputs=inputs,
        )
    except RuntimeError as error:
        raise_explained(error)
        raise


@contextmanager
def set_aside_grads(
    parameters: Sequence[Tensor], *, copy: bool = False
) -> Iterator[list[Tensor | None]]:
    """Empties ``.grad`` of ``parameters`` for the body and gives back what was there, also when the body raises.

    With ``copy``, copies of it: a pass may write where it lies.
    """
    saved = [parameter.grad for parameter in parameters]
    saved = copied(saved) if copy else saved
    for parameter in parameters:
        parameter.grad = None
    try:
        yield saved
    finally:
        for parameter, grad in zip(parameters, saved, strict=True):
            parameter.grad = grad


def _are_given(grads: Sequence[Tensor | None]) -> Iterator[bool]:
    return map(is_not, grads, repeat(None))


def take_grads(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Takes ``.grad`` away from ``parameters``.

    Runs T times a step, so what it does per parameter is left to the interpreter's built-ins.
    """
    grads = list(map(_grad_of, parameters))
    deque(map(setattr, parameters, repeat("grad"), repeat(None)), maxlen=0)
    return grads


def take_shared_grads(shared: Sequence[Tensor]) -> list[Tensor | None]:
    """:func:`take_grads` of the shared parameters.

    Raises:
        ValueError: one of the gradients is sparse.
    """
    grads = take_grads(shared)
    if any(map(_is_sparse, compress(grads, _are_given(grads)))):
        raise_sparse(grads)
    return grads


def raise_if_reused(
    rows: Mapping[int, Sequence[Tensor | None]],
    *,
    of: str = "shared parameter",
    starts: Sequence[Tensor | None] = (),
) -> dict[int, list[Tensor | None]]:
    """Raises where gradients that a step keeps lie where a later pass has put another task's.

    See :mod:`excessmtl_ext.passes.reused_memory`; this looks whether any storage serves two tasks.

    Args:
        rows: The gradients by task, in the order of the passes.
        of: What they are gradients of, for the message.
        starts: What the passes began with. Nobody writes it again, and an operation may hand it on as the gradient of
            several tasks, which are then right.

    Returns:
        By task, its gradients where some lie in ``starts`` beside another task's: those are copied. Empty as a rule.

    Raises:
        ValueError: gradients have been overwritten.
    """
    if torch.compiler.is_compiling():  # a compiler gives every value memory of its own
        return {}
    storages = list(map(_storages, rows.values()))
    if len(set().union(*storages)) == sum(map(len, storages)):
        return {}
    return separated(rows, of, starts)


def _storages(grads: Sequence[Tensor | None]) -> set[int]:
    """Collects the addresses of the gradients' storages: a loop over parameters, left to built-ins."""
    try:
        addresses = set(map(_address_of, map(_storage_of, compress(grads, _are_given(grads)))))
    except (RuntimeError, NotImplementedError):  # sparse, or a tensor whose elements lie elsewhere
        addresses = storages_of(grads)
    addresses.discard(0)
    return addresses


def raise_sparse(grads: Sequence[Tensor | None]) -> None:
    """Raises ValueError if one of the shared gradients is sparse: what weights are computed from is dense."""
    for index, grad in enumerate(grads):
        if grad is not None and grad.is_sparse:
            raise ValueError(
                f"Expected dense gradients of the shared parameters, but that of number {index}, of shape "
                f"{list(grad.shape)}, is sparse (as from Embedding(sparse=True)). Make it with sparse=False, or leave "
                "it out of the balancer's shared parameters: it then gets the plain sum of the tasks' gradients, "
                "which stays sparse."
            )


def dense(grads: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Makes sparse gradients dense."""
    return [grad.to_dense() if grad is not None and grad.is_sparse else grad for grad in grads]


def flattened(grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Replaces None by a tensor without elements, which is how the ops spell "no gradient"."""
    if all(_are_given(grads)):
        return list(grads)  # type: ignore[arg-type]
    first = next((grad for grad in grads if grad is not None), None)
    device = torch.device("cpu") if first is None else first.device
    none = _NO_GRAD.get(device)
    if none is None or (first is not None and type(first) is not Tensor):
        none = torch.empty(0, device=device)
        if type(none) is Tensor:  # not one of a mode that ends, such as FakeTensorMode
            _NO_GRAD[device] = none
    return [none if grad is None else grad for grad in grads]


def flat_rows(task_grads: Iterable[Sequence[Tensor | None]]) -> list[Tensor]:
    """Returns T rows of L gradients as the task-major list of T * L that the ops take."""
    return list(chain.from_iterable(map(flattened, task_grads)))


class HeadGrads:
    """Keeps the head gradients of each task apart while the passes run, to weight them when the weights are known.

    Args:
        parameters: Per task, the parameters of its head.
        grads: The gradients that are known already, by task.

    Attributes:
        all_parameters: Every head parameter once.
    """

    def __init__(
        self,
        parameters: Sequence[Sequence[Tensor]],
        grads: dict[int, list[Tensor | None]] | None = None,
    ) -> None:
        self.parameters = [list(leaves) for leaves in parameters]
        self.grads = {} if grads is None else grads
        self.all_parameters = list(
            {id(leaf): leaf for leaves in self.parameters for leaf in leaves}.values()
        )

    @classmethod
    def of(cls, roots: Sequence[Root | None], shared: Sequence[Tensor]) -> HeadGrads:
        """Keeps those of the parameters that each root reaches and that are not shared.

        Raises:
            ValueError: some of them cannot be told.
        """
        graph = HeadGraph(roots, shared)
        graph.raise_if_unseen("the gradients of heads are kept apart")
        return cls(graph.leaves)

    def take(self, task: int, *, copy: bool = False) -> None:
        """Takes the gradients that the pass of ``task`` has just left, or copies of them."""
        grads = take_grads(self.parameters[task])
        self.grads[task] = copied(grads) if copy else grads

    def check_memory(self) -> None:
        """Raises ValueError where a later pass has overwritten gradients of an earlier one."""
        self.grads.update(raise_if_reused(self.grads, of="the head's parameter"))

    def add(self, factors: Tensor) -> None:
        """Adds ``factors[task]`` times the gradients of every task to ``.grad``."""
        of_dtype = {factors.dtype: factors.unbind()}
        for task, grads in self.grads.items():
            for parameter, grad in zip(self.parameters[task], grads, strict=True):
                if grad is None:
                    continue
                if grad.dtype not in of_dtype:
                    of_dtype[grad.dtype] = factors.to(grad.dtype).unbind()
                scaled = grad * of_dtype[grad.dtype][task]
                parameter.grad = scaled if parameter.grad is None else parameter.grad.add_(scaled)


class GradRows(NamedTuple):
    """Gradients of some tasks, in the two forms that a step needs."""

    rows: list[list[Tensor | None]]
    """A row of L gradients per task; None where a task does not reach a parameter, and for an absent task."""
    tensors: list[Tensor]
    """The same, task-major, without None (see :func:`flattened`)."""


class Pass(NamedTuple):
    """One backward pass."""

    task: int
    roots: Sequence[Root]
    starts: Sequence[Tensor]


def backward_per_task(
    roots: Sequence[Root | None],
    starts: Sequence[Tensor | None],
    shared: Sequence[Tensor],
    *,
    heads: HeadGrads | None = None,
    retain_graph: bool = False,
    copy: bool = False,
    stacker: Stacker | None = None,
) -> GradRows:
    """Runs one backward pass per present task and takes the gradients of the shared parameters.

    ``.grad`` of the shared parameters is as before. Heads keep what the passes add to their
    ``.grad``, unless ``heads`` takes it.

    Args:
        roots: One per task, None where absent.
        starts: What each pass starts with.
        shared: The L shared parameters.
        heads: Takes the head gradients, whose ``.grad`` is then as before, too.
        retain_graph: Keep the graphs after the last pass, for another one.
        copy: Copy the gradients of each pass before the next one, which may write where they lie.
        stacker: Computes some weight gradients beside the passes (see :mod:`excessmtl_ext.passes.stacked`).

    Returns:
        T rows.

    Raises:
        ValueError: a loss does not depend on any shared parameter, or a pass has overwritten the gradients of another.
    """
    passes = [
        Pass(task, [root], [start])
        for task, (root, start) in enumerate(zip(roots, starts, strict=True))
        if root is not None and start is not None
    ]
    return run_passes(
        passes,
        len(roots),
        shared,
        heads=heads,
        retain_graph=retain_graph,
        copy=copy,
        stacker=stacker,
    )


def run_passes(
    passes: Sequence[Pass],
    num_tasks: int,
    shared: Sequence[Tensor],
    *,
    heads: HeadGrads | None = None,
    retain_graph: bool = False,
    copy: bool = False,
    stacker: Stacker | None = None,
) -> GradRows:
    """:func:`backward_per_task` for passes that start anywhere."""
    rows: list[list[Tensor | None]] = [[None] * len(shared) for _ in range(num_tasks)]
    aside = [*shared, *heads.all_parameters] if heads else shared
    layers = stacker and stacker([root for each in passes for root in each.roots], shared)
    with set_aside_grads(aside, copy=copy) as saved, layers or nullcontext():
        for each in passes:
            keep = retain_graph or each is not passes[-1]
            inputs = layers and layers.inputs
            run_backward(each.roots, each.starts, retain_graph=keep, inputs=inputs)
            row = take_shared_grads(shared)
            if layers is not None:
                layers.fill(row)
            check_reached(row, each.task)
            rows[each.task] = copied(row) if copy else row
            if heads is not None:
                heads.take(each.task, copy=copy)
        taken = {BEFORE: saved, **dict(enumerate(rows))}
        starts = [start for each in passes for start in each.starts]
        for task, row in raise_if_reused(taken, starts=starts).items():
            rows[task] = row
        if heads is not None:
            heads.check_memory()
    return GradRows(rows, flat_rows(rows))


def backward_of_task(
    task: int,
    root: Root,
    start: Tensor,
    shared: Sequence[Tensor],
    *,
    heads: HeadGrads | None = None,
    retain_graph: bool = False,
    copy: bool = False,
    stacker: Stacker | None = None,
) -> GradRows:
    """:func:`backward_per_task` for one task alone; returns its row only."""
    aside = [*shared, *heads.all_parameters] if heads else shared
    layers = stacker and stacker([root], shared)
    with set_aside_grads(aside, copy=copy) as saved, layers or nullcontext():
        inputs = layers and layers.inputs
        run_backward([root], [start], retain_graph=retain_graph, inputs=inputs)
        row = take_shared_grads(shared)
        if layers is not None:
            layers.fill(row)
        check_reached(row, task)
        raise_if_reused({BEFORE: saved, task: row})
        if heads is not None:
            heads.take(task, copy=copy)
    return GradRows([row], flattened(row))


def check_reached(grads: Sequence[Tensor | None], task: int) -> None:
    """Raises ValueError when a task's pass reached no shared parameter."""
    if not any(_are_given(grads)):
        raise ValueError(
            f"Expected `losses[{task}]` to depend on the shared parameters, but none received a gradient. Check "
            "that the loss is computed from the encoder's output and not from a detached copy, and that the parameters "
            "given to the balancer are the model's; pass None for a task that is absent from this batch."
        )


def add_scaled_grads(
    parameters: Sequence[Tensor], grads: Sequence[Tensor | None], factor: Tensor
) -> None:
    """Adds ``factor`` [] times ``grads`` to ``.grad``."""
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            # Not in place: two gradients may be views of one tensor (passes/targets.py).
            scaled = grad * factor.to(grad.dtype)
            parameter.grad = scaled if parameter.grad is None else parameter.grad.add_(scaled)


def uniform_backward(
    roots: Sequence[Root],
    starts: Sequence[Tensor],
    shared: Sequence[Tensor],
    weight: Tensor,
    *,
    retain_graph: bool = False,
) -> None:
    """Runs one pass of the unweighted losses and scales the shared gradients: heads get their own gradient."""
    with set_aside_grads(shared):
        run_backward(roots, starts, retain_graph=retain_graph)
        grads = take_grads(shared)
    add_scaled_grads(shared, grads, weight)


def weighted_starts(
    starts: Sequence[Tensor], tasks: Sequence[int], task_weights: Tensor
) -> list[Tensor]:
    """Multiplies the start of each task's pass by its weight."""
    dtypes = {start.dtype for start in starts}
    of_dtype = {dtype: task_weights.to(dtype).unbind() for dtype in dtypes}
    return [start * of_dtype[start.dtype][task] for task, start in zip(tasks, starts, strict=True)]
