"""The toy problem's closed forms are true, and each method ends where the figure says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from excessmtl_ext.training.pictures.toy import TOY_METHODS, ToyProblem, draw_toy, run_toy

PROBLEMS = [
    ToyProblem(),
    ToyProblem(curvatures=(1.0, 1.0), label_stds=(0.2, 0.9)),
    ToyProblem(centres=((0.0, 1.0), (2.0, -1.0)), curvatures=(0.5, 3.0)),
]


def risk_share_of_noisy_task(method: str, start: tuple[float, float] = (0.0, 1.2)) -> float:
    risks = ToyProblem().excess_risks(run_toy(method, start=start).end)
    return float(risks[1] / risks.sum())


def on_circle(number: int) -> tuple[float, float]:
    angle = 2 * math.pi * number / 4
    return 1.5 * math.cos(angle), 1.5 * math.sin(angle)


def test_sampled_losses_and_gradients_are_those_of_the_closed_form():
    problem = ToyProblem(batch_size=200_000)
    theta = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    losses, grads = problem.sample(theta.detach(), torch.Generator().manual_seed(0))
    expected = problem.losses(theta)
    exact = torch.stack(
        [torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in expected]
    )
    # The standard error of the mean of 200,000 labels is under 0.005.
    torch.testing.assert_close(losses, expected.detach(), rtol=0, atol=0.02)
    torch.testing.assert_close(grads, exact, rtol=0, atol=0.02)


@pytest.mark.parametrize("problem", PROBLEMS, ids=["default", "equal curvature", "elsewhere"])
def test_no_point_of_a_dense_grid_beats_the_pareto_set(problem):
    axis = torch.linspace(-2, 3, 251, dtype=torch.float64)
    grid = problem.losses(torch.cartesian_prod(axis, axis))
    for share in torch.linspace(0, 1, 21, dtype=torch.float64):
        best = problem.losses(problem.pareto_set(share))
        dominates = (grid <= best + 1e-12).all(1) & (grid < best - 1e-12).any(1)
        assert not bool(dominates.any())


@pytest.mark.parametrize("problem", PROBLEMS[:2], ids=["default", "equal curvature"])
def test_the_named_points_are_equal_in_what_they_say_and_lie_on_the_front(problem):
    first, second = problem.losses(problem.equal_loss_point).tolist()
    assert first == pytest.approx(second)
    first, second = problem.excess_risks(problem.equal_excess_risk_point).tolist()
    assert first == pytest.approx(second)
    for point in (problem.equal_loss_point, problem.equal_excess_risk_point):
        share = (point[0] - problem.centres[0][0]) / (problem.centres[1][0] - problem.centres[0][0])
        torch.testing.assert_close(point, problem.pareto_set(share))


@pytest.mark.parametrize("label_stds", [(0.1, 9.0), (9.0, 0.1)])
def test_losses_that_noise_keeps_apart_are_an_error(label_stds):
    with pytest.raises(ValueError, match="Expected `label_stds` that leave a point of equal"):
        _ = ToyProblem(label_stds=label_stds).equal_loss_point


def test_loss_weighting_ends_at_equal_losses_and_pays_for_noise():
    problem = ToyProblem()
    end = run_toy("groupdro").end
    torch.testing.assert_close(end, problem.equal_loss_point, rtol=0, atol=0.01)
    clean, noisy = problem.excess_risks(end).tolist()
    assert clean > 3 * noisy


def test_true_risks_end_at_equal_excess_risks_and_spare_the_clean_task():
    problem = ToyProblem()
    end = run_toy("true-risks").end
    torch.testing.assert_close(end, problem.equal_excess_risk_point, rtol=0, atol=0.01)
    losses = problem.losses(end)
    assert losses[1] > 2 * losses[0]


def test_uniform_weights_end_at_neither():
    assert risk_share_of_noisy_task("uniform") == pytest.approx(0.8, abs=0.01)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::excessmtl_ext.TaskCollapseWarning")  # from some starts it does
def test_where_the_published_estimate_ends_depends_on_where_it_began():
    shares = [risk_share_of_noisy_task("official", on_circle(number)) for number in range(4)]
    assert max(shares) - min(shares) > 0.4
    exact = [risk_share_of_noisy_task("true-risks", on_circle(number)) for number in range(4)]
    assert max(exact) - min(exact) < 0.01


@pytest.mark.parametrize("method", ["official", "recommended"])
def test_the_estimates_end_on_the_pareto_front(method):
    x, y = run_toy(method).end.tolist()
    assert abs(y) < 0.01
    assert -1 < x < 1


def test_equal_seeds_give_equal_runs_and_weights_on_the_simplex():
    one, same, other = (run_toy("recommended", num_steps=50, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.thetas, same.thetas)
    assert not torch.equal(one.thetas, other.thetas)
    assert one.thetas.shape == (51, 2)
    torch.testing.assert_close(one.task_weights.sum(1), torch.ones(50, dtype=torch.float64))


def test_an_unknown_method_is_an_error():
    with pytest.raises(ValueError, match="Expected `method` to be one of uniform, groupdro"):
        run_toy("mgda")


def test_draws_the_figure(tmp_path: Path):
    pytest.importorskip("matplotlib")
    runs = draw_toy(tmp_path / "new" / "toy.png")
    assert [run.method for run in runs] == list(TOY_METHODS)
    assert (tmp_path / "new" / "toy.png").read_bytes().startswith(b"\x89PNG")
