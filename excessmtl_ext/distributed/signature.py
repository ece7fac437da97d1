"""What must be equal on all ranks before a step, as two numbers that travel with the first exchange."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from excessmtl_ext.distributed.dtensors import is_dtensor
from excessmtl_ext.distributed.partition import Partition
from excessmtl_ext.step import FisherRule

UNKNOWN = -1.0
"""Instead of :func:`checksum`, where it was compared before."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def signature(parallel: Partition, rule: FisherRule) -> float:
    """Returns a hash of the options, the order of named tasks, and sizes and types of parameters and heads."""
    built = (rule, rule.task_names, parallel.layout, parallel.description)
    return float(zlib.crc32(repr(built).encode()))


def checksum(parallel: Partition, rule: FisherRule) -> float:
    """Returns a hash of the values of the shared parameters and of the weights; waits for the device.

    DTensors are left out: every rank has another part.
    """
    state = rule.step_state
    values = [state.log_task_weights, state.num_task_steps, state.baseline_excess_risk]
    values += [parameter for parameter in parallel.shared if not is_dtensor(parameter)]
    return float(zlib.crc32(repr(_bit_sums(values)).encode()))


def _bit_sums(tensors: Iterable[Tensor]) -> list[int]:
    """Sums each tensor's elements' bits as integers: exact in any order, and equal for equal tensors."""
    with torch.no_grad():
        sums = [
            tensor.detach()
            .contiguous()
            .view(_INTEGERS[tensor.element_size()])
            .sum(dtype=torch.int64)
            for tensor in tensors
        ]
    return torch.stack(sums).tolist() if sums else []
