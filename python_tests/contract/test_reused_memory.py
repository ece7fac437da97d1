"""Gradients in memory that the next backward pass writes again: an error that names them, or right by copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from excessmtl_ext import ExcessMTL, Uniform
from excessmtl_ext.balancer import Balancer
from excessmtl_ext.baselines import MGDA, GradNorm

NUM_TASKS = 3
PUBLISHED: dict[str, Any] = {"robust_step_size": 1.0, "combine": "sum", "gradient_momentum": 0.0}


class Linear(torch.autograd.Function):
    """x @ w.T whose backward pass returns buffers that it keeps, as torch.cuda.make_graphed_callables does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, buffers: dict[str, Tensor] | None) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.buffers = buffers
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w = ctx.saved_tensors
        if ctx.buffers is None:
            return grad @ w, grad.T @ x, None
        of_x = ctx.buffers.setdefault("x", torch.empty_like(x))
        of_w = ctx.buffers.setdefault("w", torch.empty_like(w))
        torch.mm(grad, w, out=of_x)
        torch.mm(grad.T, x, out=of_w)
        return of_x.detach(), of_w.detach(), None


class Problem:
    """Three tasks on one layer; ``reuses`` says whether that, or the first layer of every head, keeps its buffers."""

    def __init__(self, reuses: str) -> None:
        torch.manual_seed(0)
        self.reuses = reuses
        self.first = nn.Parameter(torch.randn(6, 5) / 2)
        self.encoder = nn.Parameter(torch.randn(8, 6) / 2)
        self.neck = nn.Parameter(torch.randn(4, 8) / 2)
        self.heads = nn.ModuleList([nn.Linear(4, 1) for _ in range(NUM_TASKS)])
        self.inputs, self.targets = torch.randn(16, 5), torch.randn(16, NUM_TASKS)
        self.buffers: dict[str, Tensor] = {}
        self.shared = [self.first, self.encoder]
        self.all = [*self.shared, self.neck, *self.heads.parameters()]

    def features(self) -> Tensor:
        hidden = (self.inputs @ self.first.T).tanh()
        return Linear.apply(
            hidden, self.encoder, self.buffers if self.reuses == "encoder" else None
        )

    def losses(self, features: Tensor) -> list[Tensor]:
        buffers = self.buffers if self.reuses == "neck" else None
        losses = []
        for task, head in enumerate(self.heads):
            out = head(Linear.apply(features, self.neck, buffers).tanh())[:, 0]
            losses.append((out * 3.0**task - self.targets[:, task]).square().mean())
        return losses


Run = Callable[[Balancer, list[Tensor], Tensor], None]


def plain(balancer: Balancer, losses: list[Tensor], features: Tensor) -> None:
    balancer.backward(losses)


def scalar(balancer: Balancer, losses: list[Tensor], features: Tensor) -> None:
    balancer(losses).backward()


def with_features(balancer: Balancer, losses: list[Tensor], features: Tensor) -> None:
    balancer.backward(losses, features=features)


def streamed(balancer: Balancer, losses: list[Tensor], features: Tensor) -> None:
    for task, loss in enumerate(losses):
        balancer.accumulate(task, loss, retain_graph=task + 1 < NUM_TASKS)
    balancer.finish()


def excess_mtl(problem: Problem, **options: Any) -> Balancer:
    return ExcessMTL(problem.shared, num_tasks=NUM_TASKS, **{**PUBLISHED, **options})


MODES: dict[str, tuple[Callable[[Problem], Balancer], Run]] = {
    "plain": (excess_mtl, plain),
    "defaults": (lambda p: ExcessMTL(p.shared, num_tasks=NUM_TASKS), plain),
    "scalar": (excess_mtl, scalar),
    "features": (excess_mtl, with_features),
    "batched": (lambda p: excess_mtl(p, batched=True), with_features),
    "auto": (lambda p: excess_mtl(p, batched="auto"), with_features),
    "raise": (lambda p: excess_mtl(p, nonfinite="raise"), plain),
    "weighted heads": (lambda p: excess_mtl(p, head_weighting="task_weights"), plain),
    "subset": (lambda p: excess_mtl(p, combine=None, estimate_from=[p.encoder]), plain),
    "rotation": (lambda p: excess_mtl(p, combine=None, tasks_per_step=2), plain),
    "rotation of a subset": (
        lambda p: excess_mtl(p, combine=None, tasks_per_step=2, estimate_from=[p.encoder]),
        plain,
    ),
    "MGDA": (lambda p: MGDA(p.shared, num_tasks=NUM_TASKS), plain),
    "GradNorm": (lambda p: GradNorm(p.shared, num_tasks=NUM_TASKS), plain),
}
RIGHT_WITHOUT_COPIES: dict[str, tuple[Callable[[Problem], Balancer], Run]] = {
    "streamed": (excess_mtl, streamed),
    "from features": (
        lambda p: excess_mtl(p, combine=None, estimate_from="features"),
        with_features,
    ),
    "Uniform": (lambda p: Uniform(p.shared, num_tasks=NUM_TASKS), plain),
}


def trained(
    reuses: str, make: Callable[[Problem], Balancer], run: Run, *, copies: bool
) -> tuple[Any, ...]:
    """State and gradients of four steps."""
    problem = Problem(reuses)
    balancer = make(problem)
    balancer.copy_gradients = copies
    grads = []
    for _ in range(4):
        for parameter in problem.all:
            parameter.grad = None
        features = problem.features()
        run(balancer, problem.losses(features), features)
        grads.append(
            [parameter.grad.clone() for parameter in problem.all if parameter.grad is not None]
        )
        with torch.no_grad():
            for parameter, grad in zip(problem.all, grads[-1], strict=True):
                parameter -= 0.05 * grad
    return balancer.task_weights.clone(), grads, dict(balancer.state_dict())


