"""MGDA: the shortest vector in the convex hull of the task gradients (Sener & Koltun, NeurIPS 2018)."""

from __future__ import annotations

import numpy as np

from excessmtl_ext.baselines.gramian import GramianBalancer, Matrix, unit_gramian

# A task may enter the support if its gradient's cosine with the present direction, in units of the shortest task
# gradient, violates optimality by more than this: rounding of the Gramian stays below it.
ENTRY_TOLERANCE = 1e-13


class MGDA(GramianBalancer):
    r"""Weights tasks by the shortest vector in the hull of their gradients (Sener & Koltun, NeurIPS 2018).

    After https://arxiv.org/abs/1810.04650:

    .. math:: \alpha = \arg\min_{\alpha \ge 0, \sum_i \alpha_i = 1} \Big\| \sum_i \alpha_i g_i \Big\|^2

    The direction lowers every task's loss equally fast where its weight is above zero, at least as
    fast where it is zero, and vanishes where no direction lowers all. Gradients are taken as they
    are: a task with a short gradient gets most of the weight.

    Args: see :class:`excessmtl_ext.Balancer`.

    A task that is absent from a batch, or whose gradient is zero, holds the weight 1 / T and the k
    others share k / T. ``accumulate`` raises NotImplementedError: all gradients must live at once.

    Example:
        >>> import torch
        >>> balancer = MGDA(num_tasks=2)
        >>> # The point of the segment from (2, 0) to (0, 1) that is nearest to 0 is (2/5, 4/5).
        >>> balancer.update_weights(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).round(decimals=6).tolist()
        [0.2, 0.8]
    """

    requires = frozenset({"task_grads"})

    def _solve(self, gramian: Matrix) -> Matrix | None:
        return min_norm_weights(gramian)


def min_norm_weights(gramian: Matrix) -> Matrix:
    r"""Solves :math:`\min_\alpha \alpha^\top G \alpha` over the simplex exactly, by an active set.

    The solver is our own because Frank-Wolfe with its usual limit of 100 iterations, as in torchjd
    0.18, leaves the optimality conditions violated by up to 4 % of the squared norm for 3 to 7
    random gradients (it is exact for two); a task's weight in a figure should not depend on where a
    solver gave up.

    The minimum is that of :math:`\|A \beta\|^2 + (r^\top \beta - 1)^2` over :math:`\beta \ge 0`, up
    to a factor, with the unit gradients as columns of A and :math:`r_i = \min_j \|g_j\| / \|g_i\|`:
    a non-negative least squares problem, solved by the method of Lawson and Hanson (1974), and well
    scaled whatever the lengths of the gradients are.

    Args:
        gramian: G [k, k].

    Returns:
        The weights [k], sum 1. Gradients that are zero share all of it.
    """
    is_zero = np.diagonal(gramian) == 0.0
    if is_zero.any():
        return is_zero / is_zero.sum()
    cosines, norms = unit_gramian(gramian)
    ratios = norms.min() / norms
    beta = _non_negative_minimum(cosines + np.outer(ratios, ratios), ratios)
    weights = beta * ratios
    return weights / weights.sum()


def _non_negative_minimum(matrix: Matrix, target: Matrix) -> Matrix:
    """Minimises b Q b / 2 - t b over b >= 0, for Q positive semi-definite (Lawson & Hanson 1974, Algorithm NNLS).

    Every round of the outer loop lowers the objective, so no support comes twice and it ends; the
    bound on the rounds is for rounding alone.
    """
    num = len(target)
    solution = np.zeros(num)
    support = np.zeros(num, dtype=bool)
    refused = np.zeros(num, dtype=bool)
    for _ in range(10 * num):
        descent = target - matrix @ solution
        descent[support | refused] = -np.inf
        entering = int(descent.argmax())
        if descent[entering] <= ENTRY_TOLERANCE:
            break
        support[entering] = True
        candidate = _minimum_on(matrix, target, support)
        if candidate[entering] <= 0.0:
            # Only rounding lets a column in that leads downhill nowhere: it depends on the support.
            support[entering] = False
            refused[entering] = True
            continue
        while (candidate[support] <= 0.0).any():
            leaving = support & (candidate <= 0.0)
            steps = solution[leaving] / (solution[leaving] - candidate[leaving])
            solution += steps.min() * (candidate - solution)
            support &= solution > 0.0
            support[np.flatnonzero(leaving)[steps.argmin()]] = False
            solution[~support] = 0.0
            candidate = _minimum_on(matrix, target, support)
        solution = candidate
        refused[:] = False
    return solution


def _minimum_on(matrix: Matrix, target: Matrix, support: np.ndarray) -> Matrix:
    candidate = np.zeros(len(target))
    # Least squares, as the columns of a support may depend on each other up to rounding.
    candidate[support] = np.linalg.lstsq(
        matrix[np.ix_(support, support)], target[support], rcond=None
    )[0]
    return candidate
