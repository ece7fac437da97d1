"""The torchjd adapter against torchjd: its mtl_backward, its own ExcessMTL, and its way of saving state."""

from __future__ import annotations

import copy

import pytest
import torch
from _asserts import assert_equal_bits
from _inputs import Problem, make_problem
from _published import published

from excessmtl_ext import IMTL, MGDA, MOML, ExcessMTL, GradNorm, GroupDRO, Uniform

pytest.importorskip("torchjd", reason="torchjd is not installed")

from torchjd import Stateful
from torchjd.aggregation import Aggregator, Weighting
from torchjd.aggregation import ExcessMTL as TorchJDExcessMTL
from torchjd.autojac import jac_to_grad, mtl_backward

from excessmtl_ext.integrations import torchjd as adapter
from excessmtl_ext.integrations.torchjd import BalancerAggregator, BalancerWeighting

METHODS = {
    "ExcessMTL": lambda: published(num_tasks=3, robust_step_size=0.5),
    "momentum": lambda: published(num_tasks=3, gradient_momentum=0.9, min_weight=0.05),
    "num_tasks scale": lambda: published(num_tasks=3, weight_scale="num_tasks"),
    "MGDA": lambda: MGDA(num_tasks=3),
    "IMTL-G": lambda: IMTL(num_tasks=3, variant="G"),
    "Uniform": lambda: Uniform(num_tasks=3),
}


def jacobian_step(problem: Problem, aggregator: Aggregator) -> torch.Tensor | None:
    """What torchjd's users write; returns the weights that torchjd saw."""
    features = problem.encoder(problem.inputs)
    losses = [
        (head(features)[:, 0] - problem.targets[:, task]).square().mean()
        for task, head in enumerate(problem.heads)
    ]
    mtl_backward(losses, features=features)
    return jac_to_grad(problem.encoder.parameters(), aggregator)


def train(problem: Problem, aggregator: Aggregator, num_steps: int) -> list[torch.Tensor | None]:
    optimizer = torch.optim.SGD(problem.parameters(), lr=0.05)
    seen = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        seen.append(jacobian_step(problem, aggregator))
        optimizer.step()
    return seen


