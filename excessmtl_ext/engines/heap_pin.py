"""Keeps malloc from giving the memory of a step's gradients back to the kernel, which would have to clear it anew.

glibc returns the top of the heap once more than its trim threshold is free there (mallopt(3)). The
gradients of T tasks, freed together at the end of a step, are such a top: the next step faults every
page of them in again, 4 KiB at a time. One gradient that stays where the top would begin leaves the
others' memory free in the middle of the heap, where the next forward pass and the next gradients
find it. Nothing of the process is configured, and other allocators lose nothing but that gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from excessmtl_ext.passes.targets import fills_its_storage

LEAST_NUMEL = 1 << 18
"""Elements of all gradients below which nothing is kept: 1 MiB of float32 came back without faults as it was."""


class HeapPin:
    """Holds the gradient at the highest address of the latest step; on CPUs only, other allocators keep what they have.

    Not part of a balancer's state: a copy, of a process or of a file, begins without one.
    """

    def __init__(self) -> None:
        self._gradient: Tensor | None = None

    def __reduce__(self) -> tuple[type[HeapPin], tuple[()]]:
        return HeapPin, ()

    @property
    def num_bytes(self) -> int:
        """What is held: at most the gradient of one parameter."""
        return 0 if self._gradient is None else self._gradient.nbytes

    def move(self, task_grads: Sequence[Tensor]) -> None:
        """Holds the highest of ``task_grads`` [T * L], which are about to be freed, instead of the latest step's."""
        highest = max(task_grads, key=Tensor.data_ptr)
        # A row of a vectorised pass would keep those of all tasks alive.
        can_hold = highest.device.type == "cpu" and fills_its_storage(highest)
        self._gradient = highest if can_hold else None

    def release(self) -> None:
        """Holds nothing."""
        self._gradient = None
