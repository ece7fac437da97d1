"""Steps that look at fewer gradients: their equations by hand, and the exact step where they must agree with it."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from _asserts import assert_equal_bits
from _inputs import Problem, make_problem
from _published import published
from torch import Tensor, nn

from excessmtl_ext import ExcessMTL, functional, reference
from excessmtl_ext.engines.rotation import RotationEngine

RECOMMENDED: dict[str, Any] = {
    "fisher": "linear",
    "gradient_momentum": 0.98,
    "robust_step_size": 3.0,
}
BY_HAND: dict[str, Any] = {"robust_step_size": 1.0, "fisher": "linear", "eps": 1e-30}


def last_layer(problem: Problem) -> list[nn.Parameter]:
    return list(problem.encoder[2].parameters())  # type: ignore[index]


def make_balancer(problem: Problem, num_tasks: int = 3, **options: Any) -> ExcessMTL:
    if options.get("estimate_from") == "last layer":
        options["estimate_from"] = last_layer(problem)
    parameters = list(problem.encoder.parameters())
    return published(parameters, num_tasks=num_tasks, **{**RECOMMENDED, **options})


def change_batch(problem: Problem, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    problem.inputs = torch.randn(problem.inputs.shape, generator=generator)
    problem.targets = torch.randn(problem.targets.shape, generator=generator) * torch.arange(1, 4)


def features_and_losses(problem: Problem) -> tuple[Tensor, list[Tensor]]:
    """As ``Problem.losses``, with the features that they hang on."""
    features = problem.encoder(problem.inputs)
    return features, [
        ((head(features)[:, 0] - problem.targets[:, task]) ** 2).mean()
        for task, head in enumerate(problem.heads)
    ]


def step(problem: Problem, balancer: ExcessMTL, **factors: float) -> None:
    """One call, ``.grad`` not emptied; ``task0=float("nan")`` multiplies the first loss by it."""
    features, losses = features_and_losses(problem)
    for name, factor in factors.items():
        losses[int(name[4:])] *= factor
    balancer.backward(losses, features=features)


def backward(problem: Problem, balancer: ExcessMTL, absent: tuple[int, ...] = ()) -> None:
    problem.zero_grad()
    features, losses = features_and_losses(problem)
    balancer.backward(
        [None if task in absent else loss for task, loss in enumerate(losses)], features=features
    )


def count_encoder_passes(problem: Problem) -> list[int]:
    """A list that grows by one with every backward pass through the encoder's first layer."""
    passes: list[int] = []
    problem.encoder[0].register_forward_hook(  # type: ignore[index]
        lambda module, inputs, output: output.register_hook(lambda grad: passes.append(1)) and None
    )
    return passes


CHEAPER = {
    "subset": {"estimate_from": "last layer"},
    "features": {"estimate_from": "features"},
    "rotation": {"tasks_per_step": 1},
    "rotating subset": {"estimate_from": "last layer", "tasks_per_step": 2},
}
cheaper = pytest.mark.parametrize("options", CHEAPER.values(), ids=CHEAPER)


# ---- a subset of the parameters


