"""torch.compile: a compiled model with an eager balancer, and what of a whole step can be compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._functorch.config
from _inputs import Problem, make_problem
from _published import published
from torch import Tensor, nn

NUM_STEPS = 4
BACKEND = "aot_eager"  # the graph and its backward pass as compiled, without generating code


def train(
    problem: Problem,
    losses: Callable[[], list[Tensor]],
    compile_step: Callable[[Callable[[], None]], Callable[[], None]] = lambda step: step,
    verb: str = "backward",
) -> list[Tensor]:
    balancer = published(problem.encoder.parameters(), num_tasks=3, robust_step_size=0.5)
    optimizer = torch.optim.SGD(problem.parameters(), lr=0.05)

    def step() -> None:
        if verb == "backward":
            balancer.backward(losses())
        else:
            balancer(losses()).backward()

    step = compile_step(step)
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        step()
        optimizer.step()
    return [balancer.task_weights, *problem.parameters()]


def assert_same(results: list[Tensor], expected: list[Tensor]) -> None:
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-5, atol=1e-7)


def test_a_compiled_model_trains_as_an_eager_one_under_an_eager_balancer() -> None:
    expected_problem, problem = make_problem(), make_problem()
    expected = train(expected_problem, expected_problem.losses)
    compiled = torch.compile(problem.losses, backend=BACKEND, fullgraph=True)
    assert_same(train(problem, compiled), expected)


def test_a_compiled_model_trains_through_the_weighted_loss_too() -> None:
    expected_problem, problem = make_problem(), make_problem()
    expected = train(expected_problem, expected_problem.losses)
    compiled = torch.compile(problem.losses, backend=BACKEND, fullgraph=True)
    assert_same(train(problem, compiled, verb="forward"), expected)


# Dynamo itself looks at .grad of the losses as it wraps them.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_step_breaks_at_the_backward_passes_and_trains_the_same() -> None:
    # torch.autograd.backward cannot be traced, so a step is not one graph; that of the ops alone is
    # (test_op_registration.py).
    expected_problem, problem = make_problem(), make_problem()
    expected = train(expected_problem, expected_problem.losses)

    def compile_step(step: Callable[[], None]) -> Callable[[], None]:
        return torch.compile(step, backend=BACKEND)

    assert_same(train(problem, problem.losses, compile_step), expected)


def _make_problem() -> Problem:
    """Its encoder keeps more than inputs and outputs for the backward pass: that is what a graph may overwrite."""
    problem = make_problem(dtype=torch.float64)
    layers = [nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 8), nn.GELU()]
    problem.encoder = nn.Sequential(*layers).double()
    return problem


def _compiled_losses(problem: Problem, *, dynamic: bool) -> Callable[[int], list[Tensor]]:
    torch.compiler.reset()
    encoder = torch.compile(problem.encoder, backend=BACKEND, dynamic=dynamic)

    def losses(num_samples: int) -> list[Tensor]:
        z = encoder(problem.inputs[:num_samples])
        targets = problem.targets[:num_samples]
        return [(h(z)[:, 0] - targets[:, t]).square().mean() for t, h in enumerate(problem.heads)]

    return losses


def test_a_compiled_encoder_takes_several_passes_with_dynamic_shapes():
    results = []
    for is_compiled in (False, True):
        problem = _make_problem()
        balancer = published(problem.encoder.parameters(), num_tasks=3, robust_step_size=0.5)
        losses = _compiled_losses(problem, dynamic=True)
        for num_samples in (16, 16, 5):
            problem.zero_grad()
            if is_compiled:
                balancer.backward(losses(num_samples))
                continue
            z = problem.encoder(problem.inputs[:num_samples])
            targets = problem.targets[:num_samples]
            balancer.backward(
                [(h(z)[:, 0] - targets[:, t]).square().mean() for t, h in enumerate(problem.heads)]
            )
        results.append([balancer.task_weights, *problem.grads()])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_a_graph_compiled_for_one_pass_is_an_error_with_the_remedy():
    problem = _make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3)
    losses = _compiled_losses(problem, dynamic=True)
    with torch._functorch.config.patch(donated_buffer=True):  # somebody has turned it on again
        given = losses(16)
        with pytest.raises(RuntimeError, match=r"donated_buffer = False"):
            balancer.backward(given)
    assert balancer.num_calls == 0
    assert all(p.grad is None for p in problem.encoder.parameters())
