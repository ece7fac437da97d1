"""``features=`` walks every head once and changes no result, whatever the graphs look like."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from _inputs import Problem, make_problem
from _published import published
from test_per_task import CountingIdentity
from torch import Tensor, nn

from excessmtl_ext import IMTL, MGDA, ExcessMTL, GroupDRO, Uniform
from excessmtl_ext.balancer import Balancer
from excessmtl_ext.passes.cut import Cut

Forward = Callable[[Problem], tuple[list[Tensor], list[Tensor]]]
"""Features and losses of a problem."""


def one_tensor(problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    features = problem.encoder(problem.inputs)
    return [features], [
        (head(features)[:, 0] - problem.targets[:, task]).square().mean()
        for task, head in enumerate(problem.heads)
    ]


def several_tensors(problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """Two tensors from the encoder; the last task needs only one of them."""
    left, right = problem.encoder(problem.inputs).tanh(), problem.encoder(problem.inputs - 1.0)
    last = len(problem.heads) - 1
    return [left, right], [
        (head(left) + (0.0 if task == last else head(right))).square().mean()
        for task, head in enumerate(problem.heads)
    ]


def own_inputs(problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """Each task encodes a batch of its own."""
    features = [problem.encoder(problem.inputs + task) for task in range(len(problem.heads))]
    return features, [
        head(z).square().mean() for head, z in zip(problem.heads, features, strict=True)
    ]


def two_outputs_of_one_node(problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    left, right = problem.encoder(problem.inputs).unbind()[:2]
    return [left, right], [
        (head(left) * (task + 1) + head(right)).square().mean()
        for task, head in enumerate(problem.heads)
    ]


def nested(problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """One feature is computed from another by shared parameters."""
    low = problem.encoder[:2](problem.inputs)
    high = problem.encoder[2:](low)
    return [high, low], [
        head(high).square().mean() + (task + 1) * low.square().mean()
        for task, head in enumerate(problem.heads)
    ]


def tied_losses(problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """The graphs of the heads meet, so a pass from one loss walks all heads."""
    features, losses = one_tensor(problem)
    return features, list((torch.stack(losses) * torch.arange(1.0, 1.0 + len(losses))).unbind())


def common_head(problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """A parameter outside the shared ones serves all tasks."""
    features = problem.encoder(problem.inputs)
    common = problem.heads[0]
    return [features], [
        (common(features) + head(features)).square().mean() for head in problem.heads
    ]


def no_parameters_above(problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    features = problem.encoder(problem.inputs)
    return [features], [(features - task).square().mean() for task in range(len(problem.heads))]


FORWARDS: list[Forward] = [
    one_tensor,
    several_tensors,
    own_inputs,
    two_outputs_of_one_node,
    nested,
    tied_losses,
    common_head,
    no_parameters_above,
]


def excess_from_last_layer(parameters: Iterable[Tensor], **options) -> ExcessMTL:
    shared = list(parameters)
    return published(
        shared, num_tasks=3, robust_step_size=0.5, estimate_from=shared[-2:], **options
    )


MAKES: dict[str, Callable[..., Balancer]] = {
    "excess": lambda p, **o: published(p, num_tasks=3, robust_step_size=0.5, **o),
    "weighted_heads": lambda p, **o: published(
        p, num_tasks=3, robust_step_size=0.5, head_weighting="task_weights", **o
    ),
    "between_updates": lambda p, **o: published(
        p, num_tasks=3, robust_step_size=0.5, update_every=2, **o
    ),
    "subset": lambda p, **o: excess_from_last_layer(p, **o),
    "rotation": lambda p, **o: published(
        p, num_tasks=3, robust_step_size=0.5, tasks_per_step=1, **o
    ),
    "mgda": lambda p, **o: MGDA(p, num_tasks=3, **o),
    "imtl": lambda p, **o: IMTL(p, num_tasks=3, variant="L", **o),
    "group_dro": lambda p, **o: GroupDRO(p, num_tasks=3, robust_step_size=0.5, **o),
    "uniform": lambda p, **o: Uniform(p, num_tasks=3, **o),
}


def train(
    make: Callable[..., Balancer], forward: Forward, how: str, *, with_features: bool, **options
) -> tuple[Balancer, list[Tensor | None], Tensor]:
    """A few steps of gradient descent in float64; balancer, last gradients and final weights of the network."""
    problem = make_problem(dtype=torch.float64)
    balancer = make(problem.encoder.parameters(), **options)
    optimizer = torch.optim.SGD(problem.parameters(), lr=0.05)
    for step in range(4):
        features, losses = forward(problem)
        given: list[Tensor | None] = list(losses)
        if how == "absent" and step % 2:
            given[1] = None
        extra = (
            {"features": features if len(features) > 1 else features[0]} if with_features else {}
        )
        optimizer.zero_grad()
        if how == "scalar":
            (balancer(given, **extra) * 3.0).backward()
        else:
            stacked = torch.stack(losses) if how == "stacked" else given
            balancer.backward(stacked, grad_scale=8.0 if how == "scale" else None, **extra)
        optimizer.step()
    weights = torch.cat([parameter.detach().flatten() for parameter in problem.parameters()])
    return balancer, problem.grads(), weights


@pytest.mark.parametrize("how", ["list", "stacked", "absent", "scalar", "scale"])
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_features_change_no_result(make, forward, how):
    plain, plain_grads, plain_weights = train(make, forward, how, with_features=False)
    cut, cut_grads, cut_weights = train(make, forward, how, with_features=True)
    torch.testing.assert_close(cut.task_weights, plain.task_weights)
    torch.testing.assert_close(cut_weights, plain_weights)
    for mine, theirs in zip(cut_grads, plain_grads, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("stacked", [False, True])
def test_every_head_is_walked_once_and_the_encoder_once_per_task(stacked):
    problem = make_problem(num_tasks=4)
    balancer = published(problem.encoder.parameters(), num_tasks=4)
    hidden = CountingIdentity.apply(problem.encoder(problem.inputs))
    assert isinstance(hidden, Tensor)
    features = hidden * 1.0
    losses = [head(features).square().mean() for head in problem.heads]
    CountingIdentity.count = 0
    balancer.backward(torch.stack(losses) if stacked else losses, features=features)
    assert CountingIdentity.count == 4

    features = problem.encoder(problem.inputs)
    losses = [head(CountingIdentity.apply(features)).square().mean() for head in problem.heads]
    CountingIdentity.count = 0
    balancer.backward(torch.stack(losses) if stacked else losses, features=features)
    assert CountingIdentity.count == 4


@pytest.mark.parametrize("make", ["between_updates", "group_dro"])
def test_a_step_with_known_weights_walks_the_encoder_once(make):
    problem = make_problem()
    balancer = MAKES[make](problem.encoder.parameters())
    for _ in range(2):  # the second one lies between two updates
        hidden = CountingIdentity.apply(problem.encoder(problem.inputs))
        assert isinstance(hidden, Tensor)
        features = hidden * 1.0
        losses = [head(features).square().mean() for head in problem.heads]
        CountingIdentity.count = 0
        balancer.backward(losses, features=features)
    assert CountingIdentity.count == 1


def test_heads_are_freed_before_the_encoder_is_walked():
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3)
    features = problem.encoder(problem.inputs)
    losses = [head(features).square().mean() for head in problem.heads]

    freed = []

    def look(grad: Tensor) -> None:
        for loss in losses:
            with pytest.raises(RuntimeError, match="second time"):
                torch.autograd.grad(loss, features, retain_graph=True)
            freed.append(loss)

    hook = next(problem.encoder.parameters()).register_hook(look)
    balancer.backward(losses, features=features)
    hook.remove()
    assert len(freed) == 9  # three heads, seen from three passes


def test_hooks_run_as_often_as_without_features():
    counts = {}
    for with_features in (False, True):
        problem = make_problem()
        balancer = published(problem.encoder.parameters(), num_tasks=3)
        features = problem.encoder(problem.inputs)
        losses = [head(features).square().mean() for head in problem.heads]
        seen: list[str] = []
        features.register_hook(lambda grad, seen=seen: seen.append("features"))
        problem.heads[0].weight.register_hook(lambda grad, seen=seen: seen.append("head"))
        problem.heads[1].weight.register_post_accumulate_grad_hook(
            lambda parameter, seen=seen: seen.append("head, accumulated")
        )
        problem.encoder[0].weight.register_hook(lambda grad, seen=seen: seen.append("shared"))
        balancer.backward(losses, features=features if with_features else None)
        counts[with_features] = sorted(seen)
    assert counts[True] == counts[False]
    assert counts[True].count("features") == 3


def test_a_hook_on_an_accumulated_head_gradient_runs_once_behind_the_cut():
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3)
    features, losses = one_tensor(problem)
    seen = []
    weight = problem.heads[1].weight
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    assert Cut(losses, features, list(problem.encoder.parameters())).obstacle is None
    balancer.backward(losses, features=features)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], weight.grad)


def test_sparse_gradients_of_a_head_stay_sparse():
    problem = make_problem()
    table = nn.Embedding(4, 8, sparse=True)
    balancer = published(problem.encoder.parameters(), num_tasks=3)
    features, losses = one_tensor(problem)
    losses[0] = losses[0] + (features[0] * table(torch.tensor([2]))).sum()
    balancer.backward(losses, features=features)
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse


def test_parameters_below_the_features_that_are_not_shared_get_their_own_gradient():
    def grads(*, with_features: bool) -> list[Tensor | None]:
        problem = make_problem()
        last = list(problem.encoder.parameters())[-2:]
        balancer = published(last, num_tasks=3)
        features, losses = one_tensor(problem)
        balancer.backward(losses, features=features if with_features else None)
        return problem.grads()

    for mine, theirs in zip(grads(with_features=True), grads(with_features=False), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda z: "z", TypeError, "Expected `features` to be a tensor or a list"),
        (lambda z: [], ValueError, "at least one tensor"),
        (lambda z: [z, 3], TypeError, r"Expected `features\[1\]` to be a tensor"),
        (lambda z: z.detach(), ValueError, "without a graph"),
        (lambda z: z.detach().requires_grad_(), ValueError, "without a graph"),
        (lambda z: [z, z], ValueError, "every tensor of `features` once"),
        (lambda z: z * 1.0, ValueError, r"`losses\[0\]` to depend on the shared .* past them"),
        (lambda z: z.to("meta"), ValueError, r"Expected `features\[0\]` on cpu"),
    ],
    ids=["type", "empty", "element", "detached", "leaf", "twice", "copy", "device"],
)
@pytest.mark.parametrize("how", ["backward", "scalar"])
def test_wrong_features_raise_and_change_nothing(change, error, message, how):
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3)
    features, losses = one_tensor(problem)
    before = {
        name: value.clone()
        for name, value in balancer.state_dict().items()
        if isinstance(value, Tensor)
    }
    with pytest.raises(error, match=message):
        if how == "backward":
            balancer.backward(losses, features=change(features[0]))
        else:
            balancer(losses, features=change(features[0])).backward()
    assert all(grad is None for grad in problem.grads())
    for name, value in before.items():
        assert torch.equal(value, balancer.state_dict()[name])


def test_a_loss_that_reaches_a_shared_parameter_past_the_features_is_refused():
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3)
    features, losses = one_tensor(problem)
    losses[2] = losses[2] + problem.encoder[0].weight.square().sum()
    with pytest.raises(
        ValueError, match=r"`losses\[2\]`.*one of shape \[16, 6\] past them.*leave `features` out"
    ):
        balancer.backward(losses, features=features)


def test_a_loss_that_does_not_need_the_features_is_refused():
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3)
    features, losses = one_tensor(problem)
    losses[1] = problem.heads[1](features[0].detach()).square().mean()
    with pytest.raises(ValueError, match=r"`losses\[1\]` to depend on `features`"):
        balancer.backward(losses, features=features)
