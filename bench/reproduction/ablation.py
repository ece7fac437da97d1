"""What each part of ExcessMTL's default is worth alone: methods for ``excessmtl benchmark``.

    excessmtl benchmark --methods uniform,excessmtl-recommended,bench/reproduction/ablation.py --output DIR

Uniform has neither part. The default is ``excessmtl-recommended``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from excessmtl_ext import Balancer, ExcessMTL
from excessmtl_ext.training.benchmark.methods import Method


def _with(**changes: Any) -> Callable[..., Balancer]:
    return lambda shared, **options: ExcessMTL(shared, **changes, **options)


METHODS = [
    Method("sizes-only", "One size per tensor, equal weights", _with(max_log_ratio=0.0)),
    Method("weights-only", "Bounded weights, plain sum", _with(combine="sum")),
    Method("wider", "Both, weights within a factor of 4", _with(max_log_ratio=1.4)),
    Method(
        "mirror",
        "Mirror steps of Eq. 9 on the same estimate, plain sum",
        _with(robust_step_size=3.0, combine="sum"),
    ),
]
