"""Methods of fixed or loss-based weights whose gradients are brought to one size per tensor before they are summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _inputs import make_problem

from excessmtl_ext import (
    FAMO,
    Balancer,
    DynamicWeightAverage,
    ExcessMTL,
    FixedWeights,
    GroupDRO,
    SmoothTchebycheff,
    UncertaintyWeights,
    Uniform,
)

SIZED: dict[str, Callable[..., Balancer]] = {
    "uniform": Uniform,
    "fixed": lambda p=None, **o: FixedWeights(p, weights=range(1, 1 + o["num_tasks"]), **o),
    "groupdro": lambda p=None, **o: GroupDRO(p, robust_step_size=0.1, **o),
    "uncertainty": UncertaintyWeights,
    "dwa": DynamicWeightAverage,
    "famo": FAMO,
    "stch": SmoothTchebycheff,
}
every_method = pytest.mark.parametrize("make", SIZED.values(), ids=SIZED.keys())


def sized(make: Callable[..., Balancer], parameters: Any = None, num_tasks: int = 2) -> Any:
    return make(parameters, num_tasks=num_tasks, combine="per_tensor")


def step(balancer: Any, weight: torch.Tensor, rows: list[Any]) -> torch.Tensor:
    """The gradient of a step in which task i's gradient is rows[i]; losses are 1, or None for an absent task."""
    weight.grad = None
    here = weight - weight.detach()  # 0, so that the losses are 1 to the bit
    losses = [None if row is None else 1.0 + (here * torch.tensor(row)).sum() for row in rows]
    balancer.backward(losses)
    assert weight.grad is not None
    return weight.grad.clone()


def test_gradients_get_the_size_of_the_largest() -> None:
    weight = torch.ones(2, requires_grad=True)
    # Mean squares 8 and 2, weights 1/2: (4, 0) / 2 and (0, 2) * sqrt(4) / 2.
    grad = step(sized(Uniform, [weight]), weight, [[4.0, 0.0], [0.0, 2.0]])
    assert grad.tolist() == [2.0, 2.0]
    grad = step(
        FixedWeights([weight], num_tasks=2, weights=[1, 3], combine="per_tensor"),
        weight,
        [[4.0, 0.0], [0.0, 2.0]],
    )
    assert grad.tolist() == [1.0, 3.0]


def test_sizes_are_running_means_of_each_tensor() -> None:
    weight = torch.ones(1, requires_grad=True)
    balancer = sized(Uniform, [weight])
    step(balancer, weight, [[2.0], [1.0]])
    # Mean squares (4 + 16) / 2 = 10 and (1 + 1) / 2 = 1.
    grad = step(balancer, weight, [[4.0], [-1.0]])
    assert balancer.tensor_mean_square.tolist() == [[10.0], [1.0]]
    assert grad.item() == pytest.approx((4.0 - 10.0**0.5) / 2)


@every_method
@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_unit_of_a_task_decides_nothing_but_the_size_of_the_sum(
    make: Any, factor: float
) -> None:
    weight = torch.ones(2, requires_grad=True)
    plain = step(sized(make, [weight]), weight, [[4.0, 0.0], [0.0, 2.0]])
    other = step(sized(make, [weight]), weight, [[4.0, 0.0], [0.0, 2.0 * factor]])
    torch.testing.assert_close(other / other.norm(), plain / plain.norm())


def test_the_sum_is_that_of_excessmtl_with_equal_weights() -> None:
    ours, theirs = make_problem(), make_problem()
    balancer = sized(Uniform, ours.encoder.parameters(), 3)
    reference = ExcessMTL(theirs.encoder.parameters(), num_tasks=3, max_log_ratio=0.0)
    for _ in range(4):
        for problem, each in ((ours, balancer), (theirs, reference)):
            problem.zero_grad()
            each.backward(problem.losses())
        pairs = list(zip(ours.encoder.parameters(), theirs.encoder.parameters(), strict=True))
        for mine, other in pairs:
            torch.testing.assert_close(mine.grad, other.grad)
            with torch.no_grad():
                for each in (mine, other):
                    each -= 0.05 * other.grad
    assert balancer.state_dict()["num_steps"] == 4


@every_method
def test_an_absent_task_and_a_zero_gradient_leave_their_size_alone(make: Any) -> None:
    weight = torch.ones(2, requires_grad=True)
    balancer = sized(make, [weight])
    step(balancer, weight, [[4.0, 0.0], [0.0, 2.0]])
    for row in (None, [0.0, 0.0]):
        step(balancer, weight, [[4.0, 0.0], row])
    assert balancer.tensor_mean_square[:, 0].tolist() == [8.0, 2.0]
    assert balancer.num_tensor_steps[:, 0].tolist() == [3, 1]
    assert int(balancer.num_steps) == 3


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("is_streamed", [False, True], ids=["backward", "streamed"])
def test_a_gradient_that_is_not_finite_costs_one_step(
    make: Any, value: float, is_streamed: bool
) -> None:
    weight = torch.ones(2, requires_grad=True)
    balancer = sized(make, [weight])
    step(balancer, weight, [[4.0, 0.0], [0.0, 2.0]])
    before = {name: tensor.clone() for name, tensor in balancer.state_dict().items()}
    losses = [(weight * 3.0).sum(), weight[0] * 1.0]
    weight.register_hook(lambda grad: grad * torch.tensor([1.0, value]) if grad[1] == 0 else grad)
    weight.grad = None
    if is_streamed:
        for task, loss in enumerate(losses):
            balancer.accumulate(task, loss)
        balancer.finish()
    else:
        balancer.backward(losses)
    assert weight.grad is not None and bool(weight.grad.isnan().all())
    assert balancer.found_nonfinite.tolist() == [False, True]
    after = balancer.state_dict()
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    # A stream has taken the other task's size in by then; the extra state counts the call.
    assert changed - {"_extra_state"} <= {"num_skipped_steps", "found_nonfinite"} | (
        {"tensor_mean_square", "num_tensor_steps"} if is_streamed else set()
    )
    assert torch.equal(after["tensor_mean_square"][1], before["tensor_mean_square"][1])


