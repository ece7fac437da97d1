"""Task losses to task gradients of the shared parameters: the only room that calls autograd.

A step runs one backward pass per task and nothing else. ``AccumulateGrad`` puts each pass's
gradient into ``.grad``; it is taken from there as it is, without a copy, before the next pass
begins. Parameters that are not shared (heads) receive their gradient from the same passes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, compress, repeat
from operator import attrgetter, is_not
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

Losses: TypeAlias = Tensor | Sequence[Tensor | None]
"""T scalar losses: a list (None where a task has no labels in this batch), or one tensor [T]."""

Root: TypeAlias = Tensor | GradientEdge
"""Where the backward pass of one task starts."""

LEAST_DIVISIBLE_WEIGHT = 1e-12
"""Weights below this count as this in a single weighted pass, where head gradients are divided by the weight again."""


def loss_roots(losses: Losses, num_tasks: int) -> list[Root | None]:
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
                "Expected `losses` to require grad, but got a tensor without a graph. "
                "Compute it outside torch.no_grad() and do not detach it."
            )
        return _stacked_roots(losses)
    if not isinstance(losses, (list, tuple)):
        raise TypeError(
            f"Expected `losses` to be a tensor [T] or a list of scalars, but got {type(losses).__name__}."
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
            f"Expected `{name}` to require grad, but got a tensor without a graph. Compute it outside torch.no_grad() "
            "and do not detach it; pass None for a task that has no labels in this batch."
        )


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


def loss_values(losses: Losses, like: Tensor) -> Tensor:
    """The losses as a detached tensor [T] of the dtype and device of ``like``; NaN for an absent task."""
    if isinstance(losses, Tensor):
        return losses.detach().to(like)
    missing = torch.full((), float("nan"), dtype=like.dtype, device=like.device)
    return torch.stack(
        [missing if loss is None else loss.detach().reshape(()).to(like) for loss in losses]
    )


def _device_of(root: Root) -> torch.device:
    if isinstance(root, Tensor):
        return root.device
    return root.node._input_metadata[root.output_nr].device  # type: ignore[attr-defined]


def check_device(roots: Iterable[Root | None], device: torch.device) -> None:
    """Raises ValueError when a loss lies on another device than the shared parameters."""
    for task, root in enumerate(roots):
        if root is not None and _device_of(root) != device:
            raise ValueError(
                f"Expected `losses[{task}]` on {device}, where the shared parameters are, but got {_device_of(root)}. "
                "Move the model or the loss."
            )


def start_of(root: Root, scale: Tensor | None) -> Tensor:
    """The gradient a pass starts with: ones, or the scale, in the shape and dtype of the loss."""
    if isinstance(root, Tensor):
        one = torch.ones_like(root)
    else:
        metadata = root.node._input_metadata[root.output_nr]  # type: ignore[attr-defined]
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
            root if isinstance(root, Tensor) else root.node._input_metadata[root.output_nr]  # type: ignore[attr-defined]
        )
        kind = (tuple(metadata.shape), metadata.dtype, metadata.device)
        if kind not in known:
            known[kind] = start_of(root, scale)
        starts.append(known[kind])
    return starts


def run_backward(roots: Sequence[Root], starts: Sequence[Tensor], *, retain_graph: bool) -> None:
    """One pass of the autograd engine from all ``roots``; adds to ``.grad`` of every leaf."""
    torch.autograd.backward(roots, grad_tensors=starts, retain_graph=retain_graph)  # type: ignore[arg-type]


@contextmanager
def set_aside_grads(parameters: Sequence[Tensor]) -> Iterator[list[Tensor | None]]:
    """Empties ``.grad`` of ``parameters`` for the body and gives back what was there, also when the body raises."""
    saved = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield saved
    finally:
        for parameter, grad in zip(parameters, saved, strict=True):
            parameter.grad = grad


_grad_of = attrgetter("grad")
_is_sparse = attrgetter("is_sparse")


def _are_given(grads: Sequence[Tensor | None]) -> Iterator[bool]:
    return map(is_not, grads, repeat(None))


def take_grads(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Takes ``.grad`` away from ``parameters``; sparse gradients become dense.

    Runs T times a step, so what it does per parameter is left to the interpreter's built-ins.
    """
    grads = list(map(_grad_of, parameters))
    deque(map(setattr, parameters, repeat("grad"), repeat(None)), maxlen=0)
    if any(map(_is_sparse, compress(grads, _are_given(grads)))):
        return _dense(grads)
    return grads


