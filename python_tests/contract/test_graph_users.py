"""Other users of the losses' graphs: auxiliary losses, other balancers, compiled encoders, hooks, hidden parameters.

Every value is compared with the method by hand: gradients of each loss by torch.autograd.grad in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from _inputs import Problem, make_problem
from _published import published
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from excessmtl_ext import MGDA, GroupDRO, SkippedStepsWarning, Uniform

Grads = list[Tensor]


def encoder_of(problem: Problem) -> list[nn.Parameter]:
    return list(problem.encoder.parameters())


def by_hand(losses: list[Tensor], parameters: list[nn.Parameter], weights: Tensor) -> Grads:
    """sum_i a_i g_i, each g_i by a pass of its own."""
    total = [torch.zeros_like(p) for p in parameters]
    for weight, loss in zip(weights, losses, strict=True):
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for into, grad in zip(total, grads, strict=True):
            if grad is not None:
                into += weight * grad
    return total


def assert_grads(parameters: list[nn.Parameter], want: Grads) -> None:
    for parameter, grad in zip(parameters, want, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-12, atol=1e-14)


def state_of(balancer: nn.Module) -> dict[str, str]:
    return {key: str(value) for key, value in balancer.state_dict().items()}


METHODS: dict[str, Callable[..., Any]] = {
    "exact": published,
    "task_weights": lambda p, **o: published(p, head_weighting="task_weights", **o),
    "subset": lambda p, **o: published(p, estimate_from=p[2:], **o),
    "rotation": lambda p, **o: published(p, tasks_per_step=1, **o),
    "update_every": lambda p, **o: published(p, update_every=2, **o),
    "features": lambda p, **o: published(p, estimate_from="features", **o),
    "uniform": Uniform,
    "groupdro": lambda p, **o: GroupDRO(p, robust_step_size=0.5, **o),
    "mgda": MGDA,
}
every_method = pytest.mark.parametrize("name", METHODS)


class Setup:
    """A problem and a balancer that has taken three steps."""

    def __init__(self, name: str) -> None:
        self.problem = make_problem(dtype=torch.float64)
        self.shared = encoder_of(self.problem)
        self.heads = list(self.problem.heads.parameters())
        self.balancer = METHODS[name](self.shared, num_tasks=3)
        for _ in range(3):
            self.step(*self.forward())
        self.problem.zero_grad()

    def forward(self) -> tuple[list[Tensor], Tensor]:
        z = self.problem.encoder(self.problem.inputs)
        targets = self.problem.targets
        losses = [
            (h(z)[:, 0] - targets[:, t]).square().mean() for t, h in enumerate(self.problem.heads)
        ]
        return losses, z

    def options(self, z: Tensor) -> dict[str, Tensor]:
        return {"features": z} if self.balancer.needs_features else {}

    def step(self, losses: list[Tensor], z: Tensor, **options: Any) -> None:
        self.balancer.backward(losses, **self.options(z), **options)

    def head_factors(self) -> Tensor:
        weighted = self.balancer.head_weighting == "task_weights"
        return self.balancer.task_weights if weighted else torch.ones(3, dtype=torch.float64)


# ---- another backward pass of the same graphs


@every_method
def test_an_auxiliary_loss_of_the_same_forward_pass_may_be_added_to_the_scalar(name):
    setup = Setup(name)
    losses, z = setup.forward()
    auxiliary = z.square().mean() + 0.01 * sum(p.square().sum() for p in setup.heads)
    parameters = [*setup.shared, *setup.heads]
    extra = by_hand([auxiliary], parameters, torch.ones(1))
    reference, _ = setup.forward()
    (setup.balancer(losses, **setup.options(z)) + auxiliary).backward()
    shared = by_hand(reference, setup.shared, setup.balancer.task_weights)
    heads = by_hand(reference, setup.heads, setup.head_factors())
    want = [a + b for a, b in zip([*shared, *heads], extra, strict=True)]
    assert_grads(parameters, want)


@every_method
@pytest.mark.parametrize("how", ["backward", "scalar"])
def test_retain_graph_leaves_the_graphs_for_another_pass(name, how):
    setup = Setup(name)
    losses, z = setup.forward()
    if how == "backward":
        setup.step(losses, z, retain_graph=True)
    else:
        setup.balancer(losses, **setup.options(z)).backward(retain_graph=True)
    first = [p.grad.clone() for p in setup.shared]
    extra = by_hand([z.square().mean(), *losses], setup.shared, torch.tensor([1.0, 0, 0, 0]))
    z.square().mean().backward()
    assert_grads(setup.shared, [a + b for a, b in zip(first, extra, strict=True)])


@every_method
def test_freed_graphs_are_an_error_that_names_retain_graph_and_change_nothing(name):
    setup = Setup(name)
    other = copy.deepcopy(setup.balancer)
    other.shared_parameters = setup.balancer.shared_parameters
    losses, z = setup.forward()
    setup.step(losses, z)
    grads, state = [p.grad.clone() for p in setup.shared], state_of(setup.balancer)
    with pytest.raises(RuntimeError, match=r"a second time.*retain_graph=True"):
        setup.step(losses, z)
    assert state_of(setup.balancer) == state
    assert_grads(setup.shared, grads)


def test_two_balancers_share_the_losses():
    torch.manual_seed(0)
    first, second = (nn.Linear(6, 4).double() for _ in range(2))
    heads = nn.ModuleList([nn.Linear(4, 1).double() for _ in range(2)])
    inputs = torch.randn(8, 6, dtype=torch.float64)
    balancers = [published(e.parameters(), num_tasks=2) for e in (first, second)]
    z = first(inputs) + second(inputs)
    losses = [head(z).square().mean() for head in heads]
    want = [
        by_hand(losses, list(e.parameters()), torch.tensor([0.5, 0.5])) for e in (first, second)
    ]
    balancers[0].backward(losses, retain_graph=True)
    first_grads = [p.grad.clone() for p in first.parameters()]
    balancers[1].backward(losses)
    for grad, expected in zip(first_grads, want[0], strict=True):
        torch.testing.assert_close(grad, expected)
    # The first balancer treats the second's encoder as a head's: the plain sum, to which the weighted one is added.
    plain = [2 * grad for grad in want[1]]
    assert_grads(list(second.parameters()), [a + b for a, b in zip(plain, want[1], strict=True)])


@pytest.mark.parametrize(
    "use",
    [
        lambda loss, p: loss.backward(inputs=p),
        lambda loss, p: torch.autograd.grad(loss, p),
        lambda loss, p: torch.autograd.grad(loss, p, allow_unused=True),
    ],
    ids=["inputs", "grad", "grad, allow_unused"],
)
def test_a_pass_to_certain_inputs_only_is_an_error_and_no_step(use):
    setup = Setup("exact")
    state = state_of(setup.balancer)
    losses, _ = setup.forward()
    with pytest.raises(RuntimeError, match=r"without `inputs`"):
        use(setup.balancer(losses), setup.shared)
    assert state_of(setup.balancer) == state
    assert all(p.grad is None for p in setup.shared)


# ---- what must not hang on the shared gradients


@every_method
def test_a_hook_that_waits_for_a_shared_gradient_is_refused_before_anything_moves(name):
    setup = Setup(name)
    state = state_of(setup.balancer)
    optimizer = torch.optim.SGD([setup.shared[1]], lr=0.1)
    before = [p.detach().clone() for p in setup.shared]

    def step_in_backward(parameter: Tensor) -> None:
        optimizer.step()

    handle = setup.shared[1].register_post_accumulate_grad_hook(step_in_backward)
    losses, z = setup.forward()
    with pytest.raises(ValueError, match=r"number 1, .*step_in_backward"):
        setup.step(losses, z)
    if setup.balancer.can_stream:
        with pytest.raises(ValueError, match="step_in_backward"):
            setup.balancer.accumulate(0, losses[0])
    assert state_of(setup.balancer) == state
    assert all(map(torch.equal, before, setup.shared))
    assert all(p.grad is None for p in [*setup.shared, *setup.heads])
    handle.remove()
    setup.step(losses, z)


@every_method
@pytest.mark.parametrize("kind", ["expanded", "sparse"])
def test_a_gradient_that_nothing_can_be_added_to_is_refused_before_anything_moves(name, kind):
    setup = Setup(name)
    if kind == "sparse" and name in ("uniform", "groupdro"):
        pytest.skip("a method that weighs no gradients adds to sparse ones as autograd does")
    losses, z = setup.forward()
    weight = setup.shared[0]
    expanded = torch.zeros((), dtype=torch.float64).expand(weight.shape)
    weight.grad = expanded if kind == "expanded" else torch.zeros_like(weight).to_sparse()
    state = state_of(setup.balancer)
    with pytest.raises(ValueError, match=r"`.grad` of shared parameter 0.* None or dense"):
        setup.step(losses, z)
    assert state_of(setup.balancer) == state
    weight.grad = None
    setup.step(losses, z)


def test_hooks_on_the_stacked_losses_are_refused():
    setup = Setup("exact")
    for prepare in (lambda t: t.register_hook(lambda g: 2 * g), lambda t: t.retain_grad()):
        stacked = torch.stack(setup.forward()[0])
        prepare(stacked)
        with pytest.raises(ValueError, match=r"`losses` without a hook or retain_grad"):
            setup.balancer.backward(stacked)


# ---- losses as a dict, and in evaluation


@every_method
def test_a_dict_of_losses_is_read_in_the_order_of_the_first_one(name):
    plain, named = Setup(name), Setup(name)
    for order in ((0, 1, 2), (2, 0, 1)):
        losses, z = plain.forward()
        plain.step(losses, z)
        losses, z = named.forward()
        keys = {f"task{t}": losses[t] for t in order}
        named.balancer.backward(keys, **named.options(z))
    assert torch.equal(plain.balancer.task_weights, named.balancer.task_weights)
    assert_grads(named.shared, [p.grad for p in plain.shared])
    with pytest.raises(ValueError, match=r"keys of the first step, \['task0', 'task1', 'task2'\]"):
        named.balancer(dict(zip("abc", named.forward()[0], strict=True)))


def test_a_validation_loss_names_the_way_out():
    setup = Setup("exact")
    with torch.no_grad():
        losses, _ = setup.forward()
        with pytest.raises(ValueError, match=r"no_grad.*validation loss sum the losses yourself"):
            setup.balancer(losses)
        with pytest.raises(ValueError, match=r"validation loss sum the losses yourself"):
            setup.balancer(torch.stack(losses))


# ---- parameters that a walk over the graph does not see


class OwnBackward(torch.autograd.Function):
    """Runs a module again in its backward pass, as reversible networks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(ctx.module(x), grad)
        return x.grad, None


