"""Stands in for CUDA graphs on the CPU: records the operations of a step, and replays them on the same tensors.

As with a graph, a capture computes nothing, Python's decisions are frozen in it, a replay writes the tensors that the
capture made, and a value that Python reads during a capture is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_READS_A_VALUE = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS_A_VALUE:
            raise RuntimeError("operation not permitted when stream is capturing.")
        outputs = func(*args, **(kwargs or {}))
        self.calls.append((func, *_detached((args, kwargs or {})), _detached(outputs)))
        return outputs


def _detached(value: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, value)


class RecordedGraphs:
    """Takes the place of :class:`excessmtl_ext.cuda_graphs.CudaGraphs`.

    Args:
        tensors: Gives what a step may change; a capture puts it back.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        self._tensors = tensors
        self.num_captures = self.num_replays = 0

    def warm_up(self, run: Callable[[], Any]) -> Any:
        return run()

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        before = [(tensor.detach(), tensor.detach().clone()) for tensor in self._tensors()]
        recorder = _Recorder()
        try:
            with recorder:
                outputs = run()
        finally:
            for tensor, value in before:
                tensor.copy_(value)
        self.num_captures += 1

        def replay() -> None:
            self.num_replays += 1
            with torch.no_grad():
                for func, args, kwargs, recorded in recorder.calls:
                    made = func(*args, **kwargs)
                    for old, new in zip(tree_leaves(recorded), tree_leaves(made), strict=True):
                        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                            old.copy_(new)

        return replay, outputs
