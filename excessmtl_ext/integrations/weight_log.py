"""Task weights by name, for loggers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from excessmtl_ext.balancer import Balancer


def checked_task_names(balancer: Balancer, task_names: Sequence[str] | None) -> list[str]:
    """Returns the names of the tasks, by default their numbers.

    Raises:
        ValueError: there is not one name per task, or a name occurs twice.
    """
    if task_names is None:
        return [str(task) for task in range(balancer.num_tasks)]
    names = list(task_names)
    if len(names) != balancer.num_tasks or len(set(names)) != len(names):
        raise ValueError(
            f"Expected `task_names` to hold {balancer.num_tasks} different names, one per task, but got {names}."
        )
    return names


def named_task_weights(
    balancer: Balancer, task_names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Returns the weight of every task as ``task_weight/NAME``, and ``effective_num_tasks``.

    Args:
        balancer: The balancer whose weights are returned.
        task_names: T names; None for the numbers of the tasks.

    Returns:
        Copies as scalars [] in float64 on the balancer's device. Does not wait for the device.

    Raises:
        ValueError: ``task_names`` does not fit.
    """
    weights = balancer.task_weights.detach().clone()
    named = {
        f"task_weight/{name}": weight
        for name, weight in zip(
            checked_task_names(balancer, task_names), weights.unbind(), strict=True
        )
    }
    return {**named, "effective_num_tasks": balancer.effective_num_tasks.detach().clone()}
