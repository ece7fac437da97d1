"""DistributedDataParallel: what it leaves in a graph, when its reducer runs, and what it need not reduce again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from excessmtl_ext.passes.capture import leaves_of, nodes_of
from excessmtl_ext.step import Root


def _ddp_sinks(roots: Sequence[Root | None]) -> list[tuple[Any, DistributedDataParallel]]:
    """Returns the graph nodes that DistributedDataParallel puts at its outputs, and the module of each.

    It does so with find_unused_parameters, and with static_graph in the first iteration.
    """
    found = []
    for node in nodes_of([root for root in roots if root is not None]):
        reference = getattr(node, "ddp_weakref", None)
        ddp = None if reference is None else reference()
        if ddp is not None:
            found.append((node, ddp))
    return found


class AveragedGrads:
    """State of a communication hook: the parameters whose gradients every rank has averaged already.

    The hook is DistributedDataParallel's own place to say how a bucket is averaged. Buckets mix
    shared parameters and heads; of one with both, the heads travel.

    Attributes:
        group: The ranks of the module.
        ids: Of parameters; empty except while such gradients are added, so that any other backward
            pass of the module is averaged as without the hook.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ids: frozenset[int] = frozenset()

    @contextmanager
    def known(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Leaves the gradients of ``parameters`` as they come, in the body."""
        self.ids = frozenset(map(id, parameters))
        try:
            yield
        finally:
            self.ids = frozenset()


def register_averaged_grads(ddp: DistributedDataParallel) -> AveragedGrads | None:
    """Hooks an :class:`AveragedGrads` into ``ddp``, or finds the one there; None where another hook is in charge."""
    for hook, state in ddp._comm_hooks:  # pyright: ignore[reportPrivateUsage]
        return state if hook is _average_the_rest else None  # type: ignore[return-value]
    if ddp.mixed_precision is not None:
        return None
    assert ddp.process_group is not None
    state = AveragedGrads(ddp.process_group)
    ddp.register_comm_hook(state, _average_the_rest)
    return state


# Without annotations: torch compares them with types, and in this file they are strings.
def _average_the_rest(state, bucket):  # pyright: ignore[reportMissingParameterType, reportUnknownParameterType]
    """Averages a bucket's gradients over the ranks, but of those that ``state`` knows to be averaged."""
    buffer = bucket.buffer()
    rest = [
        grad
        for parameter, grad in zip(bucket.parameters(), bucket.gradients(), strict=True)
        if id(parameter) not in state.ids
    ]
    if len(rest) == len(bucket.gradients()):
        return allreduce_hook(state.group, bucket)
    if not rest:
        done = torch.futures.Future()
        done.set_result(buffer)
        return done
    flat = torch.cat([grad.reshape(-1) for grad in rest]).div_(state.group.size())
    work = dist.all_reduce(flat, group=state.group, async_op=True)

    def put(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        pieces = future.value()[0].split([grad.numel() for grad in rest])
        for grad, piece in zip(rest, pieces, strict=True):
            grad.copy_(piece.view_as(grad))
        return buffer

    return work.get_future().then(put)


@contextmanager
def static_graph_held(roots: Sequence[Root | None]) -> Iterator[Any]:
    """Keeps the first backward pass of a static graph from being taken for the whole iteration.

    There the reducer is to run at the end of the pass that first comes through the outputs. The
    body's passes go unnoticed; what is yielded lets the reducer run at the end of the pass in
    which it is called.
    """
    waiting = [
        ddp
        for _, ddp in _ddp_sinks(roots)
        if ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued  # pyright: ignore[reportPrivateUsage]
    ]

    def release() -> None:
        for ddp in waiting:
            torch.autograd.Variable._execution_engine.queue_callback(  # type: ignore[attr-defined]
                ddp.reducer._delay_all_reduce  # type: ignore[attr-defined]
            )

    for ddp in waiting:
        ddp._static_graph_delay_allreduce_enqueued = True  # pyright: ignore[reportPrivateUsage]
    try:
        yield release
    except BaseException:
        for ddp in waiting:
            ddp._static_graph_delay_allreduce_enqueued = False  # pyright: ignore[reportPrivateUsage]
        raise


def expected_by_ddp(
    ddp: DistributedDataParallel | None, roots: Sequence[Root | None]
) -> list[Tensor]:
    """Returns what the reducer waits for: every trainable parameter, or with unused ones what the outputs depend on."""
    sinks = _ddp_sinks(roots)
    if sinks:
        edges = [GradientEdge(node, 0) for node, _ in sinks]
        return list(leaves_of(*edges).values())
    if ddp is None or ddp.find_unused_parameters:
        return []
    ignored = ddp.parameters_to_ignore
    return [
        parameter
        for name, parameter in ddp.module.named_parameters()
        if parameter.requires_grad and name not in ignored
    ]
