"""One backward pass per task and nothing else, whatever the shape of the graphs."""

from __future__ import annotations

import pytest
import torch
from _inputs import Problem, make_problem
from _published import published
from torch import Tensor, nn

from excessmtl_ext import GroupDRO, Uniform


class CountingIdentity(torch.autograd.Function):
    """Counts how often the backward pass walks through it."""

    count = 0

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        CountingIdentity.count += 1
        return grad


@pytest.fixture
def passes():
    CountingIdentity.count = 0
    return CountingIdentity


def counted_losses(problem: Problem, *, own_inputs: bool) -> list[Tensor]:
    """Losses whose encoder passes are counted; with ``own_inputs`` every task encodes a batch of its own."""
    if not own_inputs:
        features = CountingIdentity.apply(problem.encoder(problem.inputs))
        return [head(features).square().mean() for head in problem.heads]
    return [
        head(CountingIdentity.apply(problem.encoder(problem.inputs + task))).square().mean()
        for task, head in enumerate(problem.heads)
    ]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("own_inputs", [False, True])
def test_a_step_costs_one_encoder_pass_per_task(passes, own_inputs, stacked):
    problem = make_problem(num_tasks=4)
    balancer = published(problem.encoder.parameters(), num_tasks=4)
    losses = counted_losses(problem, own_inputs=own_inputs)
    balancer.backward(torch.stack(losses) if stacked else losses)
    assert passes.count == 4


@pytest.mark.parametrize("make", [Uniform, GroupDRO])
def test_methods_without_task_gradients_cost_one_pass(passes, make):
    problem = make_problem(num_tasks=4)
    make(problem.encoder.parameters(), num_tasks=4).backward(
        counted_losses(problem, own_inputs=False)
    )
    assert passes.count == 1


def test_steps_between_updates_cost_one_pass(passes):
    problem = make_problem(num_tasks=4)
    balancer = published(problem.encoder.parameters(), num_tasks=4, update_every=3)
    counts = []
    for _ in range(4):
        passes.count = 0
        balancer.backward(counted_losses(problem, own_inputs=False))
        counts.append(passes.count)
    assert counts == [4, 1, 1, 4]


def expected_grads(
    problem: Problem, weights: Tensor, *, weighted_heads: bool
) -> list[Tensor | None]:
    """Weighted sum of task gradients for the encoder, own gradient for each head, by plain autograd."""
    losses = problem.losses()
    shared = list(problem.encoder.parameters())
    task_grads = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
    grads = [
        sum(w.to(g.dtype) * g for w, g in zip(weights, column, strict=True))
        for column in zip(*task_grads, strict=True)
    ]
    for task, head in enumerate(problem.heads):
        own = torch.autograd.grad(losses[task], list(head.parameters()), retain_graph=True)
        grads += [weights[task].to(g.dtype) * g if weighted_heads else g for g in own]
    return grads


METHODS = {
    "excessmtl": lambda p, **kw: published(p, num_tasks=3, robust_step_size=1.0, **kw),
    "excessmtl_between_updates": lambda p, **kw: published(p, num_tasks=3, robust_step_size=1.0, update_every=2, **kw),
    "groupdro": lambda p, **kw: GroupDRO(p, num_tasks=3, robust_step_size=1.0, **kw),
    "uniform": lambda p, **kw: Uniform(p, num_tasks=3, **kw),
}  # fmt: skip


