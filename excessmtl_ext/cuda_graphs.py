"""Warm-up and capture of a CUDA graph: what a graphed step needs of ``torch.cuda``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

Replay: TypeAlias = Callable[[], None]
"""Computes once more what was captured, in the same memory."""


class CudaGraphs:
    """What a step needs of torch.cuda, on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """Runs on a side stream, where a capture will run too."""
        current, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            outputs = run()
        current.wait_stream(side)
        return outputs

    def capture(self, run: Callable[[], Any]) -> tuple[Replay, Any]:
        """Records ``run``, which computes nothing yet; returns what computes it, and its outputs."""
        graph = torch.cuda.CUDAGraph()
        # A loader's thread may pin memory meanwhile, which a capture of all threads forbids.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = run()
        return graph.replay, outputs


def graphs_for(device: torch.device) -> CudaGraphs | None:
    """Returns what captures on ``device``; None where steps are not captured."""
    return CudaGraphs(device) if device.type == "cuda" else None