class OutOfSight(OwnBackward):
    """The same, with a module that nothing in the graph refers to."""

    modules: ClassVar[list[nn.Module]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor, number: int) -> Tensor:
        ctx.registry = Registry(OutOfSight.modules[number])
        ctx.save_for_backward(x)
        with torch.no_grad():
            return OutOfSight.modules[number](x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.registry.module(x).backward(grad)
        return x.grad, None


class Registry:
    """No module, tensor, function or container."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def hidden_losses(setup: Setup, kind: str, where: str) -> tuple[list[Tensor], Tensor]:
    """The losses of ``setup`` with its heads, or its encoder's second layer, behind a node that hides them."""
    encoder, heads = setup.problem.encoder, setup.problem.heads
    OutOfSight.modules = [*heads, encoder[2]]
    number = {id(module): index for index, module in enumerate(OutOfSight.modules)}
    hide: Callable[[nn.Module, Tensor], Tensor] = {
        "checkpoint": lambda m, x: checkpoint(m, x, use_reentrant=True),
        "function": lambda m, x: OwnBackward.apply(x, m),
        "out of sight": lambda m, x: OutOfSight.apply(x, number[id(m)]),
    }[kind]
    first = encoder[1](encoder[0](setup.problem.inputs))
    z = encoder[3](hide(encoder[2], first) if where == "encoder" else encoder[2](first))
    outputs = [hide(head, z) if where == "heads" else head(z) for head in heads]
    targets = setup.problem.targets
    losses = [(o[:, 0] - targets[:, t]).square().mean() for t, o in enumerate(outputs)]
    return losses, z


@every_method
@pytest.mark.parametrize("where", ["encoder", "heads"])
@pytest.mark.parametrize("kind", ["checkpoint", "function", "out of sight"])
def test_hidden_parameters_get_the_right_gradient_or_the_step_is_refused(name, where, kind):
    setup = Setup(name)
    reference, _ = setup.forward()
    losses, z = hidden_losses(setup, kind, where)
    state = state_of(setup.balancer)
    refused = (
        name == "subset"
        or (name == "features" and (where == "heads" or kind == "out of sight"))
        or (name == "task_weights" and kind == "out of sight")
    )
    if refused:
        with pytest.raises(ValueError, match=r"backward pass of its own|inside a node|hides"):
            setup.step(losses, z)
        assert state_of(setup.balancer) == state
        assert all(p.grad is None for p in [*setup.shared, *setup.heads])
        return
    setup.step(losses, z)
    assert_grads(setup.shared, by_hand(reference, setup.shared, setup.balancer.task_weights))
    assert_grads(setup.heads, by_hand(reference, setup.heads, setup.head_factors()))


@pytest.mark.parametrize("kind", ["checkpoint", "function"])
def test_hidden_parameters_in_a_step_of_one_pass_with_weighted_heads(kind):
    setup = Setup("task_weights")
    options = {"num_tasks": 3, "head_weighting": "task_weights"}
    setup.balancer = published(setup.shared, combine=None, **options)
    setup.step(*setup.forward())  # the sizes of the gradients are known now
    for parameter in [*setup.shared, *setup.heads]:
        parameter.grad = None
    with setup.balancer.hold_weights():
        reference, _ = setup.forward()
        losses, z = hidden_losses(setup, kind, "encoder")
        setup.step(losses, z)
    assert_grads(setup.shared, by_hand(reference, setup.shared, setup.balancer.pass_weights()))
    assert_grads(setup.heads, by_hand(reference, setup.heads, setup.head_factors()))


# ---- steps that only apply weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("weight", [1e-3, 1e-7, 1e-30, 0.0])
def test_heads_get_their_own_gradient_at_any_weight(weight, dtype):
    torch.manual_seed(0)
    encoder = nn.Linear(3, 4).to(dtype)
    heads = nn.ModuleList([nn.Linear(4, 1) for _ in range(2)]).to(dtype)
    balancer = GroupDRO(encoder.parameters(), num_tasks=2, robust_step_size=1e-12)
    weights = torch.tensor([1 - weight, weight], dtype=torch.float64)
    balancer.log_task_weights.copy_(weights.log())
    balancer.task_weights.copy_(weights)
    inputs = torch.randn(8, 3).to(dtype)

    def losses() -> list[Tensor]:
        z = encoder(inputs)
        return [(head(z) - 1).square().mean() for head in heads]

    want = [
        torch.autograd.grad(loss, head.weight)[0]
        for loss, head in zip(losses(), heads, strict=True)
    ]
    balancer.backward(losses())
    for head, grad in zip(heads, want, strict=True):
        assert torch.equal(head.weight.grad, grad)  # one pass, no division: the same bits


def test_outputs_in_one_tensor_take_one_pass_of_the_encoder():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh()).double()
    heads = nn.ModuleList([nn.Linear(8, 1) for _ in range(5)]).double()
    inputs, targets = torch.randn(9, 6).double(), torch.randn(9, 5).double()
    balancer = GroupDRO(encoder.parameters(), num_tasks=5, robust_step_size=0.5)
    num_passes = 0

    def count(grad: Tensor) -> None:
        nonlocal num_passes
        num_passes += 1

    def losses() -> list[Tensor]:
        hidden = encoder[0](inputs)
        if hidden.requires_grad:
            hidden.register_hook(count)
        outputs = torch.cat([head(encoder[1](hidden)) for head in heads], dim=1)
        return [(outputs[:, t] - targets[:, t]).square().mean() for t in range(5)]

    reference = losses()
    shared, own = list(encoder.parameters()), list(heads.parameters())
    balancer.backward(losses())
    assert num_passes == 1
    assert_grads(shared, by_hand(reference, shared, balancer.task_weights))
    assert_grads(own, by_hand(reference, own, torch.ones(5)))