def test_gradients_beyond_the_squares_of_float32_are_finite() -> None:
    weight = torch.ones(2, requires_grad=True)
    balancer = sized(Uniform, [weight])
    grad = step(balancer, weight, [[4e25, 0.0], [0.0, 2e-10]])
    assert not bool(balancer.found_nonfinite.any())
    torch.testing.assert_close(grad, torch.tensor([2e25, 2e25]))


@every_method
def test_a_run_resumes_to_the_bit(make: Any) -> None:
    def run(problem: Any, balancer: Any, steps: int) -> None:
        for _ in range(steps):
            problem.zero_grad()
            balancer.backward(problem.losses())
            balancer.end_epoch()
            with torch.no_grad():
                for parameter in problem.parameters():
                    parameter -= 0.05 * parameter.grad

    whole, broken = make_problem(), make_problem()
    one = sized(make, whole.encoder.parameters(), 3)
    run(whole, one, 5)
    first = sized(make, broken.encoder.parameters(), 3)
    run(broken, first, 3)
    second = sized(make, broken.encoder.parameters(), 3)
    second.load_state_dict(first.state_dict())
    run(broken, second, 2)
    for name, tensor in one.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    assert all(map(torch.equal, broken.parameters(), whole.parameters()))


def test_the_state_of_a_plain_sum_is_refused_by_name() -> None:
    weight = torch.ones(2, requires_grad=True)
    plain = Uniform([weight], num_tasks=2)
    with pytest.raises(RuntimeError, match="tensor_mean_square"):
        sized(Uniform, [weight]).load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="tensor_mean_square"):
        plain.load_state_dict(sized(Uniform, [weight]).state_dict())


@every_method
@pytest.mark.parametrize("is_streamed", [False, True], ids=["backward", "streamed"])
def test_a_loss_of_nan_without_a_gradient_is_that_of_an_absent_task(
    make: Any, is_streamed: bool
) -> None:
    weight = torch.ones(2, requires_grad=True)
    balancer, other = sized(make, [weight]), sized(make, [weight])
    for each in (balancer, other):
        step(each, weight, [[4.0, 0.0], [0.0, 2.0]])
    expected = step(other, weight, [[4.0, 0.0], None])
    weight.grad = None
    empty = torch.nn.functional.cross_entropy(
        weight.repeat(3, 1), torch.full((3,), -100), reduction="mean"
    )
    loss = 1.0 + ((weight - weight.detach()) * torch.tensor([4.0, 0.0])).sum()
    if is_streamed:
        balancer.accumulate(0, loss)
        balancer.accumulate(1, empty)
        balancer.finish()
    else:
        balancer.backward([loss, empty])
    torch.testing.assert_close(weight.grad, expected)
    assert int(balancer.num_skipped_steps) == 0
    torch.testing.assert_close(balancer.task_weights, other.task_weights)
    assert torch.equal(balancer.tensor_mean_square, other.tensor_mean_square)


def test_held_weights_apply_the_sizes_so_far() -> None:
    weight = torch.ones(2, requires_grad=True)
    balancer = sized(Uniform, [weight])
    step(balancer, weight, [[4.0, 0.0], [0.0, 2.0]])
    with balancer.hold_weights():
        grad = step(balancer, weight, [[4.0, 0.0], [0.0, 2.0]])
    assert grad.tolist() == [2.0, 2.0]
    assert balancer.num_tensor_steps[:, 0].tolist() == [1, 1]


def test_sizes_come_with_given_gradients_where_no_parameters_are_known() -> None:
    balancer = sized(GroupDRO)
    assert balancer.tensor_mean_square.shape == (2, 0)
    grads = [[torch.tensor([4.0, 0.0])], [torch.tensor([0.0, 2.0])]]
    balancer.update_weights(grads, losses=[1.0, 1.0])
    assert balancer.tensor_mean_square.tolist() == [[8.0], [2.0]]
    other = sized(GroupDRO)
    other.load_state_dict(balancer.state_dict())
    assert other.tensor_mean_square.tolist() == [[8.0], [2.0]]


def test_an_unknown_combination_is_refused() -> None:
    with pytest.raises(ValueError, match="combine"):
        Uniform(num_tasks=2, combine="per_layer")  # type: ignore[arg-type]


def test_options_rebuild_the_balancer() -> None:
    balancer = FixedWeights(num_tasks=2, weights=[1, 3], combine="per_tensor", batched="auto")
    assert eval(repr(balancer)).options() == balancer.options()
    assert "combine='per_tensor'" in repr(balancer) and "batched='auto'" in repr(balancer)
