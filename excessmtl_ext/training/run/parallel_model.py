"""How the processes of a run share its model, and how such a model is saved as one process would save it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from excessmtl_ext.models import EncoderHeads
from excessmtl_ext.training.run.ranks import RunRanks

Distributed = Literal["ddp", "fsdp"]


class ParallelModel:
    """A model of one process, of DistributedDataParallel replicas, or cut by ``fully_shard``.

    Args:
        model: On its device. ``fully_shard`` changes it.
        distributed: How it is shared; None for one process.
        ranks: The processes.

    Attributes:
        module: The model with its own parameters, to be evaluated and optimised.
        forward: To be called in training.
        balancer_options: What the balancer needs to know.
    """

    def __init__(
        self, model: EncoderHeads, distributed: Distributed | None, ranks: RunRanks
    ) -> None:
        self.module = model
        self.forward: nn.Module = model
        self.balancer_options: dict[str, Any] = {}
        self._is_cut = distributed == "fsdp"
        if distributed == "ddp":
            self.forward = DistributedDataParallel(model, process_group=ranks.group)
            self.balancer_options = {"model": self.forward}
        elif distributed == "fsdp":
            self._cut(ranks)

    def _cut(self, ranks: RunRanks) -> None:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        assert ranks.group is not None
        kind = next(self.module.parameters()).device.type
        mesh = DeviceMesh.from_group(ranks.group, kind)
        # Two groups: the encoder is gathered for each task's pass and freed again, the heads stay.
        fully_shard(self.module.encoder, mesh=mesh)
        fully_shard(self.module, mesh=mesh)

    def state(self) -> dict[str, Any]:
        """Returns the state of the whole model; every process calls this, and rank 0 has the result."""
        if not self._is_cut:
            return self.module.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(
            self.module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state` gave, which every process has."""
        if not self._is_cut:
            self.module.load_state_dict(state)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(self.module, state, options=StateDictOptions(full_state_dict=True))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Returns what :meth:`state` does, of an optimizer of the model's parameters."""
        # Of an optimizer that has not stepped, torch would ask for a state by stepping: Adam then counts one step more.
        if not self._is_cut or not optimizer.state:
            return optimizer.state_dict()
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(self.module, optimizer, options=options)

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Takes what :meth:`optimizer_state` gave, which every process has."""
        if not self._is_cut or not state["state"]:
            optimizer.load_state_dict(state)
            return
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.module, optimizer, state, options=options)