# ---- a pass that fails


@every_method
def test_a_pass_that_fails_leaves_everything_as_before(name):
    setup = Setup(name)
    total = 0
    for fail_at in range(1, 12):
        twin = copy.deepcopy(setup)
        twin.problem.zero_grad()
        for parameter in twin.shared:
            parameter.grad = torch.ones_like(parameter)
        losses, z = twin.forward()
        num_calls = 0

        def fail(grad: Tensor, fail_at: int = fail_at) -> None:
            nonlocal num_calls
            num_calls += 1
            if num_calls == fail_at:
                raise KeyboardInterrupt

        twin.shared[0].register_hook(fail)
        state, waiting = state_of(twin.balancer), twin.balancer.host_state()
        try:
            twin.step(losses, z)
        except KeyboardInterrupt:
            total += 1
            assert state_of(twin.balancer) == state
            assert twin.balancer.host_state() == waiting
            assert all(bool((p.grad == 1).all()) for p in twin.shared)
            if name not in ("exact", "task_weights", "mgda", "uniform"):
                assert all(p.grad is None for p in twin.heads)
    assert total >= 1


def test_a_streamed_step_refuses_what_would_spoil_it():
    setup = Setup("exact")
    losses, _ = setup.forward()
    saved = copy.deepcopy(setup.balancer.state_dict())
    setup.balancer.accumulate(0, losses[0], retain_graph=True, grad_scale=4.0)
    with pytest.raises(RuntimeError, match=r"finish\(\) before update_weights"):
        setup.balancer.update_weights([[torch.ones_like(p) for p in setup.shared]] * 3)
    with pytest.raises(RuntimeError, match=r"finish\(\) before load_state_dict"):
        setup.balancer.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"one `grad_scale` for all tasks of a step, but got 8.0"):
        setup.balancer.accumulate(1, losses[1], retain_graph=True, grad_scale=8.0)
    for task in (1, 2):
        scale = torch.tensor(4.0)  # the same number
        setup.balancer.accumulate(task, losses[task], retain_graph=True, grad_scale=scale)
    setup.balancer.finish()
    want = by_hand(losses, setup.shared, setup.balancer.task_weights)
    assert_grads(setup.shared, [4.0 * grad for grad in want])
    setup.balancer.load_state_dict(saved)


