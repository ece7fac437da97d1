"""The contract that every method keeps: verbs, state, faults, messages."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from _asserts import assert_equal_bits
from _inputs import Problem, make_problem
from _published import published
from torch import nn

from excessmtl_ext import Balancer, ExcessMTL, GroupDRO, Uniform

MAKERS = {
    "excessmtl": lambda p: published(p, num_tasks=3, robust_step_size=1.0),
    "default": lambda p: ExcessMTL(p, num_tasks=3),
    "momentum": lambda p: published(p, num_tasks=3, gradient_momentum=0.98, fisher="linear"),
    "official": lambda p: ExcessMTL.from_preset("official", p, num_tasks=3, robust_step_size=1.0),
    "floor": lambda p: published(p, num_tasks=3, robust_step_size=1.0, min_weight=0.1),
    "warmup": lambda p: published(p, num_tasks=3, robust_step_size=1.0, num_warmup_steps=3),
    "every_second": lambda p: published(p, num_tasks=3, robust_step_size=1.0, update_every=2),
    "groupdro": lambda p: GroupDRO(p, num_tasks=3, robust_step_size=0.5),
    "uniform": lambda p: Uniform(p, num_tasks=3),
}
# Not where the weights are a function of all tasks' risks, and change for all when one does.
FROM_STEP_TO_STEP = {name: make for name, make in MAKERS.items() if name != "default"}
every_method = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def run(problem: Problem, balancer: Balancer, steps: int, how: str = "backward") -> None:
    optimizer = torch.optim.SGD(problem.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = problem.losses()
        if how == "backward":
            balancer.backward(losses)
        elif how == "stacked":
            balancer.backward(torch.stack(losses))
        elif how == "computed":  # a graph on top of the stack that cannot be taken apart
            balancer.backward(torch.stack(losses) * 1.0)
        elif how == "forward":
            balancer(losses).backward()
        elif how == "scaled forward":
            (balancer(losses) * 512.0).backward()
            for parameter in problem.parameters():
                parameter.grad /= 512.0
        elif how == "scaled":
            balancer.backward(losses, grad_scale=512.0)
            for parameter in problem.parameters():
                parameter.grad /= 512.0
        elif how == "streaming":
            for task, loss in enumerate(losses):
                balancer.accumulate(task, loss, retain_graph=task < 2)
            balancer.finish()
        optimizer.step()


@every_method
@pytest.mark.parametrize(
    "how", ["stacked", "computed", "forward", "scaled forward", "scaled", "streaming"]
)
def test_every_way_to_run_a_step_gives_the_same_training(make, how):
    one, other = make_problem(), make_problem()
    balancer, same = make(one.encoder.parameters()), make(other.encoder.parameters())
    run(one, balancer, 5)
    run(other, same, 5, how)
    torch.testing.assert_close(same.task_weights, balancer.task_weights, rtol=0, atol=1e-7)
    for a, b in zip(other.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert int(same.num_steps) == int(balancer.num_steps)


@every_method
def test_update_weights_gives_the_weights_of_backward(make):
    problem = make_problem()
    balancer, fed = make(problem.encoder.parameters()), make(None)
    for _ in range(4):
        losses = problem.losses()
        shared = list(problem.encoder.parameters())
        grads = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
        flat = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in grads])
        weights = fed.update_weights(task_grads=flat, losses=torch.stack(losses))
        balancer.backward(losses)
        torch.testing.assert_close(weights, balancer.task_weights, rtol=1e-6, atol=1e-9)


@every_method
@pytest.mark.parametrize("num_before", [0, 1, 2, 4])
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


def test_loading_a_state_as_part_of_a_larger_module_works():
    problem = make_problem()
    holder = nn.ModuleDict({"balancer": MAKERS["momentum"](problem.encoder.parameters())})
    run(problem, holder["balancer"], 3)
    other = nn.ModuleDict({"balancer": MAKERS["momentum"](problem.encoder.parameters())})
    other.load_state_dict(holder.state_dict())
    both = [each["balancer"].state_tensors().values() for each in (other, holder)]
    assert_equal_bits(list(both[0]), list(both[1]))


def test_state_of_another_shape_is_refused_and_nothing_is_taken_over():
    problem, larger = make_problem(), make_problem(num_tasks=4)
    balancer = published(problem.encoder.parameters(), num_tasks=3)
    run(problem, balancer, 2)
    before = [tensor.clone() for tensor in balancer.state_tensors().values()]

    def refused(other: Balancer, message: str) -> None:
        with pytest.raises(RuntimeError, match=message):
            balancer.load_state_dict(other.state_dict())
        assert_equal_bits(list(balancer.state_tensors().values()), before)

    four = published(larger.encoder.parameters(), num_tasks=4)
    run(larger, four, 1)
    refused(four, r"of shape \[3.*but got \[4")
    wider = nn.Linear(30, 3)
    other = published(wider.parameters(), num_tasks=3)
    other.update_weights([[torch.ones(3, 30), torch.ones(3)]] * 3)
    refused(other, "shared parameters of sizes")
    momentum = published(problem.encoder.parameters(), num_tasks=3, gradient_momentum=0.5)
    run(problem, momentum, 1)
    refused(momentum, "`grad_mean` of shape")


def test_reset_is_as_new():
    problem = make_problem()
    balancer, fresh = (MAKERS["momentum"](problem.encoder.parameters()) for _ in range(2))
    run(problem, balancer, 3)
    balancer.reset()
    assert_equal_bits(list(balancer.state_tensors().values()), list(fresh.state_tensors().values()))
    assert balancer.host_state() == fresh.host_state()


@every_method
def test_repr_rebuilds_the_balancer(make):
    balancer = make(None)
    names = {"ExcessMTL": ExcessMTL, "GroupDRO": GroupDRO, "Uniform": Uniform}
    rebuilt = eval(repr(balancer), names)
    assert repr(rebuilt) == repr(balancer)
    assert rebuilt.options() == balancer.options()


def test_half_and_to_leave_the_state_in_its_precision():
    problem = make_problem()
    balancer = MAKERS["excessmtl"](problem.encoder.parameters())
    run(problem, balancer, 3)
    before = [tensor.clone() for tensor in balancer.state_tensors().values()]
    nn.ModuleList([balancer]).half().to(torch.bfloat16)
    assert_equal_bits(list(balancer.state_tensors().values()), before)


def test_the_balancer_owns_no_parameters():
    problem = make_problem()
    balancer = MAKERS["excessmtl"](problem.encoder.parameters())
    assert list(balancer.parameters()) == []
    assert "shared_parameters" not in "".join(balancer.state_dict())


def test_float64_gradients_keep_float64_state():
    problem = make_problem(dtype=torch.float64)
    balancer = MAKERS["momentum"](problem.encoder.parameters())
    run(problem, balancer, 2)
    assert balancer.sq_grad_sum.dtype == torch.float64
    assert balancer.grad_mean.dtype == torch.float64


# ---- absent tasks and faults ----


@pytest.mark.parametrize("make", FROM_STEP_TO_STEP.values(), ids=FROM_STEP_TO_STEP.keys())
@pytest.mark.parametrize("streaming", [False, True])
def test_an_absent_task_keeps_its_weight_and_does_not_sway_the_others(make, streaming):
    problem = make_problem()
    balancer = make(problem.encoder.parameters())
    run(problem, balancer, 4)
    before = balancer.task_weights.clone()
    problem.zero_grad()
    losses = problem.losses()
    if streaming:
        balancer.accumulate(0, losses[0], retain_graph=True)
        balancer.accumulate(2, losses[2])
        balancer.finish()
    else:
        balancer.backward([losses[0], None, losses[2]])
    after = balancer.task_weights
    assert after[1].item() == pytest.approx(before[1].item(), rel=1e-12)
    assert (after[0] + after[2]).item() == pytest.approx((before[0] + before[2]).item(), rel=1e-12)
    assert problem.heads[1].weight.grad is None


def test_a_batch_without_any_task_is_no_step():
    problem = make_problem()
    balancer = MAKERS["every_second"](problem.encoder.parameters())
    balancer.backward([None, None, None])
    assert int(balancer.num_steps) == 0
    run(problem, balancer, 1)
    assert int(balancer.num_steps) == 1


def test_given_gradients_without_any_task_are_no_step_and_tell_nothing_of_the_parameters():
    balancer = published(num_tasks=2)
    for num_steps in (0, 1):
        balancer.update_weights([[], []])
        assert int(balancer.num_steps) == num_steps
        balancer.update_weights([[torch.ones(2), torch.ones(3)], [torch.ones(2), None]])
    assert int(balancer.num_steps) == 2


@every_method
@pytest.mark.parametrize("how", ["backward", "forward", "streaming"])
def test_nonfinite_step_is_skipped_and_later_steps_go_on(make, how):
    problem = make_problem()
    balancer = make(problem.encoder.parameters())
    run(problem, balancer, 4)
    before = {name: tensor.clone() for name, tensor in balancer.state_tensors().items()}
    problem.zero_grad()
    losses = problem.losses()
    losses[1] = losses[1] * float("inf")
    if how == "backward":
        balancer.backward(losses)
    elif how == "forward":
        balancer(losses).backward()
    else:
        for task, loss in enumerate(losses):
            balancer.accumulate(task, loss, retain_graph=True)
        balancer.finish()
    assert any(not bool(p.grad.isfinite().all()) for p in problem.encoder.parameters())
    torch.testing.assert_close(balancer.task_weights, before["task_weights"], rtol=0, atol=0)
    if "task_grads" in balancer.requires:
        assert balancer.found_nonfinite.tolist() == [False, True, False]
        assert int(balancer.num_skipped_steps) == 1
        rows = [1] if how == "streaming" else [0, 1, 2]  # streaming undoes only the task at fault
        for name in ("sq_grad_sum", "grad_mean", "baseline_excess_risk"):
            torch.testing.assert_close(
                getattr(balancer, name)[rows], before[name][rows], rtol=1e-5, atol=1e-6
            )
    run(problem, balancer, 2)
    assert bool(balancer.task_weights.isfinite().all())
    assert bool(torch.stack([p.isfinite().all() for p in problem.parameters()]).all())


@pytest.mark.parametrize("how", ["backward", "streaming"])
def test_nonfinite_raise_names_the_task_and_restores_the_shared_gradient(how):
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3, nonfinite="raise")
    run(problem, balancer, 2)
    weights = balancer.task_weights.clone()
    kept = [p.grad.clone() for p in problem.encoder.parameters()]
    losses = problem.losses()
    losses[2] = losses[2] * float("nan")
    with pytest.raises(FloatingPointError, match=r"task\(s\) \[2\]"):
        if how == "backward":
            balancer.backward(losses)
        else:
            for task, loss in enumerate(losses):
                balancer.accumulate(task, loss, retain_graph=True)
            balancer.finish()
    assert torch.equal(balancer.task_weights, weights)
    assert_equal_bits([p.grad for p in problem.encoder.parameters()], kept)
    run(problem, balancer, 1)


def test_nonfinite_raise_of_a_loss_based_method_touches_no_gradient():
    problem = make_problem()
    balancer = GroupDRO(problem.encoder.parameters(), num_tasks=3, nonfinite="raise")
    run(problem, balancer, 1)
    kept = problem.grads()
    losses = problem.losses()
    losses[2] = losses[2] * float("nan")
    with pytest.raises(FloatingPointError, match=r"task\(s\) \[2\]"):
        balancer.backward(losses)
    assert_equal_bits(problem.grads(), kept)


def test_a_step_between_updates_clears_the_flags_of_the_step_before():
    problem = make_problem()
    balancer = MAKERS["every_second"](problem.encoder.parameters())
    losses = problem.losses()
    losses[1] = losses[1] * float("nan")
    balancer.backward(losses)
    assert balancer.found_nonfinite.tolist() == [False, True, False]
    run(problem, balancer, 1)  # a cheap step with good gradients
    assert not balancer.found_nonfinite.any()


@pytest.mark.parametrize("how", ["backward", "streaming", "update_weights"])
def test_a_step_that_raised_does_not_count_towards_update_every(how):
    problem = make_problem()
    balancer = published(
        problem.encoder.parameters(), num_tasks=3, update_every=2, nonfinite="raise"
    )
    losses = problem.losses()
    losses[1] = losses[1] * float("nan")
    shared = [torch.full_like(p, float("nan")) for p in problem.encoder.parameters()]
    with pytest.raises(FloatingPointError):
        if how == "backward":
            balancer.backward(losses)
        elif how == "streaming":
            for task, loss in enumerate(losses):
                balancer.accumulate(task, loss, retain_graph=True)
            balancer.finish()
        else:
            balancer.update_weights([shared] * 3)
    problem.zero_grad()
    balancer.backward(problem.losses())
    assert int(balancer.num_steps) == 1  # the first call that succeeds moves the weights


def test_update_weights_skips_too():
    balancer = published(num_tasks=2, robust_step_size=1.0)
    for _ in range(2):
        balancer.update_weights(torch.ones(2, 5))
    before = balancer.sq_grad_sum.clone()
    bad = torch.ones(2, 5)
    bad[1, 3] = float("nan")
    balancer.update_weights(bad)
    assert torch.equal(balancer.sq_grad_sum, before)
    assert balancer.found_nonfinite.tolist() == [False, True]


def test_grad_scaler_skips_a_step_that_the_balancer_skipped():
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3)
    optimizer = torch.optim.SGD(problem.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for bad in (False, True, False):
        optimizer.zero_grad()
        losses = problem.losses()
        if bad:
            losses[0] = losses[0] * 1e30 * 1e30
        before = [p.detach().clone() for p in problem.parameters()]
        scaler.scale(balancer(losses)).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = any(
            not torch.equal(a, b) for a, b in zip(before, problem.parameters(), strict=True)
        )
        assert moved is not bad
    assert scaler.get_scale() == 2.0**9
    assert int(balancer.num_skipped_steps) == 1
    assert int(balancer.num_steps) == 2


# ---- wrong use: every message names argument, expectation, finding and way out, and nothing has changed ----


def wrong_losses(problem: Problem):
    losses = problem.losses()
    with torch.no_grad():
        detached = problem.losses()[1]
    elsewhere = nn.Linear(3, 1)(torch.ones(2, 3)).mean()
    return {
        "too few": (losses[:2], ValueError, "3 losses, one per task, but got 2.*None for a task"),
        "stack too short": (torch.stack(losses[:2]), ValueError, r"shape \[3\].*got \[2\]"),
        "not scalar": ([losses[0], losses[1].expand(4), losses[2]], ValueError, r"`losses\[1\]`.*shape \[4\].*mean"),
        "no graph": ([losses[0], detached, losses[2]], ValueError, r"`losses\[1\]` to require grad.*no_grad"),
        "stack without graph": (torch.stack(losses).detach(), ValueError, "`losses` to require grad"),
        "stack of one without graph": (torch.stack([losses[0], detached, losses[2]]), ValueError, r"`losses\[1\]`"),
        "not the encoder's": ([losses[0], elsewhere, losses[2]], ValueError, r"`losses\[1\]` to depend on the shared"),
        "a number": ([losses[0], 1.0, losses[2]], TypeError, r"`losses\[1\]` to be a scalar tensor, but got float"),
        "a set": ({losses[0]}, TypeError, "`losses` to be a tensor .* or a list"),
        "a short dict": ({"a": losses[0]}, ValueError, r"`losses` to hold 3 losses.* the keys \['a'\]"),
        "other device": (
            [losses[0], torch.ones((), device="meta", requires_grad=True) * 1, losses[2]],
            ValueError,
            r"`losses\[1\]` on cpu.*got meta",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(wrong_losses(make_problem())))
@pytest.mark.parametrize("how", ["backward", "forward"])
def test_wrong_losses_raise_and_change_nothing(name, how):
    problem = make_problem()
    balancer = MAKERS["excessmtl"](problem.encoder.parameters())
    run(problem, balancer, 2)
    before = [tensor.clone() for tensor in balancer.state_tensors().values()]
    shared = [p.grad.clone() for p in problem.encoder.parameters()]
    losses, error, message = wrong_losses(problem)[name]
    with pytest.raises(error, match=message):
        balancer.backward(losses) if how == "backward" else balancer(losses).backward()
    assert_equal_bits(list(balancer.state_tensors().values()), before)
    assert_equal_bits([p.grad for p in problem.encoder.parameters()], shared)
    run(problem, balancer, 1)


WRONG_OPTIONS = [
    ({"num_tasks": 0}, ValueError, "`num_tasks` >= 1, but got 0"),
    ({"num_tasks": 513}, ValueError, "`num_tasks` <= 512, but got 513"),
    ({"num_tasks": 2.0}, TypeError, "`num_tasks` to be an integer, but got float"),
    ({"robust_step_size": -1.0}, ValueError, "`robust_step_size` > 0, but got -1.0"),
    ({"robust_step_size": float("nan")}, ValueError, "`robust_step_size` > 0, but got nan"),
    ({"robust_step_size": "1"}, TypeError, "`robust_step_size` to be a number, but got str"),
    ({"fisher": "root"}, ValueError, "`fisher` to be one of 'sqrt', 'linear', but got 'root'"),
    ({"eps": 0.0}, ValueError, "`eps` > 0, but got 0.0"),
    ({"eps": 1e-45}, ValueError, "`eps` >= 1.17"),
    ({"num_warmup_steps": -1}, ValueError, "`num_warmup_steps` >= 0, but got -1"),
    ({"weight_scale": "sum"}, ValueError, "`weight_scale` to be one of 'simplex', 'num_tasks'"),
    ({"head_weighting": "all"}, ValueError, "`head_weighting` to be one of"),
    ({"gradient_momentum": 1.0}, ValueError, r"`gradient_momentum` in \[0, 1\), but got 1.0"),
    ({"relative": 1}, TypeError, "`relative` to be True or False"),
    ({"update_every": 0}, ValueError, "`update_every` >= 1, but got 0"),
    ({"min_weight": 0.4}, ValueError, r"`min_weight` between 0 and 1 / num_tasks = 0.333333, but got 0.4"),
    ({"nonfinite": "ignore"}, ValueError, "`nonfinite` to be one of 'skip', 'raise'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "message"), WRONG_OPTIONS, ids=[str(o[0]) for o in WRONG_OPTIONS]
)
def test_wrong_option_raises(options, error, message):
    with pytest.raises(error, match=message):
        published(**{"num_tasks": 3, **options})


def test_wrong_parameters_raise():
    layer = nn.Linear(2, 2)
    cases = [
        ([], ValueError, "at least one parameter, but got none"),
        (iter(()), ValueError, "A generator such as model.parameters"),
        (
            [layer.weight, layer.bias, layer.weight],
            ValueError,
            r"`shared_parameters\[2\]` is number 0",
        ),
        ([layer.weight * 2], ValueError, r"`shared_parameters\[0\]` to be a leaf"),
        (layer.named_parameters(), TypeError, "Pass .parameters"),
        (layer.weight, TypeError, "to be parameters, as from model.encoder.parameters"),
        ([torch.ones(2, dtype=torch.int64)], ValueError, "real floating point"),
        ([layer.weight, torch.ones(1, device="meta")], ValueError, "on one device"),
    ]
    for parameters, error, message in cases:
        with pytest.raises(error, match=message):
            published(parameters, num_tasks=2)


def test_unknown_or_incomplete_preset_raises():
    with pytest.raises(
        ValueError, match="`preset` to be one of 'paper', 'official', 'recommended'"
    ):
        ExcessMTL.from_preset("best", num_tasks=2)
    with pytest.raises(ValueError, match=r"`num_warmup_steps` with preset='paper'.*3 \* len"):
        ExcessMTL.from_preset("paper", num_tasks=2)
    assert ExcessMTL.from_preset("paper", num_tasks=2, num_warmup_steps=30).fisher == "linear"


def test_wrong_task_grads_raise_and_change_nothing():
    balancer = published(num_tasks=2)
    with pytest.raises(ValueError, match="Expected `task_grads`: ExcessMTL computes"):
        balancer.update_weights(losses=[1.0, 2.0])
    with pytest.raises(ValueError, match="in the first step, but parameter 1 has none"):
        balancer.update_weights([[torch.ones(2), None]] * 2)
    balancer.update_weights(torch.ones(2, 6))
    before = [tensor.clone() for tensor in balancer.state_tensors().values()]
    cases = [
        (torch.ones(2, 7), r"sizes \[7\], but this balancer has accumulated \[6\]. Call reset\(\)"),
        (torch.ones(3, 6), r"shape \[2, P\], but got \[3, 6\]"),
        (torch.ones(6), r"shape \[2, P\], but got \[6\]"),
        ([[torch.ones(6)]] * 3, "2 lists, one per task, but got 3"),
        ([[torch.ones(6)], [torch.ones(6), torch.ones(1)]], r"`task_grads\[0\]` to hold 2 gradients, but got 1"),
        ([[torch.ones(6)], [torch.ones(5)]], "task 1, parameter 0 to have 6 elements, but got 5"),
        (torch.ones(2, 6, dtype=torch.int32), "float64, float32, bfloat16 or float16"),
        (torch.ones(2, 6, device="meta"), r"gradients on cpu, where .* state is, but got meta"),
    ]  # fmt: skip
    for grads, message in cases:
        with pytest.raises(ValueError, match=message):
            balancer.update_weights(grads)
        assert_equal_bits(list(balancer.state_tensors().values()), before)
    balancer.update_weights([[torch.ones(6)], []])  # an absent task
    assert balancer.num_task_steps.tolist() == [2, 1]


def test_a_matrix_of_another_width_than_the_parameters_raises_and_changes_nothing():
    shared = [torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)]
    balancer = published(shared, num_tasks=2)
    balancer.update_weights(torch.ones(2, 5))
    before = [tensor.clone() for tensor in balancer.state_tensors().values()]
    with pytest.raises(ValueError, match=r"has 6 columns, but this balancer has accumulated 5"):
        balancer.update_weights(torch.ones(2, 6))
    assert_equal_bits(list(balancer.state_tensors().values()), before)


def test_wrong_streaming_raises():
    problem = make_problem()
    balancer = MAKERS["excessmtl"](problem.encoder.parameters())
    losses = problem.losses()
    with pytest.raises(RuntimeError, match="accumulate\\(\\) before finish"):
        balancer.finish()
    with pytest.raises(ValueError, match="`task` between 0 and 2, but got 3"):
        balancer.accumulate(3, losses[0])
    with pytest.raises(ValueError, match="`loss` to be a scalar"):
        balancer.accumulate(0, losses[0].expand(3))
    balancer.accumulate(0, losses[0], retain_graph=True)
    with pytest.raises(ValueError, match="task 0 again"):
        balancer.accumulate(0, losses[0])
    with pytest.raises(RuntimeError, match="finish\\(\\) before another step"):
        balancer.backward(losses)
    with pytest.raises(
        ValueError, match="Expected `shared_parameters`: this balancer was made without"
    ):
        published(num_tasks=3).backward(problem.losses())
    with pytest.raises(ValueError, match="`grad_scale` to be one number"):
        MAKERS["excessmtl"](problem.encoder.parameters()).backward(
            problem.losses(), grad_scale=torch.ones(2)
        )


def test_no_warning_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem = make_problem()
        run(problem, MAKERS["momentum"](problem.encoder.parameters()), 2)
