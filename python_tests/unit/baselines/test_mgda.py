"""MGDA: the weights satisfy the optimality conditions of the minimum-norm problem, degenerate cases included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _inputs import make_problem

from excessmtl_ext import MGDA
from excessmtl_ext.baselines.mgda import min_norm_weights


def jacobians() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    cases = {}
    for num_tasks in (1, 2, 3, 4, 7, 20, 60):
        cases[f"random, {num_tasks}"] = randn(num_tasks, 100)
        # A common part keeps 0 out of the hull, so that the support is small and the minimum sharp.
        lengths = torch.rand(num_tasks, 1, generator=generator, dtype=torch.float64)
        cases[f"with a common part, {num_tasks}"] = 3 * lengths * randn(num_tasks, 100) + randn(
            1, 100
        )
    base = randn(4, 50)
    lengths = torch.tensor([[1e-6], [1.0], [1e3], [1e7]], dtype=torch.float64)
    cases["lengths from 1e-6 to 1e7"] = base * lengths
    cases["duplicates"] = base[[0, 0, 1, 1, 2, 0]]
    cases["nearly duplicates"] = base[[0, 0, 1]] + 1e-9 * randn(3, 50)
    cases["one direction, several lengths"] = base[:1] * torch.tensor(
        [[3.0], [1.0], [2.0]], dtype=torch.float64
    )
    cases["opposite"] = torch.cat([base[:1], -2 * base[:1]])
    cases["opposite and a third"] = torch.cat([base[:1], -2 * base[:1], base[1:2]])
    cases["more tasks than dimensions"] = randn(12, 3)
    cases["more tasks than dimensions, 0 outside"] = randn(12, 3) + 5
    cases["a plane, 0 outside"] = randn(8, 2) @ randn(2, 30) + 4 * randn(1, 30)
    cases["one zero"] = torch.cat([base, torch.zeros(1, 50, dtype=torch.float64)])
    cases["all zero"] = torch.zeros(3, 5, dtype=torch.float64)
    return cases


JACOBIANS = jacobians()
every_jacobian = pytest.mark.parametrize("jacobian", JACOBIANS.values(), ids=JACOBIANS.keys())


def assert_is_minimum(weights: torch.Tensor, jacobian: torch.Tensor) -> None:
    """KKT: weights on the simplex; no gradient's projection on the point is below the point's squared length."""
    assert weights.min() >= 0
    assert weights.sum().item() == pytest.approx(1.0, rel=1e-12)
    point = weights @ jacobian
    projections = jacobian @ point
    squared = point @ point
    # By Cauchy-Schwarz the point is then within sqrt(slack) of the true minimum; in units of the gradients.
    norms = jacobian.norm(dim=1)
    slack = 1e-10 * norms.min() * norms.clamp(min=norms.min())
    assert bool((projections >= squared - slack).all())
    # Complementary slackness: only gradients of the smallest projection carry weight.
    assert bool((weights * (projections - squared) <= slack).all())


@every_jacobian
def test_weights_satisfy_the_kkt_conditions(jacobian):
    weights = torch.from_numpy(min_norm_weights((jacobian @ jacobian.T).numpy()))
    assert_is_minimum(weights, jacobian)


@every_jacobian
def test_balancer_satisfies_them_from_the_gradients(jacobian):
    weights = MGDA(num_tasks=len(jacobian)).update_weights(jacobian)
    has_gradient = jacobian.square().sum(dim=1) > 0
    if not has_gradient.any():
        has_gradient[:] = True
    share = has_gradient.double().mean()  # the others count as absent
    assert_is_minimum(weights[has_gradient] / share, jacobian[has_gradient])
    each = 1.0 / len(jacobian)
    assert weights[~has_gradient].tolist() == [each] * int((~has_gradient).sum())


@pytest.mark.parametrize("seed", range(50))
def test_no_other_point_of_the_hull_is_shorter(seed):
    generator = np.random.default_rng(seed)
    num_tasks = int(generator.integers(2, 9))
    jacobian = generator.normal(size=(num_tasks, 10)) + generator.normal(size=(1, 10))
    weights = min_norm_weights(jacobian @ jacobian.T)
    others = generator.dirichlet(np.ones(num_tasks), size=500)
    length = np.linalg.norm(weights @ jacobian)
    assert length <= np.linalg.norm(others @ jacobian, axis=1).min() * (1 + 1e-12)


def test_two_tasks_have_the_closed_form():
    # Sener & Koltun 2018, Sec. 3.2: the share of the first is g2 (g2 - g1) / |g1 - g2|^2, clipped to [0, 1].
    for _ in range(100):
        first, second = torch.randn(2, 3, dtype=torch.float64) * torch.rand(2, 1).double()
        share = (second @ (second - first) / (first - second).square().sum()).clamp(0, 1)
        weights = MGDA(num_tasks=2).update_weights(torch.stack([first, second]))
        torch.testing.assert_close(weights, torch.stack([share, 1 - share]))


def test_the_step_descends_on_every_task():
    problem = make_problem(dtype=torch.float64)
    shared = list(problem.encoder.parameters())
    balancer = MGDA(shared, num_tasks=3)
    balancer.backward(problem.losses())
    direction = torch.cat([p.grad.reshape(-1) for p in shared])
    for loss in problem.losses():
        grads = torch.autograd.grad(loss, shared, retain_graph=True)
        along = torch.cat([g.reshape(-1) for g in grads]) @ direction
        assert along >= direction.square().sum() * (1 - 1e-9) > 0


def test_a_scale_common_to_all_losses_changes_nothing():
    jacobian = torch.randn(4, 20, dtype=torch.float64)
    plain = MGDA(num_tasks=4).update_weights(jacobian)
    torch.testing.assert_close(MGDA(num_tasks=4).update_weights(jacobian * 1e8), plain)


def test_a_permutation_of_the_tasks_permutes_the_weights():
    jacobian = torch.randn(5, 20, dtype=torch.float64)
    order = torch.tensor([3, 0, 4, 1, 2])
    plain = MGDA(num_tasks=5).update_weights(jacobian)
    torch.testing.assert_close(MGDA(num_tasks=5).update_weights(jacobian[order]), plain[order])
