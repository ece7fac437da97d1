"""The collectives of a step, and the bytes they send."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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
        """Returns where the small exchanges run: the CPU if the group can, so that nothing waits for ``device``."""
        return torch.device("cpu") if "cpu" in self._backends else device

    def _count(self, num_elements: float, tensor: Tensor) -> None:
        self.num_bytes_sent += int(num_elements * tensor.element_size())

    def reduce_scatter(self, full: Tensor) -> PendingShard:
        """Starts to sum ``full`` [W * n] over the ranks; each gets its n elements."""
        num_own = full.numel() // self.size
        self._count((self.size - 1) * num_own, full)
        if self._backends.get(full.device.type) == "gloo":
            # gloo's reduce_scatter is an all-reduce inside and sends twice as much. An all-to-all sends
            # (W - 1) / W of the tensor, and the sum is taken here, in the order of the ranks.
            received = torch.empty_like(full)
            work = dist.all_to_all_single(received, full, group=self.group, async_op=True)
            return PendingShard(received.view(self.size, num_own), work, full)
        own = full.new_empty(num_own)
        work = _reduce_scatter(own, full, group=self.group, async_op=True)
        return PendingShard(own.view(1, num_own), work, full)

    def all_gather(self, own: Tensor) -> Tensor:
        """Returns the ranks' tensors [n], joined to [W * n]."""
        full = own.new_empty(self.size * own.numel())
        self._count((self.size - 1) * own.numel(), own)
        _all_gather(full, own, group=self.group)
        return full

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        """Reduces in place; every rank gets the same bits."""
        self._count(2 * (self.size - 1) / self.size * tensor.numel(), tensor)
        dist.all_reduce(tensor, op=op, group=self.group)


class PendingShard:
    """A reduce-scatter under way; keeps alive what it reads."""

    def __init__(self, parts: Tensor, work: Any, source: Tensor) -> None:
        self._parts, self._work, self._source = parts, work, source
        self._sum: Tensor | None = None

    def wait(self) -> Tensor:
        """Returns the own part of the sum, [n]."""
        if self._sum is None:
            self._work.wait()
            self._sum = self._parts[0]
            for part in self._parts[1:]:
                self._sum += part
            del self._parts, self._work, self._source
        return self._sum
