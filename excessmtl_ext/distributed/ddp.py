"""What DistributedDataParallel leaves in a graph, and how its reducer is kept from running too early."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn.parallel import DistributedDataParallel

from excessmtl_ext import gradients
from excessmtl_ext.distributed.partition import Partition
from excessmtl_ext.gradients import Root


def _ddp_sinks(roots: Sequence[Root | None]) -> list[tuple[Any, DistributedDataParallel]]:
    """The graph nodes that DistributedDataParallel puts at its outputs, and the module of each.

    It does so with find_unused_parameters, and with static_graph in the first iteration.
    """
    found = []
    for node in gradients.nodes_of([root for root in roots if root is not None]):
        reference = getattr(node, "ddp_weakref", None)
        ddp = None if reference is None else reference()
        if ddp is not None:
            found.append((node, ddp))
    return found


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
        if ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued
    ]

    def release() -> None:
        for ddp in waiting:
            torch.autograd.Variable._execution_engine.queue_callback(  # type: ignore[attr-defined]
                ddp.reducer._delay_all_reduce  # type: ignore[attr-defined]
            )

    for ddp in waiting:
        ddp._static_graph_delay_allreduce_enqueued = True
    try:
        yield release
    except BaseException:
        for ddp in waiting:
            ddp._static_graph_delay_allreduce_enqueued = False
        raise


def expected_by_ddp(parallel: Partition, roots: Sequence[Root | None]) -> list[Tensor]:
    """What the reducer waits for: every trainable parameter, or with unused ones what the outputs depend on."""
    sinks = _ddp_sinks(roots)
    if sinks:
        edges = [GradientEdge(node, 0) for node, _ in sinks]
        return list(gradients.leaves_of(*edges).values())
    if parallel.ddp is None or parallel.ddp.find_unused_parameters:
        return []
    ignored = parallel.ddp.parameters_to_ignore
    return [
        parameter
        for name, parameter in parallel.ddp.module.named_parameters()
        if parameter.requires_grad and name not in ignored
    ]
