"""Sharded state in checkpoints: as DTensors, and whole."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from excessmtl_ext.distributed.dtensors import is_dtensor, local_part
from excessmtl_ext.distributed.partition import Partition
from excessmtl_ext.state import segments
from excessmtl_ext.step import Engine

SHARDED_NAMES = ("sq_grad_sum", "grad_mean")
"""State of T * P elements, of which a rank may hold a part."""


def exported(parallel: Partition, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Returns the state entries of ``name``, as DTensors that torch.distributed.checkpoint can lay out for other ranks.

    ``reduce="risks"``: the rank's own tensor. ``"grads"``: one [T, P] cut by columns. With
    ``fully_shard``: ``name.0``, ``name.1``, ... of [T, *shape], cut as each parameter is.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if tensor.shape[1] == 0 or (parallel.reduce == "risks"):
        return {name: tensor}
    if parallel.is_sharded:
        entries = {}
        pieces = segments(tensor, parallel.state_layout.param_numels)
        for index, (parameter, piece) in enumerate(zip(parallel.shared, pieces, strict=True)):
            local = piece.reshape(parallel.num_tasks, *local_part(parameter).shape)
            key = f"{name}.{index}"
            assert isinstance(parameter, DTensor)  # common_mesh has seen to it
            placements = [
                Shard(placement.dim + 1) if isinstance(placement, Shard) else Replicate()
                for placement in parameter.placements
            ]
            shape = torch.Size([parallel.num_tasks, *parameter.shape])
            entries[key] = DTensor.from_local(
                local,
                parameter.device_mesh,
                placements,
                run_check=False,
                shape=shape,
                stride=torch.empty(shape, device="meta").stride(),
            )
        return entries
    if parallel.mesh is None:
        parallel.mesh = DeviceMesh.from_group(parallel.ranks.group, tensor.device.type)
    num_params = parallel.layout.num_params
    start = min(parallel.ranks.rank * parallel.shard_numel, num_params)
    num_own = min(parallel.shard_numel, num_params - start)
    return {
        name: DTensor.from_local(
            tensor[:, :num_own],
            parallel.mesh,
            [Shard(1)],
            run_check=False,
            shape=torch.Size([parallel.num_tasks, num_params]),
            stride=(num_params, 1),
        )
    }


def imported(parallel: Partition, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Returns a copy of ``state_dict`` in which the sharded state is this rank's part of what was saved.

    Takes what :meth:`exported` gave, also on another number of ranks or gathered by torch's
    ``full_state_dict``, and the [T, padded P] of a single process or of :func:`full_state_dict`.
    """
    state_dict = dict(state_dict)
    for name in SHARDED_NAMES:
        whole = state_dict.get(prefix + name)
        keys = [f"{prefix}{name}.{index}" for index in range(len(parallel.shared))]
        if keys[0] in state_dict:
            saved = [state_dict.pop(key) for key in keys]
            pieces = [
                local_part(piece).flatten(1) if is_dtensor(piece) else _own_part(parameter, piece)
                for parameter, piece in zip(parallel.shared, saved, strict=True)
            ]
        elif whole is None or whole.shape[1] == 0 or parallel.reduce == "risks":
            continue
        else:
            pieces = _own_pieces(parallel, whole)
        own = pieces[0].new_zeros(parallel.num_tasks, parallel.state_layout.padded_numel)
        targets = segments(own, parallel.state_layout.param_numels)
        for target, piece in zip(targets, pieces, strict=True):
            target[:, : piece.shape[1]].copy_(piece)
        state_dict[prefix + name] = own
    return state_dict


def _own_pieces(parallel: Partition, whole: Tensor) -> list[Tensor]:
    """This rank's part of one tensor [T, P] or [T, padded P]."""
    from torch.distributed.tensor import DTensor

    if isinstance(whole, DTensor):
        if whole.device_mesh.size() == parallel.ranks.size:
            return [whole.to_local()]
        whole = whole.full_tensor()
    if whole.shape[1] == parallel.layout.padded_numel:
        split = list(segments(whole, parallel.layout.param_numels))
    else:
        split = list(whole.split_with_sizes(list(parallel.layout.numels), dim=1))
    if not parallel.is_sharded:
        start = parallel.ranks.rank * parallel.shard_numel
        return [torch.cat(split, dim=1)[:, start : start + parallel.shard_numel]]
    return [
        _own_part(parameter, piece) for parameter, piece in zip(parallel.shared, split, strict=True)
    ]


def _own_part(parameter: Tensor, piece: Tensor) -> Tensor:
    """Returns this rank's part [T, n] of the whole state [T, *shape] of one parameter, cut as that is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)  # common_mesh has seen to it
    rows = [
        local_part(
            distribute_tensor(
                row.reshape(parameter.shape).contiguous(),
                parameter.device_mesh,
                parameter.placements,
                src_data_rank=None,
            )
        ).reshape(-1)
        for row in piece
    ]
    return torch.stack(rows)


class Saved(Protocol):
    """What is asked of a balancer to save it."""

    num_tasks: int
    engine: Engine

    def state_dict(self) -> dict[str, Any]:
        """See ``torch.nn.Module``."""
        ...


def full_state_dict(balancer: Saved) -> dict[str, Any]:
    """Returns the state as a balancer of one process would save it; every rank calls this, and any may write it.

    Loads into any balancer with the same options and parameters: of one process, of another number
    of ranks, with ``fully_shard`` or without. With ``reduce="risks"`` it is the rank's own state.
    """
    from torch.distributed.tensor import DTensor

    state = balancer.state_dict()
    parallel = balancer.engine
    if not isinstance(parallel, Partition):
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
        targets = segments(full, parallel.layout.param_numels)
        for target, piece in zip(targets, split, strict=True):
            target.copy_(piece)
        state[name] = full
    return state
