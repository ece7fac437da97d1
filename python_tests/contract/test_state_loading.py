"""A state is loaded whole or not at all: not damaged, not by half, and not into a balancer of other options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _asserts import assert_equal_bits
from torch import Tensor, nn

from excessmtl_ext import Balancer, ExcessMTL, GroupDRO, SingleTask

NUM_TASKS = 2


def given(seed: int) -> Tensor:
    return torch.randn(NUM_TASKS, 5, generator=torch.Generator().manual_seed(seed))


def stepped(num_steps: int, **options: Any) -> ExcessMTL:
    balancer = ExcessMTL(num_tasks=NUM_TASKS, **options)
    for seed in range(num_steps):
        balancer.update_weights(given(seed))
    return balancer


def set_to(name: str, value: float) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        state[name].view(-1)[-1] = value

    return change


def cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({name: state[name].to(dtype)})


INFINITE, NAN = float("inf"), float("nan")
DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "infinite_log_weight": (set_to("log_task_weights", -INFINITE), "`log_task_weights` without inf"),
    "infinite_weight": (set_to("task_weights", INFINITE), "`task_weights` without inf"),
    "nan_weight": (set_to("task_weights", NAN), "`task_weights` without NaN"),
    "infinite_sum": (set_to("sq_grad_sum", INFINITE), "`sq_grad_sum` without inf"),
    "nan_mean": (set_to("grad_mean", NAN), "`grad_mean` without NaN"),
    "negative_sum": (set_to("sq_grad_sum", -1.0), "`sq_grad_sum` >= 0, but got -1"),
    "negative_risk": (set_to("baseline_excess_risk", -2.0), "`baseline_excess_risk` >= 0"),
    "negative_weight": (set_to("task_weights", -0.5), "`task_weights` >= 0, but got -0.5"),
    "more_than_all": (set_to("task_weights", 1.5), "`task_weights` that sum to 1, but got"),
    "count_as_bool": (cast("num_steps", torch.bool), "`num_steps` as torch.int64, but got torch.bool"),
    "negative_share": (set_to("risk_share_sum", -2.0), "`risk_share_sum` >= 0"),
    "negative_count": (set_to("num_steps", -3), "`num_steps` >= 0, but got -3"),
    "negative_counts": (set_to("num_task_steps", -3), "`num_task_steps` >= 0"),
    "weights_as_integers": (cast("log_task_weights", torch.int64), "`log_task_weights` as torch.fl"),
    "sum_as_bool": (cast("sq_grad_sum", torch.bool), "`sq_grad_sum` as torch.float32, but got"),
    "sum_as_complex": (cast("sq_grad_sum", torch.complex64), "`sq_grad_sum` as torch.float32"),
    "nan_count": (
        lambda state: state.update(num_steps=torch.tensor(NAN)), "`num_steps` without NaN",
    ),
    "text": (lambda state: state.update(num_steps="many"), "`num_steps` to be a tensor, but got str"),
    "no_data": (
        lambda state: state.update(task_weights=state["task_weights"].to("meta")), "no data",
    ),
    "another_shape": (
        lambda state: state.update(task_weights=torch.ones(3).double()), r"shape \[2\], but got \[3\]",
    ),
    "half": (lambda state: state.pop("task_weights"), "without `task_weights`"),
    "another_half": (lambda state: state.pop("_extra_state"), "without `_extra_state`"),
    "only_one": (lambda state: [state.pop(key) for key in list(state)[1:]], "Expected a whole state"),
    "one_more": (lambda state: state.update(x=torch.ones(1)), r"unknown entries \[x\]"),
    "cut_off": (
        lambda state: state.update(_extra_state=state["_extra_state"][:-1]), "`_extra_state`",
    ),
    "empty": (lambda state: state.update(_extra_state=torch.zeros(0)), "`_extra_state`"),
    "nan_inside": (set_to("_extra_state", NAN), "`_extra_state` of finite numbers"),
    "other_class": (
        lambda state: state.update(_extra_state=GroupDRO(num_tasks=2).get_extra_state()),
        "balancer of another class",
    ),
    "newer": (lambda state: state["_extra_state"].__setitem__(0, 3.0), "version 2 or older, but got"),
}  # fmt: skip


def changed(name: str, saved: dict[str, Any]) -> tuple[dict[str, Any], str]:
    change, message = DAMAGE[name]
    state = {key: value.clone() for key, value in saved.items()}
    change(state)
    return state, message


@pytest.mark.parametrize("is_part", [False, True], ids=["alone", "in_a_module"])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_state_is_refused_and_nothing_is_taken_over(name: str, is_part: bool) -> None:
    balancer = stepped(4)
    state, message = changed(name, stepped(3).state_dict())
    before = {key: value.clone() for key, value in balancer.state_tensors().items()}
    host = balancer.host_state()
    module: nn.Module = balancer
    if is_part:
        if name == "one_more":
            pytest.skip("what else a larger module holds is not the balancer's to know")
        module = nn.ModuleDict({"balancer": balancer})
        state = {f"balancer.{key}": value for key, value in state.items()}
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)
    after = balancer.state_tensors()
    assert after.keys() == before.keys()
    assert_equal_bits(list(after.values()), list(before.values()))
    assert balancer.host_state() == host
    twin = stepped(4)
    assert_equal_bits([balancer.update_weights(given(9))], [twin.update_weights(given(9))])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ({"num_calls": "many"}, "'many'"),
        ({"num_calls": -1}, "-1"),
        ({"param_numels": "all"}, "'all'"),
        ({"param_numels": [1.5]}, "1.5"),
        ({"waiting_tasks": [None]}, "None"),
        ({"version": "new"}, "'new'"),
    ],
)
def test_damage_in_the_first_format_is_refused(damage: dict[str, Any], told: str) -> None:
    balancer = stepped(4)
    extra = {"version": 1, "num_calls": 3, "param_numels": [5], **damage}
    before = balancer.state_dict()
    with pytest.raises(RuntimeError, match=rf"`_extra_state` of a balancer, but got .*{told}"):
        balancer.load_state_dict({**stepped(3).state_dict(), "_extra_state": extra})
    assert_equal_bits(list(balancer.state_dict().values()), list(before.values()))


def test_no_state_at_all_is_an_error_only_if_strict() -> None:
    balancer = stepped(2)
    before = balancer.state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        balancer.load_state_dict({})
    assert balancer.load_state_dict({}, strict=False).missing_keys
    assert_equal_bits(list(balancer.state_dict().values()), list(before.values()))


# ---- options

EQUATION_9: dict[str, Any] = {"robust_step_size": 0.01}


@pytest.mark.parametrize(
    ("saved", "own", "told"),
    [
        ({}, EQUATION_9, "`robust_step_size` was None and is 0.01 here"),
        (EQUATION_9, {}, "`robust_step_size` was 0.01 and is None here"),
        (EQUATION_9, {**EQUATION_9, "fisher": "sqrt"}, "`fisher` was 'linear' and is 'sqrt' here"),
        ({}, {"eps": 1e-7}, "`eps` was 1.17549e-38 and is 1e-07"),
        ({}, {"gradient_momentum": 0.9}, "`gradient_momentum` was 0.98 and is 0.9 here"),
        (EQUATION_9, {**EQUATION_9, "relative": False}, "`relative` was True and is False here"),
        ({}, {"weight_scale": "num_tasks"}, "`weight_scale` was 'simplex' and is 'num_tasks'"),
    ],
)
def test_a_state_that_means_something_else_under_these_options_is_refused(
    saved: dict[str, Any], own: dict[str, Any], told: str
) -> None:
    balancer = stepped(2, **own)
    before = balancer.state_dict()
    with pytest.raises(RuntimeError, match=f"Expected a state of the same options, but {told}"):
        balancer.load_state_dict(stepped(3, **saved).state_dict())
    assert_equal_bits(list(balancer.state_dict().values()), list(before.values()))


@pytest.mark.parametrize(
    ("saved", "own", "told"),
    [
        (EQUATION_9, {"robust_step_size": 0.1}, "`robust_step_size` was 0.01 and is 0.1 here"),
        ({}, {"max_log_ratio": 1.0}, "`max_log_ratio` was 0.2 and is 1.0 here"),
        ({}, {"update_every": 2}, "`update_every` was 1 and is 2 here"),
        ({}, {"min_weight": 0.1}, "`min_weight` was 0 and is 0.1 here"),
        ({}, {"priorities": (1.0, 2.0)}, r"`priorities` was None and is \(1.0, 2.0\) here"),
        ({"combine": "sum"}, {}, "`combine` was 'sum' and is None here"),
        (
            {},
            {"head_weighting": "task_weights"},
            "`head_weighting` was 'none' and is 'task_weights'",
        ),
    ],
)
def test_options_that_say_how_to_go_on_may_differ_and_are_told(
    saved: dict[str, Any], own: dict[str, Any], told: str
) -> None:
    balancer, other = stepped(0, **own), stepped(3, **saved)
    with pytest.warns(UserWarning, match=told):
        balancer.load_state_dict(other.state_dict())
    assert_equal_bits([balancer.sq_grad_sum], [other.sq_grad_sum])


def test_options_that_change_no_number_may_differ() -> None:
    other = stepped(3)
    for own in ({"nonfinite": "raise"}, {"state_dtype": torch.bfloat16}):
        balancer = stepped(0, **own)
        balancer.load_state_dict(other.state_dict())
        assert int(balancer.num_steps) == 3


def test_other_tasks_of_single_task_are_refused() -> None:
    balancer = SingleTask(num_tasks=2, task=0)
    with pytest.raises(RuntimeError, match="`task` was 1 and is 0 here"):
        balancer.load_state_dict(SingleTask(num_tasks=2, task=1).state_dict())


# ---- parameters that are frozen


def networks(is_frozen: bool) -> tuple[nn.Sequential, nn.ModuleList]:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
    encoder[0].requires_grad_(not is_frozen)
    return encoder, nn.ModuleList(nn.Linear(4, 1) for _ in range(NUM_TASKS))


def losses_of(encoder: nn.Module, heads: nn.ModuleList, seed: int) -> list[Tensor]:
    inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed))
    return [(head(encoder(inputs)) - 1).square().mean() for head in heads]


def run(balancer: Balancer, encoder: nn.Module, heads: nn.ModuleList, seeds: range) -> None:
    for seed in seeds:
        for parameter in (*encoder.parameters(), *heads.parameters()):
            parameter.grad = None
        balancer.backward(losses_of(encoder, heads, seed))


def test_a_state_saved_with_the_frozen_parameters_loads_into_one_without() -> None:
    """As of a release that kept state for what it was given: those parts were zero."""
    encoder, heads = networks(is_frozen=False)
    whole = ExcessMTL(encoder.parameters(), num_tasks=NUM_TASKS)
    encoder[0].requires_grad_(False)
    run(whole, encoder, heads, range(3))
    assert whole.tensor_mean_square.shape == (NUM_TASKS, 4)
    part = ExcessMTL(encoder.parameters(), num_tasks=NUM_TASKS)
    part.load_state_dict(whole.state_dict())
    assert part.tensor_mean_square.shape == (NUM_TASKS, 2)
    grads = []
    for balancer in (whole, part):
        run(balancer, encoder, heads, range(3, 6))
        grads += [[each.grad for each in encoder[2].parameters()]]
    assert_equal_bits(grads[0], grads[1])
    torch.testing.assert_close(part.task_weights, whole.task_weights, rtol=1e-12, atol=0)
