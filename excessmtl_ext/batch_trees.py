"""Batches: tensors, None and constants in lists, tuples and dicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def kind_of(value: Any, tensors: list[Tensor]) -> Any:
    """Describes all of a batch but the numbers in its tensors, which are added to ``tensors``."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return Tensor, tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, Mapping):
        return dict, tuple((name, kind_of(each, tensors)) for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(kind_of(each, tensors) for each in value)
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"Expected a batch of tensors and constants in lists, tuples or dicts, but got {type(value).__name__}."
        ) from None
    return type(value), value


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns ``value`` with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: mapped(each, change) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [mapped(each, change) for each in value]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*parts)
        return type(value)(parts)
    return value
