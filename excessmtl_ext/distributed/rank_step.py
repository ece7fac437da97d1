"""One rank's side of a step: what was agreed before it, and its own backward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from excessmtl_ext.distributed.partition import Partition
from excessmtl_ext.passes.capture import capture_grads, leaves_of, nodes_of
from excessmtl_ext.passes.heads import check_open
from excessmtl_ext.passes.per_task import check_reached, dense, raise_if_reused, raise_sparse
from excessmtl_ext.passes.reused_memory import copied
from excessmtl_ext.passes.stacked import Stacker
from excessmtl_ext.step import FisherRule, Root, Step


@dataclass(frozen=True)
class Agreement:
    """What the ranks know of each other before a step.

    Attributes:
        tasks: Tasks that some rank has.
        shares: [T]: W times this rank's part of the samples of each task; 0 where it has none. The mean over the
            ranks of share times gradient is the gradient of the joined batch.
        averages_shared: Whether a step with ``reduce="grads"`` hands out averaged shared gradients; else
            DistributedDataParallel averages them.
    """

    tasks: list[int]
    shares: list[float]
    averages_shared: bool


@dataclass
class RankStep:
    """What a step starts from on this rank, and what its passes leave.

    Attributes:
        rule: Whose step it is.
        given: The step as it was read on this rank.
        agreed: With the other ranks.
        heads: Every parameter the passes can reach that is not shared.
        stacker: Computes some weight gradients beside the passes, or None.
        head_grads: Their gradients, per task.
        reached: Ids of the parameters that have a gradient.
        error: What ended a pass; the later ones are not run.
    """

    rule: FisherRule
    given: Step
    agreed: Agreement
    heads: list[Tensor]
    stacker: Stacker | None = None
    head_grads: dict[int, list[Tensor | None]] = field(default_factory=dict)
    reached: set[int] = field(default_factory=set)
    error: BaseException | None = None


def other_leaves(parallel: Partition, roots: Sequence[Root | None]) -> list[Tensor]:
    """Returns every parameter that the passes of this rank can reach and that is not shared."""
    ids = {id(parameter) for parameter in parallel.shared}
    leaves = leaves_of(*(root for root in roots if root is not None))
    return [leaf for key, leaf in leaves.items() if key not in ids]


def run_pass(parallel: Partition, step: RankStep, task: int) -> list[Tensor | None] | None:
    """Returns the shared gradients of one task; None where it weighs nothing, or after an error, which is kept."""
    root, start = step.given.roots[task], step.given.starts[task]
    shares = step.agreed.shares
    if root is None or start is None or shares[task] == 0.0 or step.error is not None:
        return None
    last = max(index for index, share in enumerate(shares) if share > 0.0)
    targets = [*parallel.shared, *step.heads]
    try:
        check_open(nodes_of([root]), "several ranks take the gradients of every pass by themselves")
        with step.stacker([root], parallel.shared) if step.stacker else nullcontext() as layers:
            beside = layers.left_out if layers else frozenset()
            asked = [target for target in targets if id(target) not in beside]
            keep = step.given.retain_graph or task != last
            taken = iter(capture_grads(root, start, asked, retain_graph=keep, keep_sparse=True))
            grads = [None if id(target) in beside else next(taken) for target in targets]
            if layers is not None:
                layers.fill(grads)
        shared_grads = grads[: len(parallel.shared)]
        raise_sparse(shared_grads)
        check_reached(shared_grads, task)
    except BaseException as error:  # Ctrl-C too
        step.error = error  # the other ranks wait in a collective: they are told after the passes
        return None
    if step.given.copy_gradients:
        grads = copied(grads)
        shared_grads = grads[: len(parallel.shared)]
    step.head_grads[task] = dense(grads[len(parallel.shared) :])
    reached = zip(targets, grads, strict=True)
    step.reached.update(id(target) for target, grad in reached if grad is not None)
    return shared_grads


def check_memory(
    step: RankStep, rows: Mapping[int, Sequence[Tensor | None]], of: str = "shared parameter"
) -> None:
    """Keeps an error, for the exchange after the passes, where one has overwritten the gradients of another."""
    try:
        raise_if_reused(rows, of=of)
    except ValueError as error:
        step.error = step.error or error
