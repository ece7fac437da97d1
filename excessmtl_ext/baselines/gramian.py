"""Weights from the inner products of the task gradients: what MGDA, MOML and IMTL-G have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from excessmtl_ext.balancer import Balancer
from excessmtl_ext.step import Batched, HeadWeighting, NonFinite, Step, WeightScale

Matrix = npt.NDArray[np.float64]

BLOCK_NUMEL = 1 << 20
"""Float64 elements of the gradients that are in work at a time: 8 MiB, whatever T and P are."""


def task_gramian(
    task_grads: Sequence[Tensor], num_tasks: int, grad_scale: Tensor | None = None
) -> Tensor:
    """Returns the inner products of the task gradients, in float64 and without a copy of the gradients as a whole.

    Args:
        task_grads: T * L gradients, task-major; one without elements stands for zeros.
        num_tasks: T.
        grad_scale: Factor that the gradients carry, to be undone.

    Returns:
        [T, T], float64, on the device of the gradients. Row and column of a task whose gradients
        are not finite are not finite, its diagonal element among them.
    """
    given = next((grad for grad in task_grads if grad.numel() > 0), None)
    device = task_grads[0].device if given is None else given.device
    gramian = torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device=device)
    num_tensors = len(task_grads) // num_tasks
    block_numel = max(1, BLOCK_NUMEL // num_tasks)
    for index in range(num_tensors):
        rows = [
            (task, grad.reshape(-1))
            for task, grad in enumerate(task_grads[index::num_tensors])
            if grad.numel() > 0
        ]
        numel = rows[0][1].numel() if rows else 0
        for start in range(0, numel, block_numel):
            stop = min(start + block_numel, numel)
            block = gramian.new_zeros(num_tasks, stop - start)
            for task, row in rows:
                block[task].copy_(row[start:stop])
            gramian += block @ block.T
    return gramian if grad_scale is None else gramian / grad_scale.to(gramian).square()


class GramianBalancer(Balancer):
    """Base of the methods that compute their weights anew in every step from the Gramian of the task gradients.

    The Gramian is solved on the CPU: one wait for the device per step. As the weights have no
    memory and may be zero or negative, there are no log-weights, and a task that is absent from a
    batch counts as uniform: it holds 1 / T, and the k tasks that are present share k / T. (If it
    kept its weight, a task with weight 1 would leave nothing to the others.) So does one whose
    gradient is zero, whatever its loss is: all its labels are missing.
    """

    can_stream = False

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | nn.Module | None = None,
        *,
        num_tasks: int,
        weight_scale: WeightScale = "simplex",
        head_weighting: HeadWeighting = "none",
        nonfinite: NonFinite = "skip",
        batched: Batched = False,
        copy_gradients: bool = False,
    ) -> None:
        super().__init__(
            shared_parameters,
            num_tasks=num_tasks,
            weight_scale=weight_scale,
            head_weighting=head_weighting,
            nonfinite=nonfinite,
            batched=batched,
            copy_gradients=copy_gradients,
        )
        self.set_state(self.initial_state(self.task_weights.device))

    def initial_state(self, device: torch.device) -> dict[str, Tensor]:
        """Leaves out the log-weights."""
        state = super().initial_state(device)
        if not self.can_stream:
            del state["log_task_weights"]
        return state

    @abstractmethod
    def _solve(self, gramian: Matrix) -> Matrix | None:
        """Weights [k] of sum 1 from the Gramian [k, k] of the present tasks; None where it determines none."""

    def _weigh(self, step: Step, losses: Tensor | None = None) -> list[int] | None:
        """Sets the weights from the gradients; counts a skip if they are not finite.

        Args:
            step: Its gradients.
            losses: [T], where they have to be finite, too.

        Returns:
            The tasks that have a gradient; None after a skip.
        """
        task_grads = step.task_grads.tensors
        move_to_gradients(self, task_grads)
        gramian = task_gramian(task_grads, self.num_tasks, step.grad_scale).cpu().numpy()
        squares = np.diagonal(gramian)
        is_finite = np.isfinite(squares)
        if losses is not None:
            is_finite &= np.isfinite(losses.cpu().numpy()) | (squares == 0.0)
        self.found_nonfinite.copy_(torch.from_numpy(~is_finite))
        if not is_finite.all():
            self.num_skipped_steps += 1
            return None
        tasks = [task for task in step.tasks if squares[task] > 0.0]
        solution = self._solve(gramian[np.ix_(tasks, tasks)]) if tasks else None
        if solution is not None:
            weights = np.full(self.num_tasks, 1.0 / self.num_tasks)
            weights[tasks] = solution * (len(tasks) / self.num_tasks)
            self.task_weights.copy_(self.weight_total * torch.from_numpy(weights))
        return tasks

    def update(self, step: Step) -> None:
        """Sets the weights from the gradients."""
        if self._weigh(step) is not None:
            self.num_steps += 1


def move_to_gradients(balancer: Balancer, task_grads: Sequence[Tensor]) -> None:
    """Moves the state of a balancer that was made without parameters to where its gradients are."""
    given = next((grad for grad in task_grads if grad.numel() > 0), None)
    if given is not None and given.device != balancer.task_weights.device:
        balancer.to(given.device)


def unit_gramian(gramian: Matrix) -> tuple[Matrix, Matrix]:
    """Cosines [k, k] of the gradients, and their norms [k], all of which must be above zero."""
    norms: Any = np.sqrt(np.diagonal(gramian))
    cosines = gramian / norms[:, None] / norms
    np.fill_diagonal(cosines, 1.0)
    return cosines, norms
