"""Comparisons that several tests share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from excessmtl_ext.functional import StepState


def assert_states_close(
    actual: StepState, expected: StepState, *, rtol: float, atol: float
) -> None:
    """Every tensor of the state; counts and flags exactly."""
    for name, left, right in zip(StepState._fields, actual, expected, strict=True):
        exact = not left.is_floating_point()
        torch.testing.assert_close(
            left.cpu() if exact else left.double().cpu(),
            right.cpu() if exact else right.double().cpu(),
            rtol=0 if exact else rtol,
            atol=0 if exact else atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_equal_bits(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> None:
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        if a is None or b is None:
            assert a is b, f"tensor {index}: one is None"
            continue
        assert a.dtype == b.dtype
        assert a.shape == b.shape, f"tensor {index}: {a.shape} against {b.shape}"
        same = (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b
        assert bool(same.all()), f"tensor {index} differs in {int((~same).sum())} elements"


@contextmanager
def never_waiting_for_the_gpu() -> Iterator[None]:
    """A read, or a copy that the host waits for, raises RuntimeError inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
