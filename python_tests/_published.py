"""ExcessMTL in the published setting, for tests of Eq. 9 and of the estimate without momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from excessmtl_ext import ExcessMTL

PUBLISHED: dict[str, Any] = {
    "robust_step_size": 0.01,
    "combine": "sum",
    "fisher": "sqrt",
    "eps": 1e-7,
    "gradient_momentum": 0.0,
}
"""The authors' estimate, baseline and step, with weights on the simplex and heads that are not weighted."""


def published(parameters: Iterable[Tensor] | None = None, **options: Any) -> ExcessMTL:
    """ExcessMTL with ``PUBLISHED``, overridden by ``options``."""
    return ExcessMTL(parameters, **{**PUBLISHED, **options})
