"""Every method of the registry builds, under one convention."""

from __future__ import annotations

import pytest
import torch

from excessmtl_ext import ExcessMTL
from excessmtl_ext.training import METHODS, make_balancer


def parameters() -> list[torch.Tensor]:
    return [torch.zeros(3, requires_grad=True)]


TASKS = ("a", "b", "c")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_follows_one_convention(method: str) -> None:
    requires_task = METHODS[method].requires_task
    balancer = make_balancer(
        method,
        parameters(),
        num_tasks=3,
        task="b" if requires_task else None,
        task_names=TASKS,
    )
    assert balancer.head_weighting == "none"
    assert balancer.weight_scale == "simplex"
    uniform = [1 / 3] * 3
    assert balancer.task_weights.tolist() == pytest.approx([0, 1, 0] if requires_task else uniform)


def test_fixed_weights_are_an_option() -> None:
    balancer = make_balancer("fixed", parameters(), num_tasks=2, options={"weights": [1, 3]})
    assert balancer.task_weights.tolist() == [0.25, 0.75]


def test_no_two_methods_look_alike() -> None:
    assert len({method.colour for method in METHODS.values()}) == len(METHODS)
    assert len({method.label for method in METHODS.values()}) == len(METHODS)


def test_excessmtl_alone_means_its_defaults() -> None:
    balancer = make_balancer("excessmtl", parameters(), num_tasks=2)
    assert repr(balancer) == repr(ExcessMTL(parameters(), num_tasks=2))


def test_recommended_is_the_preset() -> None:
    balancer = make_balancer("excessmtl-recommended", parameters(), num_tasks=2)
    assert repr(balancer) == repr(ExcessMTL.from_preset("recommended", parameters(), num_tasks=2))


def test_step_size_reaches_the_balancer() -> None:
    balancer = make_balancer("groupdro", parameters(), num_tasks=2, robust_step_size=0.5)
    assert "robust_step_size=0.5" in repr(balancer)


def test_a_step_size_that_nothing_uses_is_an_error() -> None:
    with pytest.raises(ValueError, match="Expected no `robust_step_size` with method 'uniform'"):
        make_balancer("uniform", parameters(), num_tasks=2, robust_step_size=0.5)


def test_options_override_those_of_the_method() -> None:
    balancer = make_balancer(
        "excessmtl-recommended", parameters(), num_tasks=2, options={"gradient_momentum": 0.5}
    )
    assert "gradient_momentum=0.5" in repr(balancer)
    assert "fisher='linear'" in repr(balancer)


def test_an_option_that_the_method_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Expected `method_options` that 'uniform' has.*momentum"):
        make_balancer("uniform", parameters(), num_tasks=2, options={"momentum": 0.5})


def test_a_task_that_nothing_uses_is_an_error() -> None:
    with pytest.raises(ValueError, match="Expected no `task` with method 'uniform'"):
        make_balancer("uniform", parameters(), num_tasks=2, task="a", task_names=("a", "b"))


@pytest.mark.parametrize("task", [None, "d"])
def test_one_task_alone_has_to_be_one_of_the_tasks(task: str | None) -> None:
    with pytest.raises(ValueError, match=rf"`task` to be one of a, b, c .*but got {task!r}"):
        make_balancer("single-task", parameters(), num_tasks=3, task=task, task_names=TASKS)


def test_an_unknown_method_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Expected `method` to be one of excessmtl, .*'adam'"):
        make_balancer("adam", parameters(), num_tasks=2)
