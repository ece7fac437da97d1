"""What is reduced across ranks, and when: one balanced step of several processes.

``reduce="grads"`` computes what one process would on the joined batch. Every task's gradient is
averaged before it is squared: a reduce-scatter hands each of the W ranks its P / W coordinates of
the mean, S and the momentum exist only for those, T partial risks are summed in float64, each rank
combines its own coordinates, and an all-gather hands out the result. A rank sends
(W - 1) / W * (T + 1) * P elements and some hundred bytes, holds 1 / W of the state, and every rank
ends with the same bits.

``reduce="risks"`` keeps the whole state of the rank's own gradients and averages T risks: E of a
small batch's gradient, averaged, is not E of the average (its noise part is W times larger).

``fully_shard`` parameters (DTensor) arrive averaged and sharded from the backward pass: the state
lies as they do, and T risks are all that is left to sum.

Two small exchanges frame a step, on the CPU where the group has a backend for it: before, whether
every rank is ready, and how many samples each has of each task; after the passes, whether any has
failed, and which parameters were reached. So an error on one rank is an error on all, and absent
tasks and uneven batches are weighted as in the joined batch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.parallel import DistributedDataParallel

from excessmtl_ext import functional, gradients
from excessmtl_ext.functional import ParamLayout
from excessmtl_ext.gradients import Root

if TYPE_CHECKING:
    from excessmtl_ext.excess_mtl import ExcessMTL

Reduce = Literal["grads", "risks"]
NumSamples: TypeAlias = float | Sequence[float]
"""Samples behind each loss of this rank: one number, or T."""

SHARDED_NAMES = ("sq_grad_sum", "grad_mean")
"""State of T * P elements, of which a rank may hold a part."""

# all_gather_into_tensor and reduce_scatter_tensor were renamed in torch 2.14.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Ranks:
    """The collectives of a step, and the bytes they send.

    Args:
        group: An initialised process group.

    Attributes:
        rank: Number of this process in the group.
        size: W.
        num_bytes_sent: What this rank has sent, by the ring algorithms of NCCL and gloo.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.num_bytes_sent = 0
        self._backends = dict(
            entry.split(":") for entry in dist.get_backend_config(group).split(",")
        )

    def exchange_device(self, device: torch.device) -> torch.device:
        """Where the small exchanges run: the CPU if the group can, so that nothing waits for ``device``."""
        return torch.device("cpu") if "cpu" in self._backends else device

    def _count(self, num_elements: float, tensor: Tensor) -> None:
        self.num_bytes_sent += int(num_elements * tensor.element_size())

    def reduce_scatter(self, full: Tensor) -> _PendingShard:
        """Starts to sum ``full`` [W * n] over the ranks; each gets its n elements."""
        num_own = full.numel() // self.size
        self._count((self.size - 1) * num_own, full)
        if self._backends.get(full.device.type) == "gloo":
            # gloo's reduce_scatter is an all-reduce inside and sends twice as much. An all-to-all sends
            # (W - 1) / W of the tensor, and the sum is taken here, in the order of the ranks.
            received = torch.empty_like(full)
            work = dist.all_to_all_single(received, full, group=self.group, async_op=True)
            return _PendingShard(received.view(self.size, num_own), work, full)
        own = full.new_empty(num_own)
        work = _reduce_scatter(own, full, group=self.group, async_op=True)
        return _PendingShard(own.view(1, num_own), work, full)

    def all_gather(self, own: Tensor) -> Tensor:
        """The ranks' tensors [n], joined to [W * n]."""
        full = own.new_empty(self.size * own.numel())
        self._count((self.size - 1) * own.numel(), own)
        _all_gather(full, own, group=self.group)
        return full

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        """Reduces in place; every rank gets the same bits."""
        self._count(2 * (self.size - 1) / self.size * tensor.numel(), tensor)
        dist.all_reduce(tensor, op=op, group=self.group)


class _PendingShard:
    """A reduce-scatter under way; keeps alive what it reads."""

    def __init__(self, parts: Tensor, work: Any, source: Tensor) -> None:
        self._parts, self._work, self._source = parts, work, source
        self._sum: Tensor | None = None

    def wait(self) -> Tensor:
        """The own part of the sum, [n]."""
        if self._sum is None:
            self._work.wait()
            self._sum = self._parts[0]
            for part in self._parts[1:]:
                self._sum += part
            del self._parts, self._work, self._source
        return self._sum


@dataclass(frozen=True)
class _Agreement:
    """What the ranks know of each other before a step.

    Attributes:
        tasks: Tasks that some rank has.
        shares: [T]: W times this rank's part of the samples of each task; 0 where it has none. The mean over the
            ranks of share times gradient is the gradient of the joined batch.
    """

    tasks: list[int]
    shares: list[float]


