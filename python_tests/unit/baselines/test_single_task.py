"""SingleTask: one task trains as if the others were not there."""

from __future__ import annotations

import pytest
import torch
from _asserts import assert_equal_bits
from _inputs import make_problem
from torch import nn

from excessmtl_ext import SingleTask


@pytest.mark.parametrize("form", ["list", "stacked", "others are None", "streaming", "forward"])
@pytest.mark.parametrize("task", [0, 1, 2])
def test_gradients_are_those_of_the_task_alone(form, task):
    problem, alone = make_problem(), make_problem()
    balancer = SingleTask(problem.encoder.parameters(), num_tasks=3, task=task)
    losses = problem.losses()
    if form == "list":
        balancer.backward(losses)
    elif form == "stacked":
        balancer.backward(torch.stack(losses))
    elif form == "others are None":
        balancer.backward([loss if i == task else None for i, loss in enumerate(losses)])
    elif form == "forward":
        balancer(losses).backward()
    else:
        for i, loss in enumerate(losses):
            balancer.accumulate(i, loss, retain_graph=True)
        balancer.finish()
    alone.losses()[task].backward()
    assert_equal_bits(problem.grads(), alone.grads())
    for other in {0, 1, 2} - {task}:
        assert problem.heads[other].weight.grad is None
    assert int(balancer.num_steps) == 1


@pytest.mark.parametrize("how", ["backward", "stacked"])
def test_one_backward_pass_starts_and_it_is_the_tasks(how):
    layer = nn.Linear(2, 1)
    passes = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, task):
            ctx.task = task
            return value.clone()

        @staticmethod
        def backward(ctx, grad):
            passes.append(ctx.task)
            return grad, None

    losses = [Seen.apply(layer(torch.ones(1, 2)).sum() * (i + 1), i) for i in range(3)]
    balancer = SingleTask(layer.parameters(), num_tasks=3, task=1)
    balancer.backward(losses if how == "backward" else torch.stack(losses))
    assert passes == [1]


@pytest.mark.parametrize("head_weighting", ["none", "task_weights"])
def test_the_sum_convention_scales_the_shared_gradient(head_weighting):
    problem, alone = make_problem(), make_problem()
    balancer = SingleTask(
        problem.encoder.parameters(),
        num_tasks=3,
        task=2,
        weight_scale="num_tasks",
        head_weighting=head_weighting,
    )
    assert balancer.task_weights.tolist() == [0.0, 0.0, 3.0]
    balancer.backward(problem.losses())
    alone.losses()[2].backward()
    torch.testing.assert_close(problem.encoder[0].weight.grad, 3 * alone.encoder[0].weight.grad)
    torch.testing.assert_close(
        problem.heads[2].weight.grad,
        alone.heads[2].weight.grad * (3 if head_weighting == "task_weights" else 1),
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_a_batch_without_the_task_is_no_step(streaming):
    problem = make_problem()
    balancer = SingleTask(problem.encoder.parameters(), num_tasks=3, task=1)
    losses = problem.losses()
    if streaming:
        balancer.accumulate(0, losses[0])
        balancer.finish()
    else:
        balancer.backward([losses[0], None, losses[2]])
    assert all(grad is None for grad in problem.grads())
    assert int(balancer.num_steps) == 0
    with pytest.raises(RuntimeError, match=r"accumulate\(\) before finish"):
        balancer.finish()


def test_wrong_task_raises():
    with pytest.raises(ValueError, match="`task` between 0 and 1, but got 2"):
        SingleTask(num_tasks=2, task=2)
    with pytest.raises(ValueError, match="`task` >= 0, but got -1"):
        SingleTask(num_tasks=2, task=-1)
    problem = make_problem()
    balancer = SingleTask(problem.encoder.parameters(), num_tasks=3, task=0)
    with pytest.raises(ValueError, match="`task` between 0 and 2, but got 3"):
        balancer.accumulate(3, problem.losses()[0])


def test_the_state_of_another_task_is_refused():
    balancer, other = SingleTask(num_tasks=3, task=0), SingleTask(num_tasks=3, task=2)
    with pytest.raises(RuntimeError, match="`task` was 2 and is 0 here"):
        balancer.load_state_dict(other.state_dict())
    assert balancer.task_weights.tolist() == [1.0, 0.0, 0.0]
