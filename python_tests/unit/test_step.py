"""What ops and gradients say becomes the caller's exception."""

from __future__ import annotations

import pytest
import torch

from excessmtl_ext import Uniform
from excessmtl_ext.step import Step, has_floor, raise_argument_error, raise_if_nonfinite


def test_an_op_that_names_an_argument_is_a_value_error_without_the_place_in_the_source() -> None:
    said = RuntimeError("csrc/checks.h:12 Expected `eps` > 0, but got -1.\nC++ frames")
    with pytest.raises(ValueError, match=r"^Expected `eps` > 0, but got -1\.$"):
        raise_argument_error(said)
    raise_argument_error(RuntimeError("CUDA error: out of memory"))


def test_tasks_with_gradients_that_are_not_finite_are_named_where_that_is_asked_for() -> None:
    balancer = Uniform(num_tasks=3, nonfinite="raise")
    raise_if_nonfinite(balancer)
    balancer.found_nonfinite[1] = True
    with pytest.raises(FloatingPointError, match=r"task\(s\) \[1\] are not finite"):
        raise_if_nonfinite(balancer)
    balancer.nonfinite = "skip"
    raise_if_nonfinite(balancer)


@pytest.mark.parametrize(
    ("floor", "expected"), [(0.0, False), (0.1, True), ((0.0, 0.0), False), ((0.0, 0.2), True)]
)
def test_a_floor_is_a_number_or_one_per_task(floor: object, expected: bool) -> None:
    balancer = Uniform(num_tasks=2)
    balancer.min_weight = floor  # type: ignore[assignment]
    assert has_floor(balancer) is expected


def test_losses_take_the_type_of_what_they_are_compared_with() -> None:
    step = Step(roots=[], tasks=[0], shared=[], losses=torch.ones(1))
    assert step.losses_like(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
