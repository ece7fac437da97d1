"""An error or a number that is not finite on one rank is one on all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from _inputs import make_problem
from _published import published
from _rank_model import NUM_TASKS
from _ranks import raised_by, run_ranks
from torch import Tensor, nn

from excessmtl_ext.distributed import full_state_dict

# ---- errors reach every rank


def fail(rank: int, num_ranks: int, kind: str) -> tuple[tuple[str, str], bool, bool]:
    problem = make_problem(NUM_TASKS)
    options: dict[str, Any] = {"robust_step_size": 0.5 if kind == "options" and rank else 0.1}
    balancer = published(
        problem.encoder.parameters(),
        num_tasks=NUM_TASKS,
        process_group=dist.group.WORLD,
        model=None if kind == "absent" else nn.ModuleList([problem.encoder, problem.heads]),
        **options,
    )
    if kind != "options":
        balancer.backward(problem.losses())
    before = full_state_dict(balancer)
    problem.zero_grad()
    losses: list[Any] = problem.losses()
    num_samples: Any = None
    if rank == 1:
        if kind == "detached":
            losses[2] = losses[2].detach()
        if kind == "unreached":  # found only in the pass of the last task, when two have been sent
            losses[2] = problem.heads[2](torch.ones(1, 8)).sum()
        if kind == "absent":
            losses[2] = None
        if kind == "samples":
            num_samples = -1
        if kind == "engine":
            losses[1] = losses[1] * Failing.apply(torch.ones((), requires_grad=True))
    error = raised_by(lambda: balancer.backward(losses, num_samples=num_samples))
    after = full_state_dict(balancer)
    is_whole = all(
        torch.equal(value, after[name])
        for name, value in before.items()
        if isinstance(value, Tensor)
    )
    has_no_grad = all(parameter.grad is None for parameter in problem.parameters())
    if kind not in ("options", "absent"):
        balancer.backward(problem.losses())  # the group is in step again
    assert num_ranks == 2
    return error, is_whole, has_no_grad


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, one: Tensor) -> Tensor:
        return one.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise OverflowError("out of luck")


@pytest.mark.parametrize(
    ("kind", "own", "others"),
    [
        ("detached", "losses[2]` to require grad", "rank(s) [1] failed"),
        ("unreached", "losses[2]` to depend on the shared parameters", "rank(s) [1] failed"),
        ("engine", "out of luck", "rank(s) [1] failed"),
        ("samples", "`num_samples` >= 0", "rank(s) [1] failed"),
        ("absent", "task 2 has no loss on rank 1", "task 2 has no loss on rank 1"),
        ("options", "the same options", "the same options"),
    ],
)
def test_an_error_on_one_rank_is_an_error_on_all_and_changes_nothing(
    kind: str, own: str, others: str
) -> None:
    results = run_ranks(2, fail, kind)
    assert others in results[0][0][1]
    assert own in results[1][0][1]
    assert [result[1:] for result in results] == [(True, True)] * 2


def skip(rank: int, num_ranks: int, nonfinite: str, reduce: str) -> Any:
    problem = make_problem(NUM_TASKS)
    balancer = published(
        problem.encoder.parameters(),
        num_tasks=NUM_TASKS,
        nonfinite=nonfinite,
        reduce=reduce,
        process_group=dist.group.WORLD,
        model=nn.ModuleList([problem.encoder, problem.heads]),
    )
    for _ in range(3):
        balancer.backward(problem.losses())
    before = full_state_dict(balancer)
    problem.zero_grad()
    losses = problem.losses()
    if rank == num_ranks - 1:
        losses[1] = losses[1] * float("inf")
    error = raised_by(lambda: balancer.backward(losses))
    after = full_state_dict(balancer)
    for name in ("log_task_weights", "baseline_excess_risk", "num_steps", "excess_risk"):
        assert torch.equal(before[name], after[name]), name
    torch.testing.assert_close(after["sq_grad_sum"], before["sq_grad_sum"])
    grads = [parameter.grad for parameter in problem.encoder.parameters()]
    return error[0], int(balancer.num_skipped_steps), [grad is None for grad in grads], grads


@pytest.mark.parametrize("reduce", ["grads", "risks"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_nonfinite_gradient_on_one_rank_skips_the_step_on_all(
    num_ranks: int, reduce: str
) -> None:
    for error, skipped, _, grads in run_ranks(num_ranks, skip, "skip", reduce):
        assert (error, skipped) == ("nothing", 1)
        assert all(bool(grad.isnan().all()) for grad in grads)


@pytest.mark.parametrize("reduce", ["grads", "risks"])
def test_a_nonfinite_gradient_on_one_rank_raises_on_all_if_asked(reduce: str) -> None:
    for error, _, has_no_grad, _ in run_ranks(2, skip, "raise", reduce):
        assert error == "FloatingPointError"
        assert all(has_no_grad)
