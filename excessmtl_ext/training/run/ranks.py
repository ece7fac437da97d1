"""The processes that share a training run, usually started by torchrun; a run alone is a group of one."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from excessmtl_ext.distributed import Ranks

T = TypeVar("T")

HOW_TO_START = "torchrun --nproc-per-node 2 --no-python excessmtl train DATASET --distributed ddp"

_END = object()


class OtherRankFailed(RuntimeError):
    """This process stops because another one of the run has failed, which says why."""


class RunRanks:
    """What the processes of a run tell each other, apart from gradients; alone, nothing is sent.

    Args:
        group: The processes; None for a run alone.

    Attributes:
        rank: Number of this process.
        size: How many there are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._ranks = None if group is None else Ranks(group)

    def leave(self) -> None:
        """Ends the group, and with it its threads: one that lets go of a tensor while Python ends would abort it.

        They end when nothing holds the group any more: the model and the balancer have to be gone.
        """
        self.group = self._ranks = None
        gc.collect()  # a DistributedDataParallel is part of a cycle
        dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0

    def part(self, indices: Tensor) -> Tensor:
        """This process's samples of a joined batch; parts differ by one in size, and the last ones may be empty."""
        return indices.tensor_split(self.size)[self.rank]

    def deal(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """Deals ``items`` to the processes in turn; each gets as many, at the end perhaps one that is not its own.

        Yields:
            An item, and whether it is this process's. Every process makes all items and keeps its own.
        """
        position, kept = -1, None
        for index, item in enumerate(items):
            position = index % self.size
            if position in (0, self.rank):
                kept = item
            if position == self.size - 1:
                yield kept, True  # type: ignore[misc]
        if 0 <= position < self.size - 1:
            yield kept, self.rank <= position  # type: ignore[misc]

    def any(self, flag: bool) -> bool:
        """Returns whether ``flag`` is set on some process; the same answer on all."""
        return any(self._flags(flag))

    def gather(self, value: Any) -> list[Any]:
        """Returns the ``value`` of every process, in their order, on every process. Tensors lie on the CPU."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first(self, make: Callable[[], T]) -> T:
        """Returns what ``make`` returns on rank 0, which alone calls it, on every process; raises its error there, too.

        Raises:
            OtherRankFailed: ``make`` raised on rank 0, and this is another one.
        """
        result: list[Any] = [None]
        with self.sharing_errors():
            if self.is_main:
                result[0] = make()
        if self.group is not None:
            dist.broadcast_object_list(result, group_src=0, group=self.group)
        return result[0]

    @contextmanager
    def sharing_errors(self) -> Iterator[None]:
        """Raises an error in the body, which must not itself wait for another process, on every process.

        Raises:
            OtherRankFailed: the body raised on another process.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = [rank for rank, flag in enumerate(self._flags(error is not None)) if flag]
        if error is not None:
            raise error
        if failed:
            raise OtherRankFailed(f"Rank {self.rank} stops because rank(s) {failed} failed.")

    def in_step(self, items: Iterable[T]) -> Iterator[T]:
        """Yields ``items``; an error in making one is an error on every process."""
        iterator = iter(items)
        while True:
            with self.sharing_errors():
                item = next(iterator, _END)
            if item is _END:
                return
            yield item  # type: ignore[misc]

    def copy_buffers(self, module: torch.nn.Module) -> None:
        """Gives every process the buffers of rank 0, such as the running means of a BatchNorm."""
        for buffer in module.buffers() if self.group is not None else ():
            dist.broadcast(buffer, group_src=0, group=self.group)

    def _flags(self, flag: bool) -> list[bool]:
        if self._ranks is None:
            return [flag]
        device = self._ranks.exchange_device(torch.device("cuda"))
        own = torch.tensor([flag], dtype=torch.uint8, device=device)
        return [bool(each) for each in self._ranks.all_gather(own).tolist()]


def is_main_process() -> bool:
    """Returns whether this process is alone or the first of those that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined_ranks(distributed: str | None, device: torch.device) -> Iterator[RunRanks]:
    """Yields the processes of a run; joins them if the caller has not, and then leaves them at the end.

    Args:
        distributed: How they share the model; None for a run alone.
        device: Where this process computes.

    Raises:
        ValueError: ``distributed`` is given and nothing has started the processes, or the other way round.
    """
    if distributed is None:
        if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
            raise ValueError(
                f"Expected `distributed` with {os.environ['WORLD_SIZE']} processes of torchrun, but got None: each "
                "would train the same. Pass --distributed ddp or fsdp."
            )
        yield RunRanks()
    elif dist.is_initialized():
        yield RunRanks(dist.group.WORLD)
    else:
        if "RANK" not in os.environ:
            raise ValueError(
                f"Expected the processes of a run with `distributed` to be started by torchrun, but RANK is not set. "
                f"Start it as: {HOW_TO_START}"
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # gloo beside NCCL: flags and objects are exchanged on the CPU, and no GPU waits for them.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        ranks = RunRanks(dist.group.WORLD)
        try:
            yield ranks
        finally:
            ranks.leave()
