"""1 / norm: task gradients of one norm."""

from __future__ import annotations

import torch
from torch import Tensor

from excessmtl_ext.balancer import Balancer
from excessmtl_ext.baselines.gradient_norms import tensor_norms
from excessmtl_ext.baselines.gramian import move_to_gradients
from excessmtl_ext.step import Step


class InverseNorm(Balancer):
    r"""Brings the shared gradients of all tasks to one norm before they are added.

    .. math:: \alpha_i \propto 1 / \|g_i\|

    with :math:`g_i` the whole gradient of this step: one number per task, without memory. The rule
    is the second half of DB-MTL (Lin et al. 2023, https://arxiv.org/abs/2308.12029, Sec. 3.2) on
    plain gradients; :class:`DualBalancing` is all of it.

    Args: see :class:`excessmtl_ext.Balancer`.

    Absent tasks, and those whose gradient is zero, keep their weight, and the others share the rest.
    ``accumulate`` raises NotImplementedError. No step waits for the device.

    Example:
        >>> import torch
        >>> balancer = InverseNorm(num_tasks=2)
        >>> balancer.update_weights(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).round(decimals=6).tolist()
        [0.166667, 0.833333]
    """

    requires = frozenset({"task_grads"})

    can_stream = False

    def update(self, step: Step) -> None:
        """Sets the weights from the norms."""
        grads = step.task_grads.tensors
        move_to_gradients(self, grads)
        norms = torch.linalg.vector_norm(
            tensor_norms(grads, self.num_tasks, step.grad_scale), dim=1
        )
        self.found_nonfinite.copy_(~norms.isfinite())
        is_finite = ~self.found_nonfinite.any()
        has_grad = norms > 0
        before = self.log_task_weights
        moved = share_of(has_grad, -norms.log()) + share_mass(has_grad, before)
        before.copy_(torch.where(has_grad & is_finite, moved, before))
        self.task_weights.copy_(self.weight_total * before.softmax(0))
        self.num_steps += is_finite
        self.num_skipped_steps += ~is_finite


def share_of(is_present: Tensor, log_weights: Tensor) -> Tensor:
    """Brings log-weights [T] to sum 1 over the tasks that are present."""
    return log_weights - share_mass(is_present, log_weights)


def share_mass(is_present: Tensor, log_weights: Tensor) -> Tensor:
    """Returns [], logarithm of the weight that the present tasks have together."""
    return torch.where(is_present, log_weights, float("-inf")).logsumexp(0)