# ---- holding the weights, and steps that are skipped


@every_method
def test_held_weights_are_applied_and_neither_moved_nor_counted(name):
    setup = Setup(name)
    state, extra = state_of(setup.balancer), setup.balancer.host_state()
    reference, _ = setup.forward()
    with setup.balancer.hold_weights():
        for _ in range(2):
            setup.problem.zero_grad()
            setup.step(*setup.forward())
    assert state_of(setup.balancer) == state
    assert setup.balancer.host_state() == extra
    assert_grads(setup.shared, by_hand(reference, setup.shared, setup.balancer.task_weights))
    setup.step(*setup.forward())
    assert setup.balancer.num_calls == 4


def test_lbfgs_closures_hold_the_weights():
    setup = Setup("exact")
    optimizer = torch.optim.LBFGS(setup.problem.parameters(), max_iter=4)
    weights = setup.balancer.task_weights.clone()
    num_closures = 0

    def closure() -> Tensor:
        nonlocal num_closures
        num_closures += 1
        optimizer.zero_grad()
        losses, _ = setup.forward()
        setup.balancer.backward(losses)
        return torch.stack(losses).detach() @ setup.balancer.task_weights

    with setup.balancer.hold_weights():
        optimizer.step(closure)
    assert num_closures > 1
    assert torch.equal(setup.balancer.task_weights, weights)