@dataclass
class _Passes:
    """What one rank's own backward passes leave."""

    heads: list[Tensor]  # every parameter reached that is not shared
    head_grads: dict[int, list[Tensor | None]] = field(default_factory=dict)  # per task
    reached: set[int] = field(default_factory=set)  # ids of parameters with a gradient
    error: Exception | None = None


class DataParallel:
    """The data-parallel half of an :class:`excessmtl_ext.ExcessMTL`: who has which part, and what is sent when.

    Args:
        shared_parameters: The balancer's.
        num_tasks: T.
        process_group: The ranks; None for those of ``model`` or of the DTensor parameters.
        reduce: ``"grads"``: exact. ``"risks"``: the cheap approximation.
        model: The whole model, so that heads are known on ranks where their task is absent. A
            DistributedDataParallel averages all gradients itself; those of a plain module are
            averaged here. None: gradients of heads are left as the rank computed them.

    Raises:
        ValueError: there is no process group, no parameter, or the parameters are sharded in more
            than one dimension.
    """

    def __init__(
        self,
        shared_parameters: Sequence[Tensor] | None,
        *,
        num_tasks: int,
        process_group: dist.ProcessGroup | None,
        reduce: Reduce,
        model: nn.Module | None,
    ) -> None:
        if not shared_parameters:
            raise ValueError(
                "Expected `shared_parameters` with `process_group`: each rank's part of the state is cut from them. "
                "Give the balancer model.encoder.parameters()."
            )
        self.shared = list(shared_parameters)
        self.num_tasks = num_tasks
        self.reduce: Reduce = reduce
        self.ddp = model if isinstance(model, DistributedDataParallel) else None
        self.is_sharded = any(_is_dtensor(parameter) for parameter in self.shared)
        self.mesh = _common_mesh(self.shared) if self.is_sharded else None
        if process_group is None and self.ddp is not None:
            process_group = self.ddp.process_group
        if process_group is None and self.mesh is not None:
            process_group = self.mesh.get_group()
        if process_group is None:
            raise ValueError(
                "Expected `process_group`, or a `model` that has one, but got neither. Call "
                "torch.distributed.init_process_group() and pass torch.distributed.group.WORLD."
            )
        if self.is_sharded and reduce == "risks":
            raise ValueError(
                "Expected reduce='grads' with fully_shard parameters, but got 'risks': their gradients arrive "
                "averaged, so the exact risks cost no more."
            )
        self.ranks = Ranks(process_group)
        ids = {id(parameter) for parameter in self.shared}
        self.heads: list[Tensor] | None = None
        if model is not None:
            self.heads = [
                parameter
                for parameter in model.parameters()
                if parameter.requires_grad and id(parameter) not in ids
            ]
        self.layout = ParamLayout([parameter.numel() for parameter in self.shared])
        num_params = self.layout.num_params
        self.shard_numel = -(-num_params // self.ranks.size)
        if self.is_sharded:
            self.state_layout = ParamLayout([_local(p).numel() for p in self.shared])
        elif reduce == "grads":
            self.state_layout = ParamLayout([self.shard_numel])
        else:
            self.state_layout = self.layout
        dtypes = {parameter.dtype for parameter in self.shared}
        # Sums over ranks are taken in float32 at least: 16 bits would round them, and float16 overflow.
        self.wire_dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.grad_dtype = dtypes.pop() if len(dtypes) == 1 else self.wire_dtype
        self.device = self.shared[0].device

    # ---- agreeing

    @contextmanager
    def reporting(self, balancer: ExcessMTL) -> Iterator[None]:
        """An error in the body is raised here and, at their next step, on the ranks that wait for this one."""
        try:
            yield
        except Exception as error:
            self._agree(balancer, [], None, error)
            raise

    def _agree(
        self,
        balancer: ExcessMTL,
        present: Sequence[bool],
        num_samples: NumSamples | None,
        error: Exception | None = None,
    ) -> _Agreement:
        """First exchange of a step: readiness and samples per task. Raises on every rank if it raises on one."""
        counts = [0.0] * self.num_tasks
        if error is None:
            try:
                counts = self._counts(present, num_samples)
            except (TypeError, ValueError) as caught:
                error = caught
        signature = zlib.crc32(repr((balancer, self.layout, self.reduce)).encode())
        numbers = [float(error is not None), float(balancer._num_calls), float(signature), *counts]
        device = self.ranks.exchange_device(self.device)
        header = torch.tensor(numbers, dtype=torch.float64, device=device)
        rows = self.ranks.all_gather(header).view(self.ranks.size, -1).tolist()
        if error is not None:
            raise error
        self._raise_if_some([row[0] for row in rows])
        for column, what in ((1, "number of steps"), (2, "options and parameter sizes")):
            if len({row[column] for row in rows}) > 1:
                raise RuntimeError(
                    f"Expected the same {what} of the balancer on every rank, but they differ. Build it alike on all "
                    "ranks, load the same checkpoint, and call backward equally often."
                )
        totals = [sum(row[3 + task] for row in rows) for task in range(self.num_tasks)]
        tasks = [task for task, total in enumerate(totals) if total > 0]
        absent = [
            (task, rank) for task in tasks for rank, row in enumerate(rows) if row[3 + task] == 0
        ]
        idle = [rank for rank, row in enumerate(rows) if not any(row[3:])]
        self._check_absent(absent, idle if tasks else [])
        shares = [
            self.ranks.size * count / total if total > 0 else 0.0
            for count, total in zip(counts, totals, strict=True)
        ]
        return _Agreement(tasks, shares)

    def _counts(self, present: Sequence[bool], num_samples: NumSamples | None) -> list[float]:
        given = 1.0 if num_samples is None else num_samples
        if isinstance(given, (int, float)):
            counts = [float(given)] * self.num_tasks
        else:
            counts = [float(number) for number in given]
        if len(counts) != self.num_tasks:
            raise ValueError(
                f"Expected `num_samples` to be one number or {self.num_tasks}, one per task, but got {len(counts)}."
            )
        counts = [count if there else 0.0 for count, there in zip(counts, present, strict=True)]
        for task, count in enumerate(counts):
            if not 0 <= count < math.inf or (present[task] and count == 0):
                raise ValueError(
                    f"Expected `num_samples` > 0 for task {task}, but got {count}. Pass None as the loss of a task "
                    "that has no samples on this rank."
                )
        return counts

    def _check_absent(self, absent: list[tuple[int, int]], idle: list[int]) -> None:
        if not absent:
            return
        task, rank = absent[0]
        found = f"but task {task} has no loss on rank {rank}"
        if self.is_sharded:
            raise RuntimeError(
                f"Expected every task on every rank with fully_shard parameters, {found}: its backward pass is "
                "collective. Pass 0 * the loss of that task's output instead of None."
            )
        if self.heads is None:
            raise RuntimeError(
                f"Expected every task on every rank, {found}, which cannot know the task's head. Pass model= to the "
                "balancer: the whole model, or its DistributedDataParallel."
            )
        if idle and self.ddp is not None and self.ddp.find_unused_parameters:
            raise RuntimeError(
                f"Expected some loss on every rank, but rank {idle[0]} has none, and without a graph "
                "DistributedDataParallel's unused parameters are unknown. Set find_unused_parameters=False."
            )

    def _raise_if_some(self, flags: Sequence[float]) -> None:
        failed = [rank for rank, flag in enumerate(flags) if flag]
        if failed:
            raise RuntimeError(
                f"The step was given up because rank(s) {failed} failed; state and gradients are as before it. "
                "See the error there."
            )

    def _agree_on_end(self, passes: _Passes) -> set[int]:
        """Second exchange: raises on every rank if a pass failed on one; else ids of what was reached on any."""
        known = [*self.shared, *(self.heads or [])]
        failed = [float(passes.error is not None and rank == self.ranks.rank) for rank in self._all]
        flags = [*failed, *(float(id(parameter) in passes.reached) for parameter in known)]
        device = self.ranks.exchange_device(self.device)
        tensor = torch.tensor(flags, device=device).to(torch.uint8)
        self.ranks.all_reduce(tensor, dist.ReduceOp.MAX)
        flags = tensor.tolist()
        if passes.error is not None:
            raise passes.error
        self._raise_if_some(flags[: self.ranks.size])
        reached = zip(known, flags[self.ranks.size :], strict=True)
        return passes.reached | {id(parameter) for parameter, flag in reached if flag}

    @property
    def _all(self) -> range:
        return range(self.ranks.size)

    # ---- one step

    def step(
        self,
        balancer: ExcessMTL,
        roots: list[Root | None],
        num_samples: NumSamples | None,
        scale: Tensor | None,
    ) -> None:
        """One balanced step of all ranks; every rank calls it, with its own losses."""
        agreed = self._agree(balancer, [root is not None for root in roots], num_samples)
        if not agreed.tasks:
            return
        if self.is_sharded:
            self._step_sharded(balancer, roots, agreed, scale)
        else:
            with _static_graph_held(roots) as at_start:
                passes = _Passes(self._other_leaves(roots))
                if not balancer._moves_weights():
                    shared_grads = self._weighted(balancer, roots, passes, agreed, scale)
                elif self.reduce == "grads":
                    shared_grads = self._exact(balancer, roots, passes, agreed, scale)
                else:
                    shared_grads = self._approximate(balancer, roots, passes, agreed, scale)
            reached = passes.reached
            self._deposit(balancer, roots, passes, agreed, shared_grads, reached, at_start)
        balancer._num_calls += 1
        balancer._after_call()
        balancer._record_step(agreed.tasks)

    def update(
        self, balancer: ExcessMTL, task_grads: list[Tensor], scale: Tensor | None
    ) -> list[int]:
        """Moves the weights from T * L gradients of this rank; returns the tasks that took part."""
        num_tensors = len(self.shared)
        rows = [
            task_grads[task * num_tensors : (task + 1) * num_tensors]
            for task in range(self.num_tasks)
        ]
        present = [any(grad.numel() > 0 for grad in row) for row in rows]
        heads, self.heads = self.heads, self.heads or []  # no head has a part in this
        try:
            agreed = self._agree(balancer, present, None)
        finally:
            self.heads = heads
        if not agreed.tasks or not balancer._moves_weights():
            return agreed.tasks
        with torch.no_grad():
            if self.is_sharded or self.reduce == "risks":
                flat = [_local(grad) for grad in task_grads]
                self._update_own(balancer, flat, agreed, scale)
                self._repair(balancer, flat, scale)
            else:
                pending = {}
                for task in agreed.tasks:
                    row = [grad if grad.numel() > 0 else None for grad in rows[task]]
                    packed = self._packed(row, agreed.shares[task])
                    pending[task] = self.ranks.reduce_scatter(packed)
                parts = self._parts(pending)
                unscale = self._times_size(scale)
                self._update_parts(balancer, parts, agreed, unscale)
                self._repair(balancer, parts, unscale)
            balancer._raise_if_nonfinite()
        return agreed.tasks

    def _other_leaves(self, roots: list[Root | None]) -> list[Tensor]:
        ids = {id(parameter) for parameter in self.shared}
        present = [root for root in roots if root is not None]
        leaves = gradients.leaves_of(*present)
        return [leaf for key, leaf in leaves.items() if key not in ids]

    def _run_pass(
        self,
        roots: list[Root | None],
        task: int,
        passes: _Passes,
        scale: Tensor | None,
    ) -> list[Tensor | None] | None:
        """The shared gradients of one task; None where it is absent, or after an error, which is kept."""
        root = roots[task]
        if root is None or passes.error is not None:
            return None
        last = max(index for index, other in enumerate(roots) if other is not None)
        targets = [*self.shared, *passes.heads]
        try:
            grads = gradients.capture_grads(
                root, gradients.start_of(root, scale), targets, retain_graph=task != last
            )
            shared_grads = grads[: len(self.shared)]
            gradients.check_reached(shared_grads, task)
        except (
            Exception
        ) as error:  # the other ranks wait in a collective: told at the end of the passes
            passes.error = error
            return None
        passes.head_grads[task] = grads[len(self.shared) :]
        reached = zip(targets, grads, strict=True)
        passes.reached.update(id(target) for target, grad in reached if grad is not None)
        return shared_grads

    # ---- reduce="grads"

    def _exact(
        self,
        balancer: ExcessMTL,
        roots: list[Root | None],
        passes: _Passes,
        agreed: _Agreement,
        scale: Tensor | None,
    ) -> list[Tensor]:
        pending: dict[int, _PendingShard] = {}
        local: dict[int, Tensor] = {}
        previous: list[_PendingShard] = []
        for task in agreed.tasks:
            shared_grads = self._run_pass(roots, task, passes, scale)
            packed = self._packed(shared_grads, agreed.shares[task])
            if self.ddp is not None:
                local[task] = packed
            # Runs while the next task's pass does; two buffers of P are in flight at most.
            pending[task] = self.ranks.reduce_scatter(packed)
            previous.append(pending[task])
            if len(previous) > 1:
                previous.pop(0).wait()
        passes.reached = self._agree_on_end(passes)
        unscale = self._times_size(scale)
        with torch.no_grad():
            parts = self._parts(pending)
            self._update_parts(balancer, parts, agreed, unscale)
            if balancer.nonfinite == "raise":
                self._repair(balancer, parts, unscale)
                balancer._raise_if_nonfinite()
            if self.ddp is not None:
                self._repair(balancer, parts, unscale)
                return self._combined_here(balancer, local)
            own = torch.empty(self.shard_numel, dtype=self.grad_dtype, device=self.device)
            state = balancer.step_state
            state = state._replace(task_weights=state.task_weights / self.ranks.size)
            functional.combine_(
                parts, [own], self.state_layout, state, balancer.step_options, unscale
            )
            return self._unpacked(self.ranks.all_gather(own))

    def _packed(self, grads: Sequence[Tensor | None] | None, share: float) -> Tensor:
        """Gradients of the L parameters as one vector [W * shard], times the rank's share; zero where there is none."""
        numel = self.ranks.size * self.shard_numel
        packed = torch.empty(numel, dtype=self.wire_dtype, device=self.device)
        if grads is None:
            return packed.zero_()
        packed[self.layout.num_params :].zero_()
        for target, grad in zip(packed.split_with_sizes(self._split_sizes), grads, strict=False):
            if grad is None:
                target.zero_()
            else:
                target.view(grad.shape).copy_(grad)
        return packed if share == 1.0 else packed.mul_(share)

    @property
    def _split_sizes(self) -> list[int]:
        rest = self.ranks.size * self.shard_numel - self.layout.num_params
        return [*self.layout.numels, rest]

    def _unpacked(self, packed: Tensor) -> list[Tensor]:
        pieces = packed[: self.layout.num_params].split_with_sizes(list(self.layout.numels))
        return [
            piece.view(parameter.shape).to(parameter.dtype)
            for piece, parameter in zip(pieces, self.shared, strict=True)
        ]

    def _parts(self, pending: dict[int, _PendingShard]) -> list[Tensor]:
        """The own coordinates of every task's summed gradient; empty for absent tasks."""
        none = torch.empty(0, dtype=self.wire_dtype, device=self.device)
        return [pending[task].wait() if task in pending else none for task in range(self.num_tasks)]

    def _times_size(self, scale: Tensor | None) -> Tensor:
        """What the sum over the ranks is divided by, inside the kernel, to be the unscaled mean."""
        if scale is None:
            return torch.tensor(float(self.ranks.size), device=self.device)
        return scale * self.ranks.size

    def _update_parts(
        self, balancer: ExcessMTL, parts: list[Tensor], agreed: _Agreement, unscale: Tensor
    ) -> None:
        sums = self._own_risk_sums(balancer, parts, unscale)
        self.ranks.all_reduce(sums)
        self._update_weights(balancer, sums, agreed)

    def _combined_here(self, balancer: ExcessMTL, local: dict[int, Tensor]) -> list[Tensor]:
        """This rank's own weighted sum, for DistributedDataParallel to average."""
        none = torch.empty(0, dtype=self.wire_dtype, device=self.device)
        rows = [local.get(task, none) for task in range(self.num_tasks)]
        total = torch.empty_like(next(iter(local.values())), dtype=self.grad_dtype)
        functional.weighted_sum_(
            rows,
            [total],
            ParamLayout([total.numel()]),
            balancer.task_weights,
            found_nonfinite=balancer.found_nonfinite,
        )
        return self._unpacked(total)

    # ---- reduce="risks"

    def _approximate(
        self,
        balancer: ExcessMTL,
        roots: list[Root | None],
        passes: _Passes,
        agreed: _Agreement,
        scale: Tensor | None,
    ) -> list[Tensor]:
        none = torch.empty(0, dtype=self.wire_dtype, device=self.device)
        flat: list[Tensor] = []
        for task in range(self.num_tasks):
            grads = self._run_pass(roots, task, passes, scale) or [None] * len(self.shared)
            flat += [none if grad is None else grad for grad in grads]
        passes.reached = self._agree_on_end(passes)
        with torch.no_grad():
            self._update_own(balancer, flat, agreed, scale)
            self._repair(balancer, flat, scale)
            balancer._raise_if_nonfinite()
            outputs = [
                torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                for parameter in self.shared
            ]
            shares = torch.tensor(agreed.shares, dtype=torch.float64, device=self.device)
            functional.weighted_sum_(
                flat,
                outputs,
                self.layout,
                balancer.task_weights * shares,
                found_nonfinite=balancer.found_nonfinite,
            )
            return self._averaged(outputs)

    def _averaged(self, tensors: list[Tensor]) -> list[Tensor]:
        """The mean over the ranks of the L shared gradients; left to DistributedDataParallel where there is one."""
        if self.ddp is not None:
            return tensors
        packed = self._packed(tensors, 1.0)
        self.ranks.all_reduce(packed)
        return self._unpacked(packed.div_(self.ranks.size))

    def _update_own(
        self, balancer: ExcessMTL, flat: list[Tensor], agreed: _Agreement, scale: Tensor | None
    ) -> None:
        """Risks of the rank's own gradients: averaged, or summed where each rank has a part of one gradient."""
        sums = self._own_risk_sums(balancer, flat, scale)
        if not self.is_sharded:
            shares = torch.tensor(agreed.shares, dtype=torch.float64, device=self.device)
            sums *= shares / self.ranks.size
        self.ranks.all_reduce(sums)
        self._update_weights(balancer, sums, agreed)

    # ---- fully_shard

    def _step_sharded(
        self,
        balancer: ExcessMTL,
        roots: list[Root | None],
        agreed: _Agreement,
        scale: Tensor | None,
    ) -> None:
        if balancer.head_weighting == "task_weights":
            raise NotImplementedError(
                "head_weighting='task_weights' does not work with fully_shard parameters: the gradients of heads "
                "cannot be kept apart. Use 'none'."
            )
        plain_heads = [head for head in self.heads or [] if not _is_dtensor(head)]
        moves = balancer._moves_weights()
        with gradients.set_aside_grads([*self.shared, *plain_heads]):
            rows: list[list[Tensor | None]] = []
            for task, root in enumerate(roots):
                assert root is not None
                start = gradients.start_of(root, scale)
                gradients.run_backward(
                    [root],
                    [start * agreed.shares[task]],
                    retain_graph=task != self.num_tasks - 1,
                )
                rows.append(gradients.take_grads(self.shared))
                gradients.check_reached(rows[-1], task)
            head_grads = gradients.take_grads(plain_heads)
        with torch.no_grad():
            none = torch.empty(0, device=self.device)
            flat = [none if grad is None else _local(grad) for row in rows for grad in row]
            if moves:
                self._update_own(balancer, flat, agreed, scale)
                self._repair(balancer, flat, scale)
                balancer._raise_if_nonfinite()
            else:
                balancer.found_nonfinite.zero_()
            outputs = [torch.zeros_like(_local(parameter)) for parameter in self.shared]
            functional.weighted_sum_(
                flat,
                outputs,
                self.state_layout,
                balancer.task_weights,
                found_nonfinite=balancer.found_nonfinite,
            )
            for index, parameter in enumerate(self.shared):
                like = next((row[index] for row in rows if row[index] is not None), None)
                if like is None:
                    continue
                grad = _like_dtensor(outputs[index], like)
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
            averaged = self._averaged_heads(
                plain_heads, dict(zip(map(id, plain_heads), head_grads, strict=True))
            )
        gradients.deposit_grads(plain_heads, averaged)

    # ---- state and weights

    def _own_risk_sums(
        self, balancer: ExcessMTL, flat: list[Tensor], scale: Tensor | None
    ) -> Tensor:
        state = balancer.step_state
        sums = torch.zeros_like(state.excess_risk)
        functional.accumulate_excess_risk_(
            flat,
            self.state_layout,
            state.sq_grad_sum,
            state.grad_mean,
            sums,
            state.ticket,
            balancer.step_options,
            scale,
        )
        return sums

    def _update_weights(self, balancer: ExcessMTL, sums: Tensor, agreed: _Agreement) -> None:
        """From here on every rank computes the same from the same bits."""
        state, options = balancer.step_state, balancer.step_options
        state.found_nonfinite.zero_()
        functional.update_task_risks_(sums, agreed.tasks, self.layout, state, options)
        functional.update_task_weights_(agreed.tasks, state, options)

    def _repair(self, balancer: ExcessMTL, flat: list[Tensor], scale: Tensor | None) -> None:
        """Takes the step out of the own state again if any rank's part was not finite."""
        state = balancer.step_state
        functional.repair_(
            flat,
            self.state_layout,
            state.sq_grad_sum,
            state.grad_mean,
            state.found_nonfinite,
            balancer.step_options,
            scale,
        )

    # ---- other steps and heads

    def _weighted(
        self,
        balancer: ExcessMTL,
        roots: list[Root | None],
        passes: _Passes,
        agreed: _Agreement,
        scale: Tensor | None,
    ) -> list[Tensor]:
        """A step that only applies the weights: T passes, and one average of P elements."""
        totals: list[Tensor | None] = [None] * len(self.shared)
        for task in agreed.tasks:
            grads = self._run_pass(roots, task, passes, scale) or [None] * len(self.shared)
            factor = balancer.task_weights[task] * agreed.shares[task]
            for index, grad in enumerate(grads):
                if grad is not None:
                    scaled = grad * factor.to(grad.dtype)
                    total = totals[index]
                    totals[index] = scaled if total is None else total.add_(scaled)
        passes.reached = self._agree_on_end(passes)
        balancer.found_nonfinite.zero_()
        with torch.no_grad():
            return self._averaged(
                [
                    torch.zeros_like(parameter) if total is None else total
                    for parameter, total in zip(self.shared, totals, strict=True)
                ]
            )

    def _deposit(
        self,
        balancer: ExcessMTL,
        roots: list[Root | None],
        passes: _Passes,
        agreed: _Agreement,
        shared_grads: list[Tensor],
        reached: set[int],
        at_start: Any,
    ) -> None:
        """Adds every gradient in one pass, as the hooks of DistributedDataParallel expect it."""
        sums: dict[int, Tensor | None] = {}
        with torch.no_grad():
            for task, grads in passes.head_grads.items():
                factor: Tensor | float = agreed.shares[task]
                if balancer.head_weighting == "task_weights":
                    factor = factor * balancer._head_weights()[task]
                for head, grad in zip(passes.heads, grads, strict=True):
                    if grad is None:
                        continue
                    if isinstance(factor, Tensor):
                        grad = grad * factor.to(grad.dtype)
                    elif factor != 1.0:
                        grad = grad * factor
                    before = sums.get(id(head))
                    sums[id(head)] = grad if before is None else before + grad
        heads = passes.heads
        if self.heads is not None and self.ddp is None:
            heads = self.heads
            averaged = self._averaged_heads(heads, sums)
            sums = dict(zip(map(id, heads), averaged, strict=True))
        parameters = {id(parameter): parameter for parameter in (*self.shared, *heads)}
        for parameter in self._expected_by_ddp(roots):
            parameters.setdefault(id(parameter), parameter)
        sums.update(zip(map(id, self.shared), shared_grads, strict=True))
        grads = [sums.get(key) if key in reached else None for key in parameters]
        gradients.deposit_grads(list(parameters.values()), grads, at_start=at_start)

    def _averaged_heads(
        self, heads: Sequence[Tensor], grads: dict[int, Tensor | None]
    ) -> list[Tensor | None]:
        """The mean over the ranks of the heads' gradients, zero on a rank without; one all-reduce per dtype."""
        averaged: dict[int, Tensor] = {}
        for dtype in sorted({head.dtype for head in heads}, key=str):
            members = [head for head in heads if head.dtype == dtype]
            wire = torch.float64 if dtype == torch.float64 else torch.float32
            flat = torch.cat(
                [
                    torch.zeros(head.numel(), dtype=wire, device=head.device)
                    if grads.get(id(head)) is None
                    else grads[id(head)].reshape(-1).to(wire)  # type: ignore[union-attr]
                    for head in members
                ]
            )
            self.ranks.all_reduce(flat)
            pieces = flat.div_(self.ranks.size).split([head.numel() for head in members])
            for head, piece in zip(members, pieces, strict=True):
                averaged[id(head)] = piece.view(head.shape).to(dtype)
        return [averaged[id(head)] for head in heads]

    def _expected_by_ddp(self, roots: list[Root | None]) -> list[Tensor]:
        """What the reducer waits for: every trainable parameter, or with unused ones what the outputs depend on."""
        sinks = _ddp_sinks(roots)
        if sinks:
            edges = [GradientEdge(node, 0) for node, _ in sinks]
            return list(gradients.leaves_of(*edges).values())
        if self.ddp is None or self.ddp.find_unused_parameters:
            return []
        ignored = self.ddp.parameters_to_ignore
        return [
            parameter
            for name, parameter in self.ddp.module.named_parameters()
            if parameter.requires_grad and name not in ignored
        ]

    # ---- checkpoints

    def exported(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """State entries of ``name``, as DTensors that torch.distributed.checkpoint can lay out for other ranks.

        ``reduce="risks"``: the rank's own tensor. ``"grads"``: one [T, P] cut by columns. With
        ``fully_shard``: ``name.0``, ``name.1``, ... of [T, *shape], cut as each parameter is.
        """
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if tensor.shape[1] == 0 or (self.reduce == "risks"):
            return {name: tensor}
        if self.is_sharded:
            entries = {}
            pieces = functional.segments(tensor, self.state_layout.param_numels)
            for index, (parameter, piece) in enumerate(zip(self.shared, pieces, strict=True)):
                local = piece.reshape(self.num_tasks, *_local(parameter).shape)
                key = f"{name}.{index}"
                if not isinstance(parameter, DTensor):
                    entries[key] = local
                    continue
                placements = [
                    Shard(placement.dim + 1) if isinstance(placement, Shard) else Replicate()
                    for placement in parameter.placements
                ]
                shape = torch.Size([self.num_tasks, *parameter.shape])
                entries[key] = DTensor.from_local(
                    local,
                    parameter.device_mesh,
                    placements,
                    run_check=False,
                    shape=shape,
                    stride=torch.empty(shape, device="meta").stride(),
                )
            return entries
        if self.mesh is None:
            self.mesh = DeviceMesh.from_group(self.ranks.group, tensor.device.type)
        num_params = self.layout.num_params
        start = min(self.ranks.rank * self.shard_numel, num_params)
        num_own = min(self.shard_numel, num_params - start)
        return {
            name: DTensor.from_local(
                tensor[:, :num_own],
                self.mesh,
                [Shard(1)],
                run_check=False,
                shape=torch.Size([self.num_tasks, num_params]),
                stride=(num_params, 1),
            )
        }

    def imported(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """A copy of ``state_dict`` in which the sharded state is this rank's part of what was saved.

        Takes what :meth:`exported` gave, also on another number of ranks, and the [T, padded P] of
        a single process or of :func:`full_state_dict`.
        """
        state_dict = dict(state_dict)
        for name in SHARDED_NAMES:
            whole = state_dict.get(prefix + name)
            keys = [f"{prefix}{name}.{index}" for index in range(len(self.shared))]
            if keys[0] in state_dict:
                pieces = [_local(state_dict.pop(key)).flatten(1) for key in keys]
            elif whole is None or whole.shape[1] == 0 or self.reduce == "risks":
                continue
            else:
                pieces = self._own_pieces(whole)
            own = pieces[0].new_zeros(self.num_tasks, self.state_layout.padded_numel)
            targets = functional.segments(own, self.state_layout.param_numels)
            for target, piece in zip(targets, pieces, strict=True):
                target[:, : piece.shape[1]].copy_(piece)
            state_dict[prefix + name] = own
        return state_dict

    def _own_pieces(self, whole: Tensor) -> list[Tensor]:
        """This rank's part of one tensor [T, P] or [T, padded P]."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(whole, DTensor):
            if whole.device_mesh.size() == self.ranks.size:
                return [whole.to_local()]
            whole = whole.full_tensor()
        if whole.shape[1] == self.layout.padded_numel:
            split = list(functional.segments(whole, self.layout.param_numels))
        else:
            split = list(whole.split_with_sizes(list(self.layout.numels), dim=1))
        if not self.is_sharded:
            start = self.ranks.rank * self.shard_numel
            return [torch.cat(split, dim=1)[:, start : start + self.shard_numel]]
        pieces = []
        for parameter, piece in zip(self.shared, split, strict=True):
            if not isinstance(parameter, DTensor):
                pieces.append(piece)
                continue
            rows = [
                _local(
                    distribute_tensor(
                        row.reshape(parameter.shape).contiguous(),
                        parameter.device_mesh,
                        parameter.placements,
                        src_data_rank=None,
                    )
                ).reshape(-1)
                for row in piece
            ]
            pieces.append(torch.stack(rows))
        return pieces


def full_state_dict(balancer: ExcessMTL) -> dict[str, Any]:
    """The state as a balancer of one process would save it; every rank calls this, and any may write it.

    Loads into any balancer with the same options and parameters: of one process, of another number
    of ranks, with ``fully_shard`` or without. With ``reduce="risks"`` it is the rank's own state.
    """
    from torch.distributed.tensor import DTensor

    state = balancer.state_dict()
    parallel = balancer._data_parallel
    if parallel is None:
        return state
    for name in SHARDED_NAMES:
        keys = [f"{name}.{index}" for index in range(len(parallel.shared))]
        if keys[0] in state:
            whole = [state.pop(key) for key in keys]
            split = [
                (piece.full_tensor() if isinstance(piece, DTensor) else piece).flatten(1)
                for piece in whole
            ]
        elif isinstance(state[name], DTensor):
            split = state[name].full_tensor().split_with_sizes(list(parallel.layout.numels), dim=1)
        else:
            continue
        full = split[0].new_zeros(balancer.num_tasks, parallel.layout.padded_numel)
        targets = functional.segments(full, parallel.layout.param_numels)
        for target, piece in zip(targets, split, strict=True):
            target.copy_(piece)
        state[name] = full
    return state


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def _like_dtensor(local: Tensor, like: Tensor) -> Tensor:
    """A part of a gradient, as the DTensor of which it is a part."""
    from torch.distributed.tensor import DTensor

    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def _common_mesh(parameters: Sequence[Tensor]) -> Any:
    meshes = {
        parameter.device_mesh if _is_dtensor(parameter) else None  # type: ignore[attr-defined]
        for parameter in parameters
    }
    mesh = next(iter(meshes))
    if len(meshes) != 1 or mesh is None or mesh.ndim != 1:
        raise ValueError(
            "Expected `shared_parameters` on one device mesh of one dimension, but got "
            f"{', '.join(map(str, meshes))}. Call fully_shard on the whole encoder, with a mesh of one dimension."
        )
    return mesh


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
def _static_graph_held(roots: Sequence[Root | None]) -> Iterator[Any]:
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


__all__ = ["DataParallel", "NumSamples", "Ranks", "Reduce", "full_state_dict"]