@pytest.mark.parametrize("head_weighting", ["none", "task_weights"])
@pytest.mark.parametrize("weight_scale", ["simplex", "num_tasks"])
@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())
def test_gradients_are_the_weighted_sum_and_heads_follow_the_convention(
    make, weight_scale, head_weighting
):
    problem = make_problem(dtype=torch.float64)
    balancer = make(
        list(problem.encoder.parameters()), weight_scale=weight_scale, head_weighting=head_weighting
    )
    for _ in range(4):
        problem.zero_grad()
        balancer.backward(problem.losses())
        actual = problem.grads()
        expected = expected_grads(
            problem, balancer.task_weights, weighted_heads=head_weighting == "task_weights"
        )
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())
def test_gradients_are_added_to_what_is_there(make):
    alone, added = make_problem(dtype=torch.float64), make_problem(dtype=torch.float64)
    make(alone.encoder.parameters()).backward(alone.losses())
    for parameter in added.parameters():
        parameter.grad = torch.ones_like(parameter)
    make(added.encoder.parameters()).backward(added.losses())
    for a, b in zip(added.grads(), alone.grads(), strict=True):
        torch.testing.assert_close(a, b + 1)


def test_unused_and_frozen_shared_parameters_keep_no_gradient():
    problem = make_problem()
    unused = nn.Parameter(torch.ones(3))
    frozen = next(problem.encoder.parameters())
    frozen.requires_grad_(False)
    balancer = published([*problem.encoder.parameters(), unused], num_tasks=3)
    for _ in range(2):
        balancer.backward(problem.losses())
    assert unused.grad is None
    assert frozen.grad is None
    assert all(p.grad is not None for p in list(problem.encoder.parameters())[1:])


def test_a_parameter_that_one_task_does_not_use_gets_the_others_share():
    shared, extra = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    balancer = published([shared, extra], num_tasks=2)
    balancer.backward([(shared * extra).sum(), shared.sum()])
    torch.testing.assert_close(extra.grad, torch.full((2,), 0.5))


def sum_of_views(a: Tensor, b: Tensor) -> Tensor:
    return a.view(-1) + b.view(-1)


def overlapping_views(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([torch.ones(2), a.view(-1)]) + torch.cat([b.view(-1), torch.ones(2)])


@pytest.mark.parametrize("join", [sum_of_views, overlapping_views])
@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())
def test_parameters_whose_gradients_share_memory_get_their_own_sums(make, join):
    """Autograd makes both ``.grad`` views of one tensor: what is written for one would change the other."""
    a, b = nn.Parameter(torch.randn(6, 1)), nn.Parameter(torch.randn(2, 3))
    balancer = make([a, b])
    inputs = torch.randn(3, join(a, b).numel())

    def losses() -> list[Tensor]:
        return list((inputs @ join(a, b)).square())

    for _ in range(3):
        a.grad = b.grad = None
        balancer.backward(losses())
        weighted = (balancer.task_weights.float() * torch.stack(losses())).sum()
        for parameter, expected in zip((a, b), torch.autograd.grad(weighted, (a, b)), strict=True):
            torch.testing.assert_close(parameter.grad, expected)


def test_a_gradient_shared_in_a_later_task_only_is_not_written():
    """Task 0 does not reach b, so b's sum could go where task 1 keeps the gradients of both."""
    a, b = nn.Parameter(torch.randn(6, 1)), nn.Parameter(torch.randn(2, 3))
    balancer = published([b, a], num_tasks=2, robust_step_size=1.0)
    inputs = torch.randn(2, 6)
    losses = [(inputs[0] @ a.view(-1)).square(), (inputs[1] @ sum_of_views(a, b)).square()]
    expected = [
        torch.autograd.grad(sum(losses) / 2, parameter, retain_graph=True)[0]
        for parameter in (a, b)
    ]
    balancer.backward(losses)
    for parameter, want in zip((a, b), expected, strict=True):
        torch.testing.assert_close(parameter.grad, want)


def test_tied_parameters_count_once():
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = layer.weight
    encoder = nn.Sequential(layer, nn.Tanh(), other)
    balancer = published(encoder.parameters(), num_tasks=2)
    x = torch.randn(5, 4)
    z = encoder(x)
    losses = [z.square().mean(), z.sum()]
    expected = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for loss in losses]
    balancer.backward(losses)
    torch.testing.assert_close(layer.weight.grad, (expected[0] + expected[1]) / 2)


