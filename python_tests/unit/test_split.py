"""A balanced step inside the user's own backward pass: ``split``, ``TaskSplit`` and the adapters behind them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _asserts import assert_equal_bits
from _inputs import Problem, make_problem
from _published import published
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from excessmtl_ext import ExcessMTL, TaskSplit
from excessmtl_ext.passes import adapters

BY_HAND: dict[str, Any] = {"robust_step_size": 1.0, "fisher": "linear", "eps": 1e-30}


def change_batch(problem: Problem, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    problem.inputs = torch.randn(problem.inputs.shape, generator=generator)
    problem.targets = torch.randn(problem.targets.shape, generator=generator) * torch.arange(1, 4)


def losses_of(problem: Problem, copies: Any) -> list[Tensor]:
    return [
        ((head(z)[:, 0] - problem.targets[:, task]) ** 2).mean()
        for task, (head, z) in enumerate(zip(problem.heads, copies, strict=True))
    ]


def split_losses(problem: Problem, balancer: ExcessMTL, **options: Any) -> list[Tensor]:
    return losses_of(problem, balancer.split(problem.encoder(problem.inputs), **options))


def split_step(problem: Problem, balancer: ExcessMTL, absent: tuple[int, ...] = ()) -> None:
    problem.zero_grad()
    losses = split_losses(problem, balancer)
    sum(loss for task, loss in enumerate(losses) if task not in absent).backward()  # type: ignore[union-attr]


def feature_step(problem: Problem, balancer: ExcessMTL, absent: tuple[int, ...] = ()) -> None:
    problem.zero_grad()
    z = problem.encoder(problem.inputs)
    losses: list[Tensor | None] = list(losses_of(problem, [z] * 3))
    for task in absent:
        losses[task] = None
    balancer.backward(losses, features=z)


def state_of(balancer: ExcessMTL) -> list[Tensor]:
    return [tensor.clone() for tensor in balancer.state_tensors().values()]


def weights_step(problem: Problem) -> tuple[ExcessMTL, list[Tensor]]:
    balancer = ExcessMTL(num_tasks=3)
    split_step(problem, balancer)
    return balancer, state_of(balancer)


# ---- the step


def test_one_step_follows_the_equations_by_hand():
    """z = 2; the losses are 3 z and z, then 4 z and z: gradients of A are 6 and 2, then 8 and 2."""
    balancer = published(num_tasks=2, **BY_HAND)
    parameter = nn.Parameter(torch.ones(1, 1))
    for factor in (3.0, 4.0):
        parameter.grad = None
        z_a, z_b = balancer.split(2 * parameter)
        (factor * z_a + z_b).sum().backward()
    expected = torch.tensor([64 / 100, 4 / 8], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(balancer.task_weights, expected, rtol=1e-6, atol=0)
    assert parameter.grad is not None
    assert parameter.grad.item() == pytest.approx(
        2 * float(expected @ torch.tensor([4.0, 1.0]).double())
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feature_adapter": "low_rank"},
        {"feature_adapter": "diagonal"},
        {"update_every": 2, "num_warmup_steps": 2},
        {"robust_step_size": 1.0, "combine": "sum"},
        {"state_dtype": torch.bfloat16},
        {"priorities": [1.0, 2.0, 3.0], "min_weight": 0.05},
    ],
    ids=str,
)
def test_the_step_is_that_of_the_features(options: dict[str, Any]):
    """Absent tasks, the weights, all state and every gradient."""
    problems = make_problem(), make_problem()
    parameters = list(problems[0].encoder.parameters())
    features = ExcessMTL(parameters, num_tasks=3, estimate_from="features", **options)
    balancer = ExcessMTL(num_tasks=3, **options)
    for number in range(6):
        absent = (1,) if number == 3 else ()
        for problem, take_step, each in (
            (problems[0], feature_step, features),
            (problems[1], split_step, balancer),
        ):
            change_batch(problem, number)
            take_step(problem, each, absent)
        torch.testing.assert_close(problems[1].grads(), problems[0].grads())
    assert balancer.num_calls == 6
    for name, tensor in features.state_tensors().items():
        torch.testing.assert_close(balancer.state_tensors()[name], tensor, msg=name)


def test_heads_get_the_gradient_of_their_own_loss():
    problem, plain = make_problem(), make_problem()
    split_step(problem, ExcessMTL(num_tasks=3))
    sum(plain.losses()).backward()  # type: ignore[union-attr]
    for mine, other in zip(problem.heads.parameters(), plain.heads.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_equal_weights_are_the_mean_of_the_losses():
    """The setting that the guide names for comparisons."""
    problem, plain = make_problem(), make_problem()
    balancer = ExcessMTL(num_tasks=3, max_log_ratio=0, combine="sum")
    for number in range(3):
        change_batch(problem, number)
        change_batch(plain, number)
        split_step(problem, balancer)
    plain.zero_grad()
    (sum(plain.losses()) / 3).backward()  # type: ignore[operator]
    for mine, other in zip(problem.encoder.parameters(), plain.encoder.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_an_absent_task_is_not_counted():
    balancer = ExcessMTL(num_tasks=3)
    split_step(make_problem(), balancer, absent=(1,))
    assert balancer.num_task_steps.tolist() == [1, 0, 1]


@pytest.mark.parametrize("shape, dim", [((4, 5), 1), ((2, 5, 3, 2), 1), ((2, 3, 5), -1)])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_the_adapters_gradient_is_that_of_a_layer(kind: Any, shape: tuple[int, ...], dim: int):
    z, grad = torch.randn(shape).double(), torch.randn(shape).double()
    matrix = torch.eye(5).double().requires_grad_()
    gamma = torch.ones(5).double().requires_grad_()
    beta = torch.zeros(5).double().requires_grad_()
    rows = z.movedim(dim, -1)
    out = rows @ matrix.T if kind == "full" else gamma * rows + beta
    (out * grad.movedim(dim, -1)).sum().backward()
    expected = matrix.grad if kind == "full" else torch.stack([gamma.grad, beta.grad])  # type: ignore[list-item]
    found = adapters.adapter_grads(z, [None, grad], dim, kind)
    assert found[0] is None
    torch.testing.assert_close(found[1], expected)


def test_the_low_rank_adapters_gradient_is_that_of_a_layer():
    z, grad = torch.randn(6, 40).double(), torch.randn(6, 40).double()
    basis = adapters._directions(40, torch.float64, torch.device("cpu"))  # pyright: ignore[reportPrivateUsage]
    torch.testing.assert_close(basis.T @ basis, torch.eye(adapters.RANK).double())
    middle = torch.zeros(adapters.RANK, adapters.RANK).double().requires_grad_()
    ((z + z @ basis @ middle.T @ basis.T) * grad).sum().backward()
    torch.testing.assert_close(adapters.adapter_grads(z, [grad], 1, "low_rank")[0], middle.grad)
    assert adapters.adapter_numel("low_rank", 40) == adapters.adapter_numel("auto", 40) == 256


@pytest.mark.parametrize("channels", [8, 40])
def test_many_tasks_are_taken_at_once_to_the_same_numbers(channels: int):
    z, grads = torch.randn(6, channels), torch.randn(20, 6, channels).unbind()
    found = adapters.adapter_grads(z, [None, *grads], 1, "auto")
    assert found[0] is None
    for grad, together in zip(grads, found[1:], strict=True):
        torch.testing.assert_close(together, adapters.adapter_grads(z, [grad], 1, "auto")[0])


def test_several_features_give_tuples_and_one_adapter_each():
    balancer = ExcessMTL(num_tasks=2)
    first, second = nn.Linear(3, 4), nn.Conv2d(1, 6, 1)
    z = [first(torch.randn(5, 3)), second(torch.randn(5, 1, 2, 2))]
    (a, b), (c, d) = balancer.split(z)
    (a.square().sum() + b.square().sum() + 2 * d.square().sum() + 0 * c.sum()).backward()
    assert balancer.layout is not None
    assert balancer.layout.numels == (16, 36)
    assert first.weight.grad is not None
    assert second.weight.grad is not None


# ---- where nothing is to move


@pytest.mark.parametrize("how", ["no_grad", "eval", "frozen"])
def test_evaluation_is_the_identity_and_moves_nothing(how: str):
    problem = make_problem()
    balancer, before = weights_step(problem)
    z = problem.encoder(problem.inputs)
    if how == "eval":
        balancer.eval()
    with torch.set_grad_enabled(how != "no_grad"):
        copies = balancer.split(z.detach() if how == "frozen" else z)
    for each in copies:
        torch.testing.assert_close(each, z, rtol=0, atol=0)
    if how == "eval":
        problem.zero_grad()
        sum(losses_of(problem, copies)).backward()  # type: ignore[union-attr]
        plain = make_problem()
        sum(plain.losses()).backward()  # type: ignore[union-attr]
        torch.testing.assert_close(problem.grads(), plain.grads())
    assert_equal_bits(state_of(balancer), before)


def test_hold_weights_only_applies_them():
    problem = make_problem()
    balancer, _ = weights_step(problem)
    gradients = problem.grads()
    with balancer.hold_weights():
        problem.zero_grad()
        loss = sum(split_losses(problem, balancer))
        loss.backward(retain_graph=True)  # type: ignore[union-attr]
        problem.zero_grad()
        loss.backward()  # type: ignore[union-attr]
    assert balancer.num_calls == int(balancer.num_steps) == 1
    torch.testing.assert_close(problem.grads(), gradients)


def test_lbfgs_moves_the_weights_once_a_step():
    problem = make_problem()
    balancer = ExcessMTL(num_tasks=3)
    optimizer = torch.optim.LBFGS(
        [*problem.encoder.parameters(), *problem.heads.parameters()], max_iter=4
    )
    calls = []

    def closure() -> float:
        split_step(problem, balancer)
        calls.append(1)
        return 0.0

    for _ in range(2):
        closure()
        with balancer.hold_weights():
            optimizer.step(closure)
    assert len(calls) > 4
    assert int(balancer.num_steps) == 2


# ---- passes of several kinds


def test_a_second_pass_is_an_error_that_names_the_way_out():
    problem = make_problem()
    balancer = ExcessMTL(num_tasks=3)
    losses = split_losses(problem, balancer)
    losses[0].backward(retain_graph=True)
    before = state_of(balancer)
    with pytest.raises(RuntimeError, match=r"one backward pass .*hold_weights"):
        losses[1].backward()
    assert_equal_bits(state_of(balancer), before)


def test_two_splits_in_one_pass_are_an_error():
    problem = make_problem()
    balancer = ExcessMTL(num_tasks=3)
    losses = split_losses(problem, balancer) + split_losses(problem, balancer)
    with pytest.raises(RuntimeError, match=r"one balancer\.split"):
        sum(losses).backward()  # type: ignore[union-attr]


def test_two_balancers_in_one_pass_step_by_themselves():
    balancers = ExcessMTL(num_tasks=3), ExcessMTL(num_tasks=3)
    losses = [loss for each in balancers for loss in split_losses(make_problem(), each)]
    sum(losses).backward()  # type: ignore[union-attr]
    assert [int(each.num_steps) for each in balancers] == [1, 1]


def test_a_loss_of_the_features_themselves_is_not_weighted():
    problem, plain = make_problem(), make_problem()
    balancer = ExcessMTL(num_tasks=3)
    z = problem.encoder(problem.inputs)
    (sum(losses_of(problem, balancer.split(z))) + 5 * z.square().sum()).backward()  # type: ignore[union-attr]
    split_step(plain, ExcessMTL(num_tasks=3))
    (5 * plain.encoder(plain.inputs).square().sum()).backward()
    torch.testing.assert_close(problem.grads(), plain.grads())


def test_autograd_grad_returns_the_weighted_gradients():
    problem, plain = make_problem(), make_problem()
    balancer = ExcessMTL(num_tasks=3)
    parameters = list(problem.encoder.parameters())
    grads = torch.autograd.grad(sum(split_losses(problem, balancer)), parameters)  # type: ignore[arg-type]
    split_step(plain, ExcessMTL(num_tasks=3))
    torch.testing.assert_close(list(grads), [p.grad for p in plain.encoder.parameters()])
    assert int(balancer.num_steps) == 1


def test_a_penalty_on_held_gradients_then_a_step():
    problem = make_problem()
    balancer, _ = weights_step(problem)
    problem.inputs.requires_grad_()
    loss = sum(split_losses(problem, balancer))
    with balancer.hold_weights():
        (grad,) = torch.autograd.grad(loss, problem.inputs, create_graph=True)  # type: ignore[arg-type]
    assert grad.requires_grad
    (loss + grad.square().sum()).backward()
    assert int(balancer.num_steps) == 2


@pytest.mark.parametrize("where", ["below", "around"])
def test_checkpoints_that_are_not_reentrant_change_nothing(where: str):
    problem, plain = make_problem(), make_problem()
    balancer, other = ExcessMTL(num_tasks=3), ExcessMTL(num_tasks=3)
    encode: Callable[[Tensor], Any] = problem.encoder
    if where == "around":
        encode = lambda x: balancer.split(problem.encoder(x))  # noqa: E731
    for number in range(3):
        change_batch(problem, number)
        change_batch(plain, number)
        problem.zero_grad()
        out = checkpoint(encode, problem.inputs, use_reentrant=False)
        copies = out if where == "around" else balancer.split(out)
        sum(losses_of(problem, copies)).backward()  # type: ignore[union-attr]
        split_step(plain, other)
    assert int(balancer.num_steps) == 3
    torch.testing.assert_close(problem.grads(), plain.grads())
    assert_equal_bits(state_of(balancer), state_of(other))


def test_accumulated_micro_batches_move_the_weights_once():
    problem = make_problem()
    balancer = ExcessMTL(num_tasks=3, update_every=4)
    for number in range(8):
        change_batch(problem, number)
        split_step(problem, balancer)
    assert int(balancer.num_steps) == 2
    assert balancer.num_calls == 8


# ---- scales, skips and errors


def test_a_loss_scale_scales_the_gradients_and_nothing_else():
    problem, plain = make_problem(), make_problem()
    balancer, other = ExcessMTL(num_tasks=3), ExcessMTL(num_tasks=3)
    for number, scale in enumerate((1024.0, 1024.0, 2048.0)):
        change_batch(problem, number)
        change_batch(plain, number)
        problem.zero_grad()
        (scale * sum(split_losses(problem, balancer, grad_scale=scale))).backward()  # type: ignore[union-attr]
        split_step(plain, other)
        torch.testing.assert_close([g / scale for g in problem.grads()], plain.grads())
    assert_equal_bits(state_of(balancer), state_of(other))


def test_an_overflow_is_skipped_counted_and_left_for_the_scaler():
    problem = make_problem()
    balancer, before = weights_step(problem)
    problem.zero_grad()
    losses = split_losses(problem, balancer)
    (losses[0] + losses[1] * float("inf") + losses[2]).backward()
    assert balancer.num_skipped_steps.item() == 1
    assert balancer.found_nonfinite.tolist() == [False, True, False]
    assert all(p.grad is not None and p.grad.isnan().all() for p in problem.encoder.parameters())
    changed = {"num_skipped_steps", "found_nonfinite"}
    for (name, tensor), old in zip(balancer.state_tensors().items(), before, strict=True):
        if name not in changed:
            torch.testing.assert_close(tensor, old, msg=name)


def test_nonfinite_raise_leaves_the_state():
    problem = make_problem()
    balancer = ExcessMTL(num_tasks=3, nonfinite="raise")
    split_step(problem, balancer)
    weights = balancer.sq_grad_sum.clone()
    losses = split_losses(problem, balancer)
    with pytest.raises(FloatingPointError, match=r"task\(s\) \[1\]"):
        (losses[0] + losses[1] * float("nan")).backward()
    assert torch.equal(balancer.sq_grad_sum, weights)


class Broken(torch.autograd.Function):
    """Raises in its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise KeyboardInterrupt


