"""Norms of the task gradients, tensor by tensor: what GradNorm, DB-MTL and 1 / norm begin with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tensor_norms(
    task_grads: Sequence[Tensor], num_tasks: int, grad_scale: Tensor | None = None
) -> Tensor:
    """Returns norm of each gradient.

    Args:
        task_grads: T * L gradients, task-major; one without elements stands for zeros.
        num_tasks: T.
        grad_scale: Factor that the gradients carry, to be undone.

    Returns:
        [T, L] float64, on the device of the gradients. Not finite where a gradient is not.
    """
    norms = torch.stack(
        [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in task_grads]
    ).view(num_tasks, -1)
    return norms if grad_scale is None else norms / grad_scale.to(norms)