def test_parameters_outside_the_shared_ones_that_serve_several_tasks_get_the_plain_sum():
    for make in (
        lambda p: GroupDRO(p, num_tasks=2, robust_step_size=1.0),
        lambda p: published(p, num_tasks=2, update_every=2, robust_step_size=1.0),
        lambda p: Uniform(p, num_tasks=2),
    ):
        inner, outer = nn.Linear(3, 3), nn.Linear(3, 3)
        balancer = make(list(outer.parameters()))
        x = torch.randn(4, 3)
        for _ in range(2):  # with update_every=2 the second step is the cheap one
            inner.zero_grad()
            z = outer(inner(x))
            losses = [z.square().mean(), z.abs().mean()]
            expected = torch.autograd.grad(losses[0] + losses[1], inner.weight, retain_graph=True)[
                0
            ]
            balancer.backward(losses)
            torch.testing.assert_close(inner.weight.grad, expected)


def test_channels_last_gradients_are_combined_in_the_right_order():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    plain = nn.Conv2d(3, 4, 3)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 3, 6, 6)
    for layer, inputs in ((conv, x.to(memory_format=torch.channels_last)), (plain, x.contiguous())):
        balancer = published(layer.parameters(), num_tasks=2, robust_step_size=1.0)
        for _ in range(2):
            layer.zero_grad()
            z = layer(inputs)
            balancer.backward([z.square().mean(), z.abs().mean()])
    torch.testing.assert_close(conv.weight.grad.contiguous(), plain.weight.grad.contiguous())


@pytest.mark.parametrize("mode", ["exact", "subset", "rotation", "streaming"])
def test_a_sparse_shared_gradient_is_refused_before_anything_moves(mode):
    embedding = nn.Embedding(10, 4, sparse=True)
    layer = nn.Linear(4, 2)
    shared = [*embedding.parameters(), *layer.parameters()]
    options = {"subset": {"estimate_from": [embedding.weight]}, "rotation": {"tasks_per_step": 1}}
    balancer = published(shared, num_tasks=2, **options.get(mode, {}))
    before = {key: str(value) for key, value in balancer.state_dict().items()}
    z = layer(embedding(torch.tensor([1, 2, 2])))
    losses = [z.sum(), z.square().sum()]
    with pytest.raises(ValueError, match=r"dense gradients .* sparse=False"):
        if mode == "streaming":
            balancer.accumulate(0, losses[0])
        else:
            balancer.backward(losses)
    assert all(parameter.grad is None for parameter in shared)
    assert {key: str(value) for key, value in balancer.state_dict().items()} == before


def test_sparse_gradients_stay_sparse_where_no_weight_comes_from_them():
    for balancer_type, factors in ((Uniform, [0.5, 0.5]), (GroupDRO, None)):
        embedding = nn.Embedding(10, 4, sparse=True).double()
        heads = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)]).double()
        balancer = balancer_type(embedding.parameters(), num_tasks=2)
        losses = [head(embedding(torch.tensor([1, 2, 2]))).square().sum() for head in heads]
        rows = [
            torch.autograd.grad(loss, embedding.weight, retain_graph=True)[0].to_dense()
            for loss in losses
        ]
        for _ in range(2):  # the second adds to what is there
            balancer.backward(losses, retain_graph=True)
        assert embedding.weight.grad is not None
        assert embedding.weight.grad.is_sparse
        if factors is not None:
            want = sum(2 * f * row for f, row in zip(factors, rows, strict=True))
            torch.testing.assert_close(embedding.weight.grad.to_dense(), want)
        torch.optim.SparseAdam(embedding.parameters()).step()


def test_losses_in_half_precision_and_shapes_of_one_element_work():
    problem = make_problem(dtype=torch.bfloat16)
    balancer = published(problem.encoder.parameters(), num_tasks=3)
    balancer.backward([loss.reshape(1) for loss in problem.losses()])
    balancer.backward(torch.stack(problem.losses()))
    assert balancer.sq_grad_sum.dtype == torch.float32
    assert next(problem.encoder.parameters()).grad.dtype == torch.bfloat16