def test_a_pass_that_fails_in_a_head_moves_nothing():
    problem = make_problem()
    balancer, before = weights_step(problem)
    losses = split_losses(problem, balancer)
    losses[1] = Broken.apply(losses[1])  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        sum(losses).backward()  # type: ignore[union-attr]
    assert_equal_bits(state_of(balancer), before)
    split_step(problem, balancer)
    assert int(balancer.num_steps) == 2


def test_other_channels_than_in_the_first_step_are_an_error():
    balancer = ExcessMTL(num_tasks=2)
    sum(z.sum() for z in balancer.split(torch.ones(3, 4, requires_grad=True))).backward()  # type: ignore[union-attr]
    before = state_of(balancer)
    with pytest.raises(ValueError, match=r"\[16\] elements.*got \[25\]"):
        sum(z.sum() for z in balancer.split(torch.ones(3, 5, requires_grad=True))).backward()  # type: ignore[union-attr]
    assert_equal_bits(state_of(balancer), before)


@pytest.mark.parametrize(
    "options, features, error, message",
    [
        ({"head_weighting": "task_weights"}, torch.ones(2, 3), ValueError, "head_weighting"),
        ({"combine": "per_tensor"}, torch.ones(2, 3), ValueError, "per_tensor"),
        ({}, torch.ones(2, 3).long(), TypeError, "floating point"),
        ({}, torch.ones(3), ValueError, "feature_dim"),
        ({"feature_dim": 3}, torch.ones(2, 3), ValueError, "feature_dim"),
        ({}, [], ValueError, "at least one"),
        ({}, ["z"], TypeError, "tensor"),
        ({"feature_adapter": "other"}, torch.ones(2, 3), ValueError, "feature_adapter"),
    ],
)
def test_arguments_that_do_not_fit(options: Any, features: Any, error: Any, message: str):
    with pytest.raises(error, match=message):
        ExcessMTL(num_tasks=2, **options).split(features)


