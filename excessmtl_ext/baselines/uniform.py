"""Uniform weights: the plain mean of the task losses."""

from __future__ import annotations

from excessmtl_ext.sized_sum import SizedSum


class Uniform(SizedSum):
    r"""Every task weighs the same, always: :math:`\alpha_i = 1 / T`. One backward pass per step.

    Args: see :class:`SizedSum <excessmtl_ext.sized_sum.SizedSum>`.

    Example:
        >>> Uniform(num_tasks=4).task_weights.tolist()
        [0.25, 0.25, 0.25, 0.25]
    """

    requires = frozenset()

    has_uniform_weights = True