def test_ten_skipped_steps_in_a_row_are_told_once():
    setup = Setup("exact")
    for number in range(9):
        losses, _ = setup.forward()
        setup.balancer.backward([losses[0] * float("nan"), *losses[1:]])
        if number == 4:  # a step that counts
            setup.balancer.backward(setup.forward()[0])
    for _ in range(5):
        losses, _ = setup.forward()
        setup.balancer.backward([losses[0] * float("nan"), *losses[1:]])
    losses, _ = setup.forward()
    with pytest.warns(SkippedStepsWarning, match=r"10 steps in a row .* \(15 in all\)"):
        setup.balancer.backward([losses[0] * float("nan"), *losses[1:]])
    losses, _ = setup.forward()
    setup.balancer.backward([losses[0] * float("nan"), *losses[1:]])


@pytest.mark.parametrize("name", ["exact", "mgda"])
def test_a_task_whose_labels_are_all_ignored_leaves_the_scalar_finite(name):
    setup = Setup(name)
    losses, _ = setup.forward()
    ignored = nn.functional.cross_entropy(
        setup.problem.heads[0](setup.problem.encoder(setup.problem.inputs)).expand(-1, 2),
        torch.full((20,), -100),
    )
    assert bool(ignored.isnan())
    scalar = setup.balancer([ignored, *losses[1:]])
    want = (setup.balancer.task_weights[1:] * torch.stack(losses[1:])).sum()
    torch.testing.assert_close(scalar.detach(), want.detach())
    scalar.backward()
    assert not bool(setup.balancer.found_nonfinite.any())
    if name == "mgda":
        assert setup.balancer.task_weights[0].item() == pytest.approx(1 / 3)  # as an absent one
        assert all(bool(p.grad.abs().sum() > 0) for p in setup.shared)


def test_risks_from_features_are_summed_in_float32_under_autocast():
    torch.manual_seed(0)
    results = []
    for inside in (False, True):
        problem = make_problem()
        balancer = published(encoder_of(problem), num_tasks=3, estimate_from="features")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = problem.encoder(problem.inputs)
            losses = [head(z).float().square().mean() for head in problem.heads]
            if inside:
                balancer.backward(losses, features=z)
        if not inside:
            balancer.backward(losses, features=z)
        results.append(balancer.sq_grad_sum.clone())
    assert torch.equal(*results)
