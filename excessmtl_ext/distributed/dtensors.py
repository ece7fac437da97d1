"""What ``fully_shard`` makes of parameters: tensors of which a rank holds a part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def like_dtensor(local: Tensor, like: Tensor) -> Tensor:
    """Returns a part of a gradient, as the DTensor of which it is a part."""
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)  # a gradient of a parameter that is one
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def common_mesh(parameters: Sequence[Tensor]) -> Any:
    meshes = {
        parameter.device_mesh if is_dtensor(parameter) else None  # type: ignore[attr-defined]
        for parameter in parameters
    }
    mesh = next(iter(meshes))
    if len(meshes) != 1 or mesh is None or mesh.ndim != 1:
        raise ValueError(
            "Expected `shared_parameters` on one device mesh of one dimension, but got "
            f"{', '.join(map(str, meshes))}. Call fully_shard on the whole encoder, with a mesh of one dimension."
        )
    return mesh


def unsharded_parameters(module: nn.Module) -> dict[int, Tensor]:
    """Returns ``fully_shard`` modules' parameters by the id of the whole tensor that stands for each in a graph."""
    found: dict[int, Tensor] = {}
    for each in module.modules():
        state: Any = each._get_fsdp_state() if hasattr(each, "_get_fsdp_state") else None  # pyright: ignore
        for group in () if state is None else _groups_of(state):
            for parameter in group.fsdp_params:
                whole = getattr(parameter, "_unsharded_param", None)
                if whole is not None:
                    found[id(whole)] = parameter.sharded_param
    return found


def _groups_of(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)  # torch has no public name for either
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]