def assert_equal(actual: Sequence[Any], expected: Sequence[Any]) -> None:
    torch.testing.assert_close(actual[:2], expected[:2], rtol=0.0, atol=0.0)
    for name, value in expected[2].items():
        if isinstance(value, Tensor):
            assert torch.equal(actual[2][name], value), name


@pytest.mark.parametrize("mode", [*MODES, *RIGHT_WITHOUT_COPIES])
def test_copies_give_the_bits_of_gradients_in_memory_of_their_own(mode: str) -> None:
    make, run = {**MODES, **RIGHT_WITHOUT_COPIES}[mode]
    expected = trained("nothing", make, run, copies=False)
    assert_equal(trained("encoder", make, run, copies=True), expected)
    if mode in RIGHT_WITHOUT_COPIES:
        assert_equal(trained("encoder", make, run, copies=False), expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_shared_gradient_that_the_next_pass_overwrites_is_an_error_before_anything_moves(
    mode: str,
) -> None:
    make, run = MODES[mode]
    problem = Problem("encoder")
    balancer = make(problem)
    state = copy.deepcopy(balancer.state_dict())
    index = 0 if "subset" in mode else 1
    what = rf"tasks 0 and 1 for \S+.* {index}, of shape \[8, 6\].*copy_gradients = True"
    for _ in range(2):
        features = problem.features()
        with pytest.raises(ValueError, match=what):
            run(balancer, problem.losses(features), features)
        assert all(parameter.grad is None for parameter in problem.shared)
        for name, value in balancer.state_dict().items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True)
    assert balancer.num_calls == 0
    balancer.copy_gradients = True
    features = problem.features()
    run(balancer, problem.losses(features), features)
    assert balancer.num_calls == 1


@pytest.mark.parametrize("mode", ["features", "batched", "from features", "weighted", "streamed"])
def test_what_heads_overwrite_is_an_error_and_right_with_copies(mode: str) -> None:
    """Every head begins with one layer, whose gradients, of the features and of its weight, lie in one buffer each."""
    options: dict[str, Any] = {
        "features": {},
        "batched": {"batched": True},
        "from features": {"estimate_from": "features", "combine": None},
        "weighted": {"head_weighting": "task_weights"},
        "streamed": {"head_weighting": "task_weights"},
    }[mode]
    run = {"weighted": plain, "streamed": streamed}.get(mode, with_features)

    def make(problem: Problem) -> Balancer:
        return excess_mtl(problem, **options)

    problem = Problem("neck")
    features = problem.features()
    with pytest.raises(ValueError, match=r"tasks \d and \d for (feature|the head's parameter) \d"):
        run(make(problem), problem.losses(features), features)
    expected = trained("nothing", make, run, copies=False)
    actual = trained("neck", make, run, copies=True)
    torch.testing.assert_close(actual[:2], expected[:2], rtol=1e-5, atol=1e-7)


def test_a_gradient_kept_in_grad_that_a_later_step_overwrites_is_an_error() -> None:
    """With one task present, ``.grad`` becomes the buffer itself, to which the next step adds."""
    problem = Problem("encoder")
    balancer = excess_mtl(problem)
    only_first = [problem.losses(problem.features())[0], None, None]
    balancer.backward(only_first)
    before = balancer.task_weights.clone()
    with pytest.raises(
        ValueError, match=r"shared parameter 1 in `.grad` before this step and that of task 0"
    ):
        balancer.backward([problem.losses(problem.features())[0], None, None])
    assert torch.equal(balancer.task_weights, before)

    def accumulated(reuses: str, copies: bool) -> list[Tensor]:
        problem = Problem(reuses)
        balancer = excess_mtl(problem, copy_gradients=copies)
        for _ in range(3):
            balancer.backward([problem.losses(problem.features())[0], None, None])
        return [parameter.grad for parameter in problem.shared if parameter.grad is not None]

    torch.testing.assert_close(
        accumulated("encoder", True), accumulated("nothing", False), rtol=0, atol=0
    )


def test_gradients_that_are_the_start_of_their_passes_are_right() -> None:
    """Autograd hands the start of a pass on as the gradient of a view: no pass writes it again."""
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    balancer = ExcessMTL([a, b], num_tasks=2, **PUBLISHED)
    balancer.backward([a.view(()), b.view(())])
    assert a.grad is not None
    assert b.grad is not None
    assert (a.grad.item(), b.grad.item()) == (0.5, 0.5)
    assert a.grad.data_ptr() != b.grad.data_ptr()

    c = nn.Parameter(torch.ones(1))
    balancer = ExcessMTL([c], num_tasks=2, **PUBLISHED)
    balancer.backward([c.view(()), c.view(())])
    assert c.grad is not None
    assert c.grad.item() == 1.0


def test_rows_of_one_workspace_that_do_not_overlap_are_right() -> None:
    """A Function may return another part of one large tensor in every pass."""

    class Rows(torch.autograd.Function):
        workspace, used = torch.empty(12, 4), 0

        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            return w.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            row = Rows.workspace[Rows.used]
            Rows.used += 1
            return row.copy_(grad)

    w = nn.Parameter(torch.arange(4.0))
    balancer = ExcessMTL([w], num_tasks=2, **PUBLISHED)
    z = Rows.apply(w)
    balancer.backward([z.square().sum(), (3.0 * z).sum()])
    assert w.grad is not None
    torch.testing.assert_close(w.grad, torch.arange(4.0) + 1.5)


def test_the_option_is_part_of_the_representation() -> None:
    assert "copy_gradients=True" in repr(ExcessMTL(num_tasks=2, copy_gradients=True))