def test_risks_from_a_subset_follow_the_equations_by_hand():
    """The example of the class, g = 3 and 1, then 4 and 1, is task gradients of `seen`; `unseen` only gets the sum."""
    seen, unseen = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
    balancer = published([unseen, seen], num_tasks=2, estimate_from=[seen], **BY_HAND)
    balancer.backward([3 * seen + 5 * unseen, seen + 7 * unseen])
    assert balancer.task_weights.tolist() == [0.5, 0.5]
    seen.grad = unseen.grad = None
    balancer.backward([4 * seen + 5 * unseen, seen + 7 * unseen])
    expected = torch.tensor([16 / 25, 1 / 2], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(balancer.task_weights, expected, rtol=1e-6, atol=0)
    assert seen.grad is not None
    assert unseen.grad is not None
    assert seen.grad.item() == pytest.approx(float(expected @ torch.tensor([4.0, 1.0]).double()))
    assert unseen.grad.item() == pytest.approx(float(expected @ torch.tensor([5.0, 7.0]).double()))


def test_all_parameters_as_the_subset_is_the_exact_step():
    exact_problem, problem = make_problem(), make_problem()
    exact = make_balancer(exact_problem)
    subset = make_balancer(problem, estimate_from=list(problem.encoder.parameters()))
    for number in range(5):
        for p, b in ((exact_problem, exact), (problem, subset)):
            change_batch(p, number)
            backward(p, b)
        torch.testing.assert_close(subset.task_weights, exact.task_weights, rtol=1e-6, atol=0)
        torch.testing.assert_close(problem.grads(), exact_problem.grads())
    assert_equal_bits([subset.sq_grad_sum], [exact.sq_grad_sum])


def test_risks_from_a_subset_are_those_of_the_reference_on_its_gradients():
    problem = make_problem()
    subset = last_layer(problem)
    balancer = make_balancer(problem, estimate_from=subset)
    layout = functional.ParamLayout([parameter.numel() for parameter in subset])
    state = functional.init_state(3, layout, has_momentum=True)
    for number in range(4):
        change_batch(problem, number)
        rows = [torch.autograd.grad(loss, subset, retain_graph=True) for loss in problem.losses()]
        flat = [grad for row in rows for grad in row]
        reference.fused_step_(flat, layout, state, balancer.step_options)
        backward(problem, balancer)
    torch.testing.assert_close(balancer.task_weights, state.task_weights, rtol=1e-6, atol=0)
    torch.testing.assert_close(balancer.sq_grad_sum, state.sq_grad_sum)


def test_the_state_is_as_small_as_the_subset():
    problem = make_problem()
    balancer = make_balancer(problem, estimate_from="last layer")
    backward(problem, balancer)
    assert balancer.sq_grad_sum.shape == (3, 128 + 32)  # 16 x 8 weights and 8 biases, padded to 32


# ---- the features


class Adapted(nn.Module):
    """An encoder with the adapter that the risks of the features are about: z -> A z, A = I."""

    def __init__(self, encoder: nn.Module, num_features: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.adapter = nn.Linear(num_features, num_features, bias=False)
        with torch.no_grad():
            self.adapter.weight.copy_(torch.eye(num_features))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.adapter(self.encoder(inputs))


def test_risks_from_features_follow_the_equations_by_hand():
    """Two samples, z = 1 and 2: g = slope * (1 + 2) is 3 and 1, then 4 and 1, as in the example of the class."""
    shared = nn.Parameter(torch.ones(1, 1))
    balancer = published([shared], num_tasks=2, estimate_from="features", **BY_HAND)
    expected = torch.tensor([16 / 25, 1 / 2], dtype=torch.float64).softmax(0).tolist()
    for slopes, after in (((1.0, 1 / 3), [0.5, 0.5]), ((4 / 3, 1 / 3), expected)):
        shared.grad = None
        features = torch.tensor([[1.0], [2.0]]) @ shared
        balancer.backward([slope * features.sum() for slope in slopes], features=features)
        assert balancer.task_weights.tolist() == pytest.approx(after, rel=1e-5)
        assert shared.grad is not None
        total = after[0] * slopes[0] + after[1] * slopes[1]
        assert shared.grad.item() == pytest.approx(3 * total, rel=1e-5)


def test_risks_from_features_are_those_of_an_adapter_behind_the_encoder():
    plain, adapted = make_problem(), make_problem()
    adapted.encoder = Adapted(adapted.encoder, 8)
    from_features = make_balancer(plain, estimate_from="features")
    adapter = [adapted.encoder.adapter.weight]
    from_adapter = make_balancer(adapted, estimate_from=adapter)
    for number in range(5):
        for problem in (plain, adapted):
            change_batch(problem, number)
        backward(plain, from_features)
        backward(adapted, from_adapter)
        torch.testing.assert_close(
            from_features.task_weights, from_adapter.task_weights, rtol=1e-6, atol=0
        )
    torch.testing.assert_close(from_features.sq_grad_sum, from_adapter.sq_grad_sum)


def test_positions_of_a_feature_map_share_the_adapter():
    """[B, C, H, W]: a 1 x 1 convolution; the same numbers as samples [B * H * W, C]."""
    encoder = nn.Conv2d(1, 3, 3)
    risks = []
    for as_samples in (False, True):
        balancer = published(encoder.parameters(), num_tasks=2, estimate_from="features")
        features = encoder(torch.ones(2, 1, 5, 5) + torch.arange(5.0))
        z = features.movedim(1, -1).flatten(0, -2) if as_samples else features
        dims = (0,) if as_samples else (0, 2, 3)
        balancer.backward([z.square().sum(dims)[0], z.exp().sum(dims)[1]], features=z)
        risks.append(balancer.excess_risk)
    torch.testing.assert_close(risks[0], risks[1], rtol=1e-6, atol=0)


def test_features_of_each_task_alone_have_adapters_of_their_own():
    """As where every task has inputs of its own: a task that does not reach a feature has no gradient there."""
    problem = make_problem()
    balancer = make_balancer(problem, estimate_from="features")
    features = [problem.encoder(problem.inputs + task) for task in range(3)]
    losses = [
        (head(z)[:, 0] - problem.targets[:, task]).square().mean()
        for task, (head, z) in enumerate(zip(problem.heads, features, strict=True))
    ]
    balancer.backward(losses, features=features)
    sums = balancer.sq_grad_sum.reshape(3, 3, 64)
    assert bool((sums.diagonal(dim1=0, dim2=1).sum(0) > 0).all())
    assert sums.sum().item() == pytest.approx(sums.diagonal(dim1=0, dim2=1).sum().item())


@pytest.mark.parametrize("num_tasks", [2, 8])
def test_a_step_from_features_walks_the_encoder_once(num_tasks):
    problem = make_problem(num_tasks)
    balancer = make_balancer(problem, num_tasks, estimate_from="features")
    passes = count_encoder_passes(problem)
    for number in range(1, 4):
        backward(problem, balancer)
        assert len(passes) == number


# ---- rotation


def test_rotation_follows_the_equations_by_hand():
    """Two rounds of two steps: g = 3 then 1 set the baselines, 4 then 1 move the weights, as in the class's example."""
    shared = nn.Parameter(torch.zeros(()))
    balancer = published([shared], num_tasks=2, tasks_per_step=1, **BY_HAND)
    slopes = [(3.0, 9.0), (9.0, 1.0), (4.0, 9.0), (9.0, 1.0)]  # 9 is never looked at
    expected = torch.tensor([16 / 25, 1 / 2], dtype=torch.float64).softmax(0).tolist()
    weights = [[0.5, 0.5]] * 3 + [expected]
    for slope, after in zip(slopes, weights, strict=True):
        shared.grad = None
        balancer.backward([slope[0] * shared, slope[1] * shared])
        assert balancer.task_weights.tolist() == pytest.approx(after, rel=1e-6)
        assert shared.grad is not None
        assert shared.grad.item() == pytest.approx(after[0] * slope[0] + after[1] * slope[1])
    assert balancer.num_task_steps.tolist() == [2, 2]
    assert int(balancer.num_steps) == 2  # what num_warmup_steps counts: rounds


@pytest.mark.parametrize("tasks_per_step", [1, 2])
def test_a_round_over_one_batch_is_one_exact_step(tasks_per_step):
    exact_problem, problem = make_problem(), make_problem()
    exact, rotating = (
        make_balancer(exact_problem),
        make_balancer(problem, tasks_per_step=tasks_per_step),
    )
    for number in range(5):
        change_batch(exact_problem, number)
        change_batch(problem, number)
        backward(exact_problem, exact)
        for _ in range(-(-3 // tasks_per_step)):
            backward(problem, rotating)
        torch.testing.assert_close(rotating.task_weights, exact.task_weights, rtol=1e-6, atol=0)
        torch.testing.assert_close(problem.grads(), exact_problem.grads())
    torch.testing.assert_close(rotating.sq_grad_sum, exact.sq_grad_sum)
    torch.testing.assert_close(rotating.grad_mean, exact.grad_mean)


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_every_task_in_every_step_is_the_exact_step(num_tasks):
    results = []
    for tasks_per_step in (None, num_tasks):
        problem = make_problem(num_tasks)
        balancer = make_balancer(problem, num_tasks, tasks_per_step=tasks_per_step)
        for _ in range(3):
            backward(problem, balancer)
        results.append([*problem.grads(), balancer.task_weights, balancer.sq_grad_sum])
    assert_equal_bits(*results)


@pytest.mark.parametrize("num_tasks", [2, 8])
def test_a_rotation_step_walks_the_encoder_twice_however_many_tasks_there_are(num_tasks):
    problem = make_problem(num_tasks)
    balancer = make_balancer(problem, num_tasks, tasks_per_step=1)
    passes = count_encoder_passes(problem)
    for number in range(1, 4):
        backward(problem, balancer)
        assert len(passes) == 2 * number


def test_an_absent_task_has_its_turn_later_in_the_round():
    problem = make_problem()
    balancer = make_balancer(problem, tasks_per_step=1)
    backward(problem, balancer, absent=(0,))
    assert balancer.num_task_steps.tolist() == [0, 1, 0]
    backward(problem, balancer)
    assert balancer.num_task_steps.tolist() == [1, 1, 0]
    backward(problem, balancer)
    assert balancer.num_task_steps.tolist() == [1, 1, 1]
    assert int(balancer.num_steps) == 1


def test_a_task_that_stays_away_does_not_keep_the_round_open():
    problem = make_problem()
    balancer = make_balancer(problem, tasks_per_step=1)
    for number in range(9):
        change_batch(problem, number)
        backward(problem, balancer, absent=(1,))
    assert balancer.num_task_steps.tolist() == [5, 0, 4]
    assert int(balancer.num_steps) == 4
    assert balancer.task_weights[1].item() == pytest.approx(1 / 3)  # it keeps what it had
    assert balancer.task_weights[0].item() != pytest.approx(1 / 3)
    assert balancer.task_weights.sum().item() == pytest.approx(1.0, abs=1e-14)


# ---- both


@cheaper
@pytest.mark.parametrize("head_weighting", ["none", "task_weights"])
def test_gradients_are_the_weighted_sum_and_each_heads_own(options, head_weighting):
    problem = make_problem()
    balancer = make_balancer(problem, head_weighting=head_weighting, **options)
    for number in range(6):
        change_batch(problem, number)
        backward(problem, balancer)
    actual = problem.grads()
    weights = balancer.task_weights.float()
    assert weights.max() > 0.36
    problem.zero_grad()
    losses = torch.stack(problem.losses())
    shared = torch.autograd.grad(
        losses @ weights, list(problem.encoder.parameters()), retain_graph=True
    )
    scales = weights if head_weighting == "task_weights" else torch.ones(3)
    heads = torch.autograd.grad(losses @ scales, list(problem.heads.parameters()))
    torch.testing.assert_close(actual, [*shared, *heads])


@cheaper
def test_gradients_are_added_to_what_is_there(options):
    problem, fresh = make_problem(), make_problem()
    balancer, other = make_balancer(problem, **options), make_balancer(fresh, **options)
    for parameter in problem.parameters():
        parameter.grad = torch.ones_like(parameter)
    step(problem, balancer)
    backward(fresh, other)
    torch.testing.assert_close(
        problem.grads(), [None if grad is None else grad + 1 for grad in fresh.grads()]
    )


@cheaper
def test_the_loss_scale_reaches_gradients_and_not_weights(options):
    plain, scaled = make_problem(), make_problem()
    balancers = make_balancer(plain, **options), make_balancer(scaled, **options)
    for number in range(4):
        change_batch(plain, number)
        change_batch(scaled, number)
        backward(plain, balancers[0])
        scaled.zero_grad()
        features, losses = features_and_losses(scaled)
        (balancers[1](losses, features=features) * 1024.0).backward()
    torch.testing.assert_close(
        balancers[1].task_weights, balancers[0].task_weights, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        [None if grad is None else grad / 1024.0 for grad in scaled.grads()], plain.grads()
    )


@cheaper
def test_a_gradient_that_is_not_finite_changes_no_state_and_is_counted(options):
    problem = make_problem()
    balancer = make_balancer(problem, **options)
    for number in range(4):
        change_batch(problem, number)
        backward(problem, balancer)
    engine = balancer.engine
    turn = engine.rotation.waiting[0] if isinstance(engine, RotationEngine) else 0
    before = {name: tensor.clone() for name, tensor in balancer.state_tensors().items()}
    problem.zero_grad()
    step(problem, balancer, **{f"task{turn}": float("nan")})
    assert bool(balancer.found_nonfinite[turn])
    assert int(balancer.num_skipped_steps) == 1
    assert all(
        bool(p.grad.isnan().all()) for p in problem.encoder.parameters() if p.grad is not None
    )
    names = ("task_weights", "relative_excess_risk", "num_task_steps", "num_steps")
    assert_equal_bits(
        [before[name][turn] if before[name].dim() else before[name] for name in names],
        [
            getattr(balancer, name)[turn] if before[name].dim() else getattr(balancer, name)
            for name in names
        ],
    )
    torch.testing.assert_close(balancer.sq_grad_sum[turn], before["sq_grad_sum"][turn])
    torch.testing.assert_close(balancer.grad_mean[turn], before["grad_mean"][turn])
    for number in range(4):
        change_batch(problem, 10 + number)
        backward(problem, balancer)
    assert bool(balancer.task_weights.isfinite().all())
    assert balancer.task_weights.sum().item() == pytest.approx(1.0, abs=1e-14)


@cheaper
def test_raise_leaves_the_shared_gradients_as_they_were(options):
    problem = make_problem()
    balancer = make_balancer(problem, nonfinite="raise", **options)
    for parameter in problem.encoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(FloatingPointError, match=r"task\(s\) \[0\]"):
        step(problem, balancer, task0=float("inf"))
    assert all(
        bool((p.grad == 1).all()) for p in problem.encoder.parameters() if p.grad is not None
    )


@cheaper
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_has_the_same_bits(options, stop):
    whole, part = make_problem(), make_problem()
    first, second = make_balancer(whole, **options), make_balancer(part, **options)
    for number in range(7):
        change_batch(whole, number)
        backward(whole, first)
        if number == stop:
            file = io.BytesIO()
            torch.save(first.state_dict(), file)
            file.seek(0)
            second.load_state_dict(torch.load(file, weights_only=True))
        if number > stop:
            change_batch(part, number)
            backward(part, second)
    assert_equal_bits(
        [*first.state_tensors().values(), *whole.grads()],
        [*second.state_tensors().values(), *part.grads()],
    )


@cheaper
def test_reset_begins_anew(options):
    problem = make_problem()
    balancer, fresh = make_balancer(problem, **options), make_balancer(problem, **options)
    for _ in range(4):
        backward(problem, balancer)
    balancer.reset()
    for b in (balancer, fresh):
        for _ in range(4):
            backward(problem, b)
    assert_equal_bits([*balancer.state_tensors().values()], [*fresh.state_tensors().values()])


@cheaper
def test_update_every_thins_out_the_estimate(options):
    """On the calls between, the state rests and the gradients carry the weights so far."""
    problem = make_problem()
    often, seldom = (
        make_balancer(problem, **options),
        make_balancer(problem, update_every=3, **options),
    )
    for number in range(9):
        change_batch(problem, number)
        if number % 3 == 0:
            backward(problem, often)
        backward(problem, seldom)
        assert_equal_bits([*often.state_tensors().values()], [*seldom.state_tensors().values()])


@cheaper
def test_history_and_report_know_these_steps(options):
    problem = make_problem()
    balancer = make_balancer(problem, **options)
    with balancer.record_history(gradients=True) as history:
        for number in range(6):
            change_batch(problem, number)
            backward(problem, balancer)
    records = history.records()
    assert records.steps.tolist() == [1, 2, 3, 4, 5, 6]
    norms = records.values["gradient_norm"]
    looked_at = norms.isfinite().sum(dim=1).tolist()
    per_step = balancer.tasks_per_step or 3
    assert all(number <= per_step and number >= 1 for number in looked_at)
    assert "task0" in str(balancer.report())


GRADIENT_ELEMENTS = {
    "subset": 3 * (128 + 8) + 248,
    "features": 3 * 8 * 8 + 248,
    "rotation": 248 + 248,
    "rotating subset": 2 * (128 + 8) + 248,
}


@pytest.mark.parametrize(
    ("options", "num_elements"),
    [(CHEAPER[name], number) for name, number in GRADIENT_ELEMENTS.items()],
    ids=GRADIENT_ELEMENTS,
)
def test_the_memory_report_counts_the_gradients_that_live(options, num_elements):
    """Those that risks are estimated from, and ``.grad`` of the 248 shared parameters."""
    problem = make_problem()
    balancer = make_balancer(problem, **options)
    backward(problem, balancer)
    report = balancer.memory_report()
    assert report.num_params == 248
    found = [entry.num_bytes for entry in report.entries if entry.name == "gradients"]
    assert found == [4 * num_elements]


# ---- what they cannot do


def test_errors_name_the_argument_and_the_way_out():
    problem = make_problem()
    stranger = [nn.Parameter(torch.zeros(3))]
    with pytest.raises(
        ValueError, match=r"`estimate_from\[0\]` to be one of the shared parameters"
    ):
        make_balancer(problem, estimate_from=stranger)
    with pytest.raises(ValueError, match="`estimate_from` to hold at least one parameter"):
        make_balancer(problem, estimate_from=[])
    with pytest.raises(ValueError, match="`estimate_from` to be one of 'parameters', 'features'"):
        make_balancer(problem, estimate_from="weights")
    with pytest.raises(ValueError, match="`tasks_per_step` >= 1, but got 0"):
        make_balancer(problem, tasks_per_step=0)
    with pytest.raises(ValueError, match="`tasks_per_step` <= num_tasks = 3, but got 4"):
        make_balancer(problem, tasks_per_step=4)
    with pytest.raises(
        ValueError, match="`shared_parameters` with `estimate_from` or `tasks_per_s"
    ):
        published(num_tasks=3, tasks_per_step=1)
    with pytest.raises(ValueError, match="no `tasks_per_step` with estimate_from='features'"):
        make_balancer(problem, estimate_from="features", tasks_per_step=1)
    with pytest.raises(ValueError, match="batched=False with `estimate_from` or `tasks_per_step`"):
        make_balancer(problem, tasks_per_step=1, batched=True)
    with pytest.raises(TypeError, match="`feature_dim` to be an integer"):
        make_balancer(problem, feature_dim="channels")
    features, losses = features_and_losses(problem)
    with pytest.raises(ValueError, match=r"`features` with estimate_from='features'.*features=z"):
        make_balancer(problem, estimate_from="features").backward(losses)
    with pytest.raises(
        ValueError, match=r"channels in dimension 2 \(`feature_dim`\), but got \[20"
    ):
        make_balancer(problem, estimate_from="features", feature_dim=2).backward(
            losses, features=features
        )
    features.register_hook(lambda grad: None)
    with pytest.raises(ValueError, match="can be cut, but a feature has a hook"):
        make_balancer(problem, estimate_from="features").backward(losses, features=features)


@cheaper
def test_streaming_says_what_to_call_instead(options):
    problem = make_problem()
    balancer = make_balancer(problem, **options)
    with pytest.raises(
        NotImplementedError, match=r"save the passes it runs.*Call backward\(losses\)"
    ):
        balancer.accumulate(0, problem.losses()[0])


def test_a_task_that_does_not_reach_the_subset_is_named():
    problem = make_problem()
    balancer = make_balancer(problem, estimate_from="last layer")
    losses = problem.losses()
    losses[1] = problem.encoder[0](problem.inputs).square().mean()  # type: ignore[index]
    with pytest.raises(ValueError, match=r"`losses\[1\]` to depend on the shared parameters"):
        balancer.backward(losses)
