"""Calls the CUDA ops on the host with a tensor that promises one element more than was allocated.

Run by test_sanitizers.py; usage: overrun.py LIBRARY (sq_grad_sum | outputs)
The tensor's own storage says nothing of it, so the ops' checks let it pass.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from check_ops import Pair
from torch import Tensor

NUMEL = 1024


def one_element_short() -> Tensor:
    """[1, NUMEL] over an allocation of NUMEL - 1 elements."""
    allocated = torch.zeros(NUMEL - 1).numpy()
    return torch.from_numpy(np.lib.stride_tricks.as_strided(allocated, (1, NUMEL)))


def main() -> None:
    torch.ops.load_library(sys.argv[1])
    pair = Pair(1, [NUMEL], torch.float32)
    state, output = pair.states[0], torch.zeros(NUMEL)
    if sys.argv[2] == "outputs":
        output = one_element_short()[0]
    else:
        state["sq_grad_sum"] = one_element_short()
    grads = pair.grads(torch.float32, 0)
    plan = (pair.param_numels, pair.chunk_map, None)
    torch.ops.excessmtl_ext.fused_step_(grads, *plan, *state.values(), **pair.options)
    torch.ops.excessmtl_ext.combine_(
        grads, [output], *plan, state["task_weights"], state["found_nonfinite"], state["sq_grad_sum"],
        state["grad_mean"], gradient_momentum=0.0, accumulate=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
