"""Who holds which part of the parameters and of the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from excessmtl_ext.distributed.collectives import Ranks
from excessmtl_ext.distributed.ddp import AveragedGrads, register_averaged_grads
from excessmtl_ext.distributed.dtensors import common_mesh, is_dtensor, local_part
from excessmtl_ext.state import ParamLayout

Reduce = Literal["grads", "risks"]


class Partition:
    """The ranks, the parameters, and which part of parameters and state is whose.

    Args:
        shared_parameters: The balancer's.
        num_tasks: T.
        process_group: The ranks; None for those of ``model`` or of the DTensor parameters.
        reduce: ``"grads"``: exact. ``"risks"``: the cheap approximation.
        model: The whole model, so that heads are known on ranks where their task is absent. A
            DistributedDataParallel averages all gradients itself; those of a plain module are
            averaged here. None: gradients of heads are left as the rank computed them.

    Attributes:
        description: What else must be equal on all ranks.
        is_compared: Whether values have been found equal since the start or the latest load.

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
        self.is_sharded = any(is_dtensor(parameter) for parameter in self.shared)
        self.mesh = common_mesh(self.shared) if self.is_sharded else None
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
        self.averaged_grads: AveragedGrads | None = None
        if self.ddp is not None and reduce == "grads":
            self.averaged_grads = register_averaged_grads(self.ddp)
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
            self.state_layout = ParamLayout([local_part(p).numel() for p in self.shared])
        elif reduce == "grads":
            self.state_layout = ParamLayout([self.shard_numel])
        else:
            self.state_layout = self.layout
        dtypes = {parameter.dtype for parameter in self.shared}
        # Sums over ranks are taken in float32 at least: 16 bits would round them, and float16 overflow.
        self.wire_dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.grad_dtype = dtypes.pop() if len(dtypes) == 1 else self.wire_dtype
        self.device = self.shared[0].device
        heads = [(each.numel(), str(each.dtype)) for each in self.heads or []]
        unused = None if self.ddp is None else self.ddp.find_unused_parameters
        self.description = (reduce, [str(each.dtype) for each in self.shared], heads, unused)
        self.is_compared = False

    @property
    def needs_ddp(self) -> bool:
        """Whether DistributedDataParallel must average the shared gradients itself.

        So it is if another communication hook is in charge, if it only accumulates (``no_sync``),
        or if there are older gradients, which may not have been averaged.
        """
        if self.ddp is None:
            return False
        has_older = any(parameter.grad is not None for parameter in self.shared)
        return self.averaged_grads is None or has_older or not self.ddp.require_backward_grad_sync

    def on_device(self, numbers: Sequence[float]) -> Tensor:
        """Returns ``numbers`` as float64 [n] on the device, for which the host does not wait."""
        tensor = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def packed(self, grads: Sequence[Tensor | None] | None, share: float) -> Tensor:
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

    @property
    def own_pieces(self) -> tuple[int, list[int]]:
        """The first tensor in this rank's part of a packed vector; the elements there of it and those that follow."""
        start = self.ranks.rank * self.shard_numel
        stop = min(start + self.shard_numel, self.layout.num_params)
        first, sizes, begin = 0, [], 0
        for index, numel in enumerate(self.layout.numels):
            size = min(stop, begin + numel) - max(start, begin)
            if size > 0:
                first = first if sizes else index
                sizes.append(size)
            elif sizes and numel == 0 and begin < stop:
                sizes.append(0)
            begin += numel
        return first, sizes

    @property
    def own_frozen(self) -> list[slice]:
        """Where this rank's part of a packed vector is of parameters that do not require grad now."""
        start = self.ranks.rank * self.shard_numel
        found, begin = [], 0
        for parameter, numel in zip(self.shared, self.layout.numels, strict=True):
            first, last = max(begin - start, 0), min(begin + numel - start, self.shard_numel)
            if not parameter.requires_grad and first < last:
                found.append(slice(first, last))
            begin += numel
        return found

    def cut(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """This rank's parts of T packed vectors, cut where a parameter ends; the padding is left out."""
        _, sizes = self.own_pieces
        pieces: list[Tensor] = []
        for part in parts:
            pieces += part[: sum(sizes)].split(sizes) if part.numel() > 0 else [part] * len(sizes)
        return pieces

    def unpacked(self, packed: Tensor) -> list[Tensor]:
        """Returns the L parameters' parts of one vector [W * shard], in their shapes and dtypes."""
        pieces = packed[: self.layout.num_params].split_with_sizes(list(self.layout.numels))
        return [
            piece.view(parameter.shape).to(parameter.dtype)
            for piece, parameter in zip(pieces, self.shared, strict=True)
        ]

    def averaged(self, tensors: list[Tensor]) -> list[Tensor]:
        """Averages the L shared gradients over the ranks, or leaves that to DistributedDataParallel."""
        if self.ddp is not None:
            return tensors
        packed = self.packed(tensors, 1.0)
        self.ranks.all_reduce(packed)
        return self.unpacked(packed.div_(self.ranks.size))