@pytest.mark.parametrize("make", METHODS.values(), ids=list(METHODS))
def test_mtl_backward_trains_as_the_balancers_own_backward(make):
    theirs, ours = make_problem(), make_problem()
    aggregator = BalancerAggregator(make())
    train(theirs, aggregator, 6)
    balancer = type(make())(ours.encoder.parameters(), **{**make().options(), "nonfinite": "raise"})
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05)
    for _ in range(6):
        optimizer.zero_grad()
        balancer.backward(ours.losses())
        optimizer.step()
    torch.testing.assert_close(
        aggregator.balancer.task_weights, balancer.task_weights, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(theirs.parameters(), ours.parameters(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight_scale", ["simplex", "num_tasks"])
def test_one_warmup_step_gives_the_weights_of_torchjds_own_excessmtl(weight_scale):
    """Theirs adds 1e-7 to the baseline; everything else is the same formula."""
    theirs = TorchJDExcessMTL(robust_step_size=0.3, n_warmup_steps=1)
    ours = BalancerAggregator(
        published(num_tasks=3, robust_step_size=0.3, weight_scale=weight_scale)
    )
    scale = torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64)
    for _ in range(20):
        matrix = torch.randn(3, 50, dtype=torch.float64) * scale
        expected = theirs.weighting(matrix) * ours.balancer.weight_total
        torch.testing.assert_close(ours.weighting(matrix), expected, rtol=1e-6, atol=0)


def test_torchjd_reads_the_weights_that_made_the_gradient():
    problem = make_problem()
    aggregator = BalancerAggregator(published(num_tasks=3, robust_step_size=1.0))
    seen = train(problem, aggregator, 4)
    assert torch.equal(seen[-1], aggregator.balancer.task_weights.float())
    assert not torch.equal(seen[0], seen[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_weights_have_the_type_and_place_of_the_matrix(dtype, device):
    weights = BalancerWeighting(published(num_tasks=2))(
        torch.randn(2, 40, dtype=dtype, device=device)
    )
    assert (weights.dtype, weights.device.type) == (dtype, device.type)
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("make", METHODS.values(), ids=list(METHODS))
def test_a_saved_and_loaded_aggregator_continues_bit_for_bit(make, tmp_path):
    problem, aggregator = make_problem(), BalancerAggregator(make())
    train(problem, aggregator, 3)
    torch.save(aggregator.state_dict(), tmp_path / "aggregator.pt")
    resumed_problem, resumed = copy.deepcopy(problem), BalancerAggregator(make())
    resumed.load_state_dict(torch.load(tmp_path / "aggregator.pt"))
    train(problem, aggregator, 3)
    train(resumed_problem, resumed, 3)
    assert_equal_bits(resumed_problem.parameters(), problem.parameters())
    assert torch.equal(resumed.balancer.task_weights, aggregator.balancer.task_weights)


def test_torchjds_own_aggregator_cannot_load_what_it_saved():
    """The migration page says so: with a torchjd that can, the page is to be changed."""
    saved = TorchJDExcessMTL()
    saved(torch.randn(2, 5))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        TorchJDExcessMTL().load_state_dict(saved.state_dict())


def test_a_nonfinite_row_spoils_the_whole_gradient_and_no_state():
    """As Balancer.backward: nobody can step with half of a gradient."""
    aggregator = BalancerAggregator(published(num_tasks=2, robust_step_size=1.0))
    for _ in range(3):
        aggregator(torch.randn(2, 6))
    before = aggregator.balancer.task_weights.clone()
    bad = torch.randn(2, 6)
    bad[1, 2] = float("inf")
    assert aggregator(bad).isnan().all()
    assert torch.equal(aggregator.balancer.task_weights, before)
    assert aggregator.balancer.num_skipped_steps.item() == 1
    assert aggregator(torch.randn(2, 6)).isfinite().all()


def test_reset_allows_another_size():
    aggregator = BalancerAggregator(published(num_tasks=2))
    aggregator(torch.randn(2, 6))
    with pytest.raises(ValueError, match=r"Call reset\(\)"):
        aggregator(torch.randn(2, 7))
    aggregator.reset()
    assert aggregator(torch.randn(2, 7)).shape == (7,)


def test_they_are_what_torchjd_calls_stateful_weightings_and_aggregators():
    aggregator = BalancerAggregator(published(num_tasks=2))
    assert isinstance(aggregator, Aggregator)
    assert isinstance(aggregator, Stateful)
    assert isinstance(aggregator.weighting, Weighting)
    assert isinstance(aggregator.weighting, Stateful)
    assert repr(aggregator).startswith("BalancerAggregator(ExcessMTL(num_tasks=2, ")


@pytest.mark.parametrize(
    "balancer",
    [
        GroupDRO(num_tasks=2),
        GradNorm(num_tasks=2),
        MOML(num_tasks=2),
        IMTL(num_tasks=2, variant="L"),
    ],
    ids=lambda b: type(b).__name__,
)
def test_methods_that_need_losses_are_refused(balancer):
    with pytest.raises(ValueError, match="works from task gradients"):
        BalancerWeighting(balancer)


def test_weighted_heads_are_refused():
    with pytest.raises(ValueError, match="Expected `head_weighting` 'none'"):
        BalancerAggregator(ExcessMTL.from_preset("official", num_tasks=2))


def test_a_class_in_place_of_a_balancer_is_refused():
    with pytest.raises(TypeError, match=r"an excessmtl_ext\.Balancer, but got"):
        BalancerAggregator(ExcessMTL)  # type: ignore[arg-type]


def test_docstring_examples_are_true():
    import doctest

    result = doctest.testmod(adapter)
    assert result.attempted > 0
    assert result.failed == 0