def _dense(grads: Iterable[Tensor | None]) -> list[Tensor | None]:
    return [grad.to_dense() if grad is not None and grad.is_sparse else grad for grad in grads]


_NO_GRAD: dict[torch.device, Tensor] = {}


def flattened(grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Replaces None by a tensor without elements, which is how the ops spell "no gradient"."""
    if all(_are_given(grads)):
        return list(grads)  # type: ignore[arg-type]
    device = next((grad.device for grad in grads if grad is not None), torch.device("cpu"))
    if device not in _NO_GRAD:
        _NO_GRAD[device] = torch.empty(0, device=device)
    return [_NO_GRAD[device] if grad is None else grad for grad in grads]


def flat_rows(task_grads: Iterable[Sequence[Tensor | None]]) -> list[Tensor]:
    """T rows of L gradients as the task-major list of T * L that the ops take."""
    return list(chain.from_iterable(map(flattened, task_grads)))


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
    """Every parameter that a pass from ``roots`` reaches, by id."""
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
    """One pass that returns the gradients of ``parameters`` and touches no ``.grad``; sparse ones become dense.

    Nothing that waits for a gradient to be accumulated is told: DistributedDataParallel sees one
    pass per step, that of :func:`deposit_grads`.
    """
    grads = capture_joint([root], [start], parameters, retain_graph=retain_graph)
    return grads if keep_sparse else _dense(grads)


def capture_joint(
    roots: Sequence[Root],
    starts: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    retain_graph: bool,
) -> list[Tensor | None]:
    """Like :func:`capture_grads` from several roots at once: gradients of their sum; sparse ones stay sparse."""
    grads = torch.autograd.grad(
        list(roots),  # type: ignore[arg-type]
        list(parameters),
        list(starts),
        retain_graph=retain_graph,
        allow_unused=True,
    )
    return list(grads)


def capture_batched(
    roots: Sequence[Tensor],
    starts: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    retain_graph: bool,
) -> list[list[Tensor | None]]:
    """K passes in one, vectorised: like :func:`capture_grads` from ``roots`` with ``starts[:, k]``, for every k.

    Args:
        roots: M tensors.
        starts: M tensors [K, ...], of the shapes of ``roots`` behind K.
        parameters: L leaves.
        retain_graph: Keep the graph for another pass.

    Returns:
        K rows of L gradients, views of L tensors [K, ...].

    Raises:
        RuntimeError: some layer cannot be batched; the graph is whole only with ``retain_graph``.
    """
    stacked = torch.autograd.grad(
        list(roots),
        list(parameters),
        list(starts),
        retain_graph=retain_graph,
        allow_unused=True,
        is_grads_batched=True,
    )
    num_passes = starts[0].shape[0]
    columns = [[None] * num_passes if grads is None else grads.unbind() for grads in stacked]
    return list(map(list, zip(*columns, strict=True)))


def deposit_grads(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    *,
    at_start: Callable[[], None] | None = None,
) -> None:
    """One pass of the autograd engine that adds ``grads`` to ``.grad`` and runs whatever is hooked there.

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


class HeadGrads:
    """Keeps the head gradients of each task apart while the passes run, to weight them when the weights are known.

    Args:
        parameters: Per task, the parameters of its head, as from :func:`head_leaves`.
    """

    def __init__(self, parameters: Sequence[Sequence[Tensor]]) -> None:
        self.parameters = [list(leaves) for leaves in parameters]
        self.grads: dict[int, list[Tensor | None]] = {}

    def all_parameters(self) -> list[Tensor]:
        """Every head parameter once."""
        return list({id(leaf): leaf for leaves in self.parameters for leaf in leaves}.values())

    def reached_by_several(self) -> bool:
        """Whether some parameter outside the shared ones serves more than one task."""
        return len(self.all_parameters()) < sum(len(leaves) for leaves in self.parameters)

    def take(self, task: int) -> None:
        """Takes the gradients that the pass of ``task`` has just left."""
        self.grads[task] = take_grads(self.parameters[task])

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


def backward_per_task(
    roots: Sequence[Root | None],
    shared: Sequence[Tensor],
    *,
    scale: Tensor | None,
    on_task: Callable[[int], None] | None = None,
    retain_graph: bool = False,
) -> list[list[Tensor | None]]:
    """Runs one backward pass per present task and takes the gradients of the shared parameters.

    To be called with ``.grad`` of the shared parameters set aside. Heads keep what the passes add
    to their ``.grad``.

    Args:
        roots: One per task, None where absent.
        shared: The L shared parameters.
        scale: Factor of every loss (a loss scale), or None.
        on_task: Called after each task's pass.
        retain_graph: Keep the graphs after the last pass, for another one.

    Returns:
        T lists of L gradients; None where a task does not reach a parameter, and for an absent
        task.

    Raises:
        ValueError: a loss does not depend on any shared parameter.
    """
    present = [task for task, root in enumerate(roots) if root is not None]
    task_grads: list[list[Tensor | None]] = [[None] * len(shared) for _ in roots]
    starts = starts_of(roots, scale)
    for task in present:
        root, start = roots[task], starts[task]
        assert root is not None
        assert start is not None
        run_backward([root], [start], retain_graph=retain_graph or task != present[-1])
        task_grads[task] = take_grads(shared)
        check_reached(task_grads[task], task)
        if on_task is not None:
            on_task(task)
    return task_grads


def check_reached(grads: Sequence[Tensor | None], task: int) -> None:
    """Raises ValueError when a task's pass reached no shared parameter."""
    if not any(_are_given(grads)):
        raise ValueError(
            f"Expected `losses[{task}]` to depend on the shared parameters, but none received a gradient. Check "
            "that the loss is computed from the encoder's output and not from a detached copy, and that the parameters "
            "given to the balancer are the model's; pass None for a task that is absent from this batch."
        )


def weighted_backward(
    roots: Sequence[Root | None],
    shared: Sequence[Tensor],
    task_weights: Tensor,
    *,
    scale: Tensor | None,
    weighted_heads: bool,
    is_uniform: bool,
) -> None:
    """One pass for given weights: shared ``.grad`` gets sum_i a_i g_i, heads their own gradient (or a_i times it).

    Args:
        roots: One per task, None where absent.
        shared: The shared parameters; the result is added to their ``.grad``.
        task_weights: [T] weights.
        scale: Factor of every loss, or None.
        weighted_heads: Whether head gradients carry the task's weight too.
        is_uniform: Whether all weights are known to be equal.
    """
    tasks = [task for task, root in enumerate(roots) if root is not None]
    present = [root for root in roots if root is not None]
    if not present:
        return
    starts = [start for start in starts_of(roots, scale) if start is not None]
    if weighted_heads:
        run_backward(present, _weighted(starts, tasks, task_weights), retain_graph=False)
        return
    if is_uniform:
        # The losses unweighted, then the shared gradients scaled: heads are right as they come.
        with set_aside_grads(shared) as saved:
            run_backward(present, starts, retain_graph=False)
            grads = take_grads(shared)
        weight = task_weights[0]
        add_grads(
            shared,
            saved,
            # Not in place: two gradients may be views of one tensor, see _storage_of().
            [None if grad is None else grad * weight.to(grad.dtype) for grad in grads],
        )
        return
    heads = HeadGrads(head_leaves(roots, shared))
    if heads.reached_by_several():
        # Such a parameter is owed the plain sum over its tasks, which no single weighted pass
        # gives.
        with set_aside_grads(shared) as saved:
            task_grads = backward_per_task(roots, shared, scale=scale)
        for index, parameter in enumerate(shared):
            total = saved[index]
            for task in tasks:
                grad = task_grads[task][index]
                if grad is not None:
                    scaled = grad * task_weights[task].to(grad.dtype)
                    total = scaled if total is None else total.add_(scaled)
            parameter.grad = total
        return
    divisible = task_weights.clamp(min=LEAST_DIVISIBLE_WEIGHT)
    with set_aside_grads(heads.all_parameters()):
        run_backward(present, _weighted(starts, tasks, divisible), retain_graph=False)
        for task in tasks:
            heads.take(task)
    heads.add(divisible.reciprocal())


def _weighted(starts: Sequence[Tensor], tasks: Sequence[int], task_weights: Tensor) -> list[Tensor]:
    dtypes = {start.dtype for start in starts}
    of_dtype = {dtype: task_weights.to(dtype).unbind() for dtype in dtypes}
    return [start * of_dtype[start.dtype][task] for task, start in zip(tasks, starts, strict=True)]


def add_grads(
    parameters: Sequence[Tensor], saved: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> None:
    """Leaves ``saved + grads`` in ``.grad``, as autograd would have."""
    for parameter, old, grad in zip(parameters, saved, grads, strict=True):
        if grad is not None:
            parameter.grad = grad if old is None else old.add_(grad)


def combine_targets(
    shared: Sequence[Tensor], task_grads: Sequence[Sequence[Tensor | None]]
) -> tuple[list[Tensor], bool]:
    """Where the weighted sum goes: into ``.grad`` where one is, else into a gradient that is no longer needed.

    ``task_grads``: a row of L gradients per task, whose memory may be written; None where the task
    did not reach the parameter.
    """
    if not any(_are_given(list(map(_grad_of, shared)))) and _may_be_written(task_grads[0]):
        return list(task_grads[0]), False  # type: ignore[arg-type]
    tasks = [
        next((task for task, grads in enumerate(task_grads) if grads[index] is not None), None)
        for index in range(len(shared))
    ]
    used_tasks = {task for task in tasks if task is not None}
    accumulate = any(
        parameter.grad is not None
        for parameter, task in zip(shared, tasks, strict=True)
        if task is not None
    )
    uses = {task: Counter(map(_storage_of, task_grads[task])) for task in used_tasks}
    outputs: list[Tensor] = []
    for index, (parameter, task) in enumerate(zip(shared, tasks, strict=True)):
        if task is None:
            outputs.append(torch.empty(0, dtype=parameter.dtype, device=parameter.device))
        elif parameter.grad is not None:
            outputs.append(parameter.grad.contiguous())
        elif accumulate:
            outputs.append(torch.zeros_like(parameter, memory_format=torch.contiguous_format))
        else:
            grad = task_grads[task][index]
            assert grad is not None
            is_alone = uses[task][_storage_of(grad)] == 1
            outputs.append(
                grad
                if is_alone and grad.is_contiguous() and fills_its_storage(grad)
                else torch.empty_like(grad, memory_format=torch.contiguous_format)
            )
    return outputs, accumulate


def _may_be_written(grads: Sequence[Tensor | None]) -> bool:
    """Whether all gradients of a task are there, each contiguous and alone in its storage."""
    if not all(_are_given(grads)):
        return False
    given: list[Tensor] = list(grads)  # type: ignore[arg-type]
    return (
        len(set(map(_storage_of, given))) == len(given)
        and all(map(Tensor.is_contiguous, given))
        and all(map(fills_its_storage, given))
    )


def _storage_of(grad: Tensor | None) -> int:
    """Where a gradient's storage begins.

    Parameters may share one: for ``a.view(-1) + b.view(-1)`` autograd makes both ``.grad`` views of
    one tensor, and a sum written for a would change what is read for b.
    """
    return 0 if grad is None else grad.untyped_storage().data_ptr()


def fills_its_storage(grad: Tensor) -> bool:
    """False for a row of all tasks' gradients: as ``.grad`` it would keep those of all tasks alive."""
    return grad.untyped_storage().nbytes() <= grad.numel() * grad.element_size()


def assign_grads(shared: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Makes the written targets of :func:`combine_targets` the ``.grad`` of their parameters."""
    for parameter, output in zip(shared, outputs, strict=True):
        if output.shape != parameter.shape:
            if output.numel() == 0:
                continue  # no task reached it
            output = output.view_as(parameter)
        grad = parameter.grad
        if grad is None:
            parameter.grad = output
        elif grad.data_ptr() != output.data_ptr():
            grad.copy_(output)