def test_a_balancer_of_parameters_says_what_to_leave_out():
    problem = make_problem()
    balancer = ExcessMTL(problem.encoder.parameters(), num_tasks=3)
    with pytest.raises(ValueError, match="estimate_from='features'"):
        split_losses(problem, balancer)


def test_writing_a_copy_in_place_is_an_error():
    z_a, _ = ExcessMTL(num_tasks=2).split(torch.ones(2, 3, requires_grad=True) * 2)
    with pytest.raises(RuntimeError, match="inplace"):
        z_a.relu_()


# ---- the layer


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), TaskSplit(ExcessMTL(num_tasks=2)))


def model_step(model: nn.Sequential, inputs: Tensor, *, compiled: Any = None) -> None:
    z_a, z_b = (compiled or model)(inputs)
    model.zero_grad()
    (z_a.square().sum() + 3 * z_b.abs().sum()).backward()


def test_the_layers_state_is_saved_with_the_model():
    model, again = make_model(), make_model()
    torch.manual_seed(1)
    batches = torch.randn(4, 6, 4).unbind()
    for batch in batches[:2]:
        model_step(model, batch)
    again.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model)
    for each in (model, again, copied):
        for batch in batches[2:]:
            model_step(each, batch)
    states = [state_of(each[2].balancer) for each in (model, again, copied)]  # type: ignore[arg-type, union-attr]
    assert_equal_bits(states[1], states[0])
    assert_equal_bits(states[2], states[0])


def test_model_eval_makes_the_layer_the_identity():
    model = make_model()
    model.eval()
    model_step(model, torch.ones(3, 4))
    assert model[2].balancer.num_calls == 0  # type: ignore[union-attr]


def test_the_layer_needs_a_balancer_with_split():
    with pytest.raises(TypeError, match="split"):
        TaskSplit(nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_graph_takes_the_same_steps():
    model, plain = make_model(), make_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    for batch in torch.randn(4, 6, 4).unbind():
        model_step(model, batch, compiled=compiled)
        model_step(plain, batch)
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad)
    assert_equal_bits(state_of(model[2].balancer), state_of(plain[2].balancer))  # type: ignore[arg-type, union-attr]
