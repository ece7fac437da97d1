"""What all baselines share: heads, sum of weights, faults, absent tasks, state and the refusal to stream."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from _asserts import assert_equal_bits
from _inputs import Problem, make_problem

from excessmtl_ext import (
    FAMO,
    IMTL,
    MGDA,
    MOML,
    Balancer,
    DualBalancing,
    DynamicWeightAverage,
    FixedWeights,
    GradNorm,
    GroupDRO,
    InverseNorm,
    SingleTask,
    SmoothTchebycheff,
    UncertaintyWeights,
    Uniform,
)

METHODS = {
    "single task": lambda p, **o: SingleTask(p, num_tasks=3, task=1, **o),
    "gradnorm": lambda p, **o: GradNorm(p, num_tasks=3, robust_step_size=0.05, **o),
    "gradnorm, layer": lambda p, **o: GradNorm(p, num_tasks=3, last_layer=(0, 1), **o),
    "mgda": lambda p, **o: MGDA(p, num_tasks=3, **o),
    "imtl-g": lambda p, **o: IMTL(p, num_tasks=3, variant="G", **o),
    "imtl-l": lambda p, **o: IMTL(p, num_tasks=3, variant="L", robust_step_size=0.1, **o),
    "imtl": lambda p, **o: IMTL(p, num_tasks=3, robust_step_size=0.1, **o),
    "moml": lambda p, **o: MOML(p, num_tasks=3, **o),
    "groupdro": lambda p, **o: GroupDRO(p, num_tasks=3, robust_step_size=0.1, **o),
    "fixed": lambda p, **o: FixedWeights(p, num_tasks=3, weights=[1, 2, 3], **o),
    "uncertainty": lambda p, **o: UncertaintyWeights(p, num_tasks=3, learning_rate=0.1, **o),
    "dwa": lambda p, **o: DynamicWeightAverage(p, num_tasks=3, temperature=0.1, **o),
    "famo": lambda p, **o: FAMO(p, num_tasks=3, learning_rate=0.1, **o),
    "stch": lambda p, **o: SmoothTchebycheff(p, num_tasks=3, **o),
    "dbmtl": lambda p, **o: DualBalancing(p, num_tasks=3, beta=0.5, **o),
    "inverse-norm": lambda p, **o: InverseNorm(p, num_tasks=3, **o),
    "uniform, sized": lambda p, **o: Uniform(p, num_tasks=3, combine="per_tensor", **o),
    "fixed, sized": lambda p, **o: FixedWeights(
        p, num_tasks=3, weights=[1, 2, 3], combine="per_tensor", **o
    ),
    "groupdro, sized": lambda p, **o: GroupDRO(
        p, num_tasks=3, robust_step_size=0.1, combine="per_tensor", **o
    ),
    "famo, sized": lambda p, **o: FAMO(
        p, num_tasks=3, learning_rate=0.1, combine="per_tensor", **o
    ),
    "stch, sized": lambda p, **o: SmoothTchebycheff(p, num_tasks=3, combine="per_tensor", **o),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())
NEED_ALL_GRADIENTS = ["gradnorm", "mgda", "imtl-g", "imtl", "moml", "dbmtl", "inverse-norm"]
BLIND = [
    "single task",
    "fixed",
    "moml",
    "uniform, sized",
    "fixed, sized",
]  # their weights depend on no training loss
FORGETS = ["mgda", "imtl-g", "imtl", "moml"]  # an absent task counts as uniform there


def observe(problem: Problem, balancer: Balancer) -> None:
    if isinstance(balancer, MOML):
        balancer.observe_validation(problem.losses())


def run(problem: Problem, balancer: Balancer, steps: int, how: str = "backward") -> None:
    optimizer = torch.optim.SGD(problem.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        observe(problem, balancer)
        losses = problem.losses()
        if how == "backward":
            balancer.backward(losses)
        elif how == "stacked":
            balancer.backward(torch.stack(losses))
        elif how == "scaled forward":
            (balancer(losses) * 512.0).backward()
        elif how == "scaled":
            balancer.backward(losses, grad_scale=512.0)
        elif how == "streaming":
            for task, loss in enumerate(losses):
                balancer.accumulate(task, loss, retain_graph=task < 2)
            balancer.finish()
        if "scaled" in how:
            for parameter in problem.parameters():
                if parameter.grad is not None:
                    parameter.grad /= 512.0
        optimizer.step()
        if isinstance(balancer, FAMO):
            balancer.after_step(problem.losses())
        balancer.end_epoch()  # of one step


@every_method
@pytest.mark.parametrize("how", ["stacked", "scaled forward", "scaled", "streaming"])
def test_every_way_to_run_a_step_gives_the_same_training(make, how):
    one, other = make_problem(), make_problem()
    balancer, same = make(one.encoder.parameters()), make(other.encoder.parameters())
    if how == "streaming" and not same.can_stream:
        pytest.skip("needs the gradients of all tasks at once")
    run(one, balancer, 5)
    run(other, same, 5, how)
    torch.testing.assert_close(same.task_weights, balancer.task_weights, rtol=0, atol=1e-6)
    for a, b in zip(other.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert int(same.num_steps) == int(balancer.num_steps) == 5


@every_method
def test_update_weights_gives_the_weights_of_backward(make):
    problem = make_problem()
    balancer, fed = make(problem.encoder.parameters()), make(None)
    if isinstance(balancer, SmoothTchebycheff):
        for each in (balancer, fed):
            each.end_epoch([1.0, 2.0, 0.5])
    for _ in range(4):
        losses = problem.losses()
        shared = list(problem.encoder.parameters())
        grads = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
        weights = fed.update_weights(task_grads=grads, losses=torch.stack(losses)).clone()
        observe(problem, balancer)
        balancer.backward(losses)
        torch.testing.assert_close(weights, balancer.task_weights, rtol=1e-6, atol=1e-9)


@every_method
@pytest.mark.parametrize("weight_scale", ["simplex", "num_tasks"])
@pytest.mark.parametrize("head_weighting", ["none", "task_weights"])
def test_conventions_of_sum_and_heads(make, weight_scale, head_weighting):
    problem, plain = make_problem(), make_problem()
    options = {"weight_scale": weight_scale, "head_weighting": head_weighting}
    balancer = make(problem.encoder.parameters(), **options)
    total = {"simplex": 1.0, "num_tasks": 3.0}[weight_scale]
    assert balancer.task_weights.sum().item() == pytest.approx(total)
    observe(problem, balancer)
    balancer.backward(problem.losses())
    assert balancer.task_weights.sum().item() == pytest.approx(total)
    losses = plain.losses()
    weighted = sum(
        weight * loss for weight, loss in zip(balancer.task_weights.tolist(), losses, strict=True)
    )
    weighted.backward(retain_graph=True)
    pairs = zip(problem.encoder.parameters(), plain.encoder.parameters(), strict=True)
    is_plain = getattr(balancer, "combination", "sum") == "sum"
    if isinstance(balancer, DualBalancing) or not is_plain:  # they add up means, or sized gradients
        pairs = ()
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    if head_weighting == "none":
        plain.zero_grad()
        sum(losses).backward()
    elif isinstance(balancer, IMTL):
        return  # test_imtl.py: heads carry the loss scales
    for task, (ours, theirs) in enumerate(zip(problem.heads, plain.heads, strict=True)):
        if isinstance(balancer, SingleTask) and task != balancer.task:
            assert ours.weight.grad is None
        else:
            torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-6)


@every_method
def test_gradients_are_added_to_those_that_are_there(make):
    problem, fresh = make_problem(), make_problem()
    for parameter in problem.parameters():
        parameter.grad = torch.ones_like(parameter)
    for own in (problem, fresh):
        balancer = make(own.encoder.parameters())
        observe(own, balancer)
        balancer.backward(own.losses())
    for added, alone in zip(problem.grads(), fresh.grads(), strict=True):
        torch.testing.assert_close(added, (0 if alone is None else alone) + torch.ones_like(added))


@every_method
@pytest.mark.parametrize("num_before", [0, 1, 3])
def test_save_load_continue_equals_never_having_stopped(make, num_before):
    whole = make_problem()
    balancer = make(whole.encoder.parameters())
    run(whole, balancer, num_before)
    resumed = copy.deepcopy(whole)
    file = io.BytesIO()
    torch.save(balancer.state_dict(), file)
    file.seek(0)
    loaded = make(resumed.encoder.parameters())
    loaded.load_state_dict(torch.load(file, weights_only=True))
    run(whole, balancer, 4)
    run(resumed, loaded, 4)
    assert_equal_bits(
        list(loaded.state_tensors().values()), list(balancer.state_tensors().values())
    )
    assert_equal_bits(list(resumed.parameters()), list(whole.parameters()))


@every_method
def test_reset_is_as_new(make):
    problem = make_problem()
    balancer, fresh = make(problem.encoder.parameters()), make(problem.encoder.parameters())
    run(problem, balancer, 3)
    balancer.reset()
    assert_equal_bits(list(balancer.state_tensors().values()), list(fresh.state_tensors().values()))
    assert balancer.host_state() == fresh.host_state()


@every_method
def test_repr_rebuilds_the_balancer(make):
    balancer = make(None, weight_scale="num_tasks", nonfinite="raise")
    rebuilt = eval(repr(balancer), {type(balancer).__name__: type(balancer)})
    assert repr(rebuilt) == repr(balancer)
    assert rebuilt.options() == balancer.options()


@every_method
def test_equal_runs_give_equal_bits(make):
    ends = []
    for _ in range(2):
        problem = make_problem()
        balancer = make(problem.encoder.parameters())
        run(problem, balancer, 5)
        ends.append([*problem.parameters(), *balancer.state_tensors().values()])
    assert_equal_bits(*ends)


@every_method
def test_half_and_to_leave_the_state_in_its_precision(make):
    problem = make_problem()
    balancer = make(problem.encoder.parameters())
    run(problem, balancer, 2)
    before = [tensor.clone() for tensor in balancer.state_tensors().values()]
    balancer.half().to(torch.bfloat16)
    assert_equal_bits(list(balancer.state_tensors().values()), before)


@pytest.mark.parametrize("name", METHODS)
def test_an_absent_task_sways_no_other_and_the_sum_stays(name):
    problem = make_problem()
    balancer = METHODS[name](problem.encoder.parameters())
    run(problem, balancer, 3)
    before = balancer.task_weights.clone()
    problem.zero_grad()
    losses = problem.losses()
    if isinstance(balancer, MOML):
        balancer.observe_validation([losses[0], None, losses[2]])
        losses = problem.losses()
    balancer.backward([losses[0], None, losses[2]])
    after = balancer.task_weights
    kept = 1 / 3 if name in FORGETS else before[1].item()
    assert after[1].item() == pytest.approx(kept, rel=1e-12)
    assert after.sum().item() == pytest.approx(1.0, rel=1e-12)
    assert problem.heads[1].weight.grad is None


@pytest.mark.parametrize("name", NEED_ALL_GRADIENTS)
def test_methods_that_need_all_gradients_refuse_to_stream(name):
    problem = make_problem()
    balancer = METHODS[name](problem.encoder.parameters())
    with pytest.raises(NotImplementedError, match=r"cannot stream.*Call backward\(losses\)"):
        balancer.accumulate(0, problem.losses()[0])
    assert all(grad is None for grad in problem.grads())
    run(problem, balancer, 1)


@pytest.mark.parametrize("how", ["backward", "update_weights"])
@pytest.mark.parametrize("name", ["gradnorm", "mgda", "imtl-g", "imtl", "dbmtl", "inverse-norm"])
def test_nonfinite_gradients_change_no_state_and_later_steps_go_on(name, how):
    problem = make_problem()
    balancer = METHODS[name](problem.encoder.parameters())
    run(problem, balancer, 2)
    before = balancer.task_weights.clone()
    problem.zero_grad()
    losses = problem.losses()
    if how == "backward":
        balancer.backward([losses[0], losses[1] * float("inf"), losses[2]])
        assert all(not bool(p.grad.isfinite().any()) for p in problem.encoder.parameters())
    else:
        grads = [[torch.randn_like(p) for p in problem.encoder.parameters()] for _ in range(3)]
        grads[1][2][0, 0] = float("nan")
        balancer.update_weights(grads, torch.stack(losses))
    assert torch.equal(balancer.task_weights, before)
    assert balancer.found_nonfinite.tolist() == [False, True, False]
    assert (int(balancer.num_steps), int(balancer.num_skipped_steps)) == (2, 1)
    run(problem, balancer, 2)
    assert not balancer.found_nonfinite.any()
    assert all(bool(p.isfinite().all()) for p in problem.parameters())


@pytest.mark.parametrize("name", [name for name in METHODS if name not in BLIND])
def test_nonfinite_raise_names_the_task_and_restores_the_shared_gradient(name):
    problem = make_problem()
    balancer = METHODS[name](problem.encoder.parameters(), nonfinite="raise")
    run(problem, balancer, 2)
    weights = balancer.task_weights.clone()
    kept = [p.grad.clone() for p in problem.encoder.parameters()]
    losses = problem.losses()
    losses[2] = losses[2] * float("nan")
    with pytest.raises(FloatingPointError, match=r"task\(s\) \[2\]"):
        balancer.backward(losses)
    assert torch.equal(balancer.task_weights, weights)
    assert_equal_bits([p.grad for p in problem.encoder.parameters()], kept)
    run(problem, balancer, 1)


@every_method
def test_steps_run_on_every_device(make, device):
    problem = make_problem()
    problem.encoder.to(device)
    problem.heads.to(device)
    problem.inputs, problem.targets = problem.inputs.to(device), problem.targets.to(device)
    balancer = make(problem.encoder.parameters())
    run(problem, balancer, 3)
    assert balancer.task_weights.device.type == device.type
    fed = make(None)  # its state follows the gradients
    shared = list(problem.encoder.parameters())
    grads = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in problem.losses()]
    fed.update_weights(grads, torch.stack(problem.losses()))
    assert bool(fed.task_weights.isfinite().all())
