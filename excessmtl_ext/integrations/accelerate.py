"""Hugging Face Accelerate: a balancer for a prepared model.

The step needs no adapter: ``accelerator.backward(balancer(losses))``. The factors of
``accelerator.accumulate`` and mixed precision are divided out before the weights are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from excessmtl_ext.balancer import Balancer
from excessmtl_ext.integrations import missing_package
from excessmtl_ext.integrations.weight_log import named_task_weights

try:
    from accelerate import Accelerator
except ModuleNotFoundError as error:
    raise missing_package("accelerate", error) from error

BalancerT = TypeVar("BalancerT", bound=Balancer)


def prepare_balancer(accelerator: Accelerator, balancer: BalancerT) -> BalancerT:
    """Moves a balancer to the accelerator's device and registers it for checkpointing.

    Call it after ``accelerator.prepare(model, ...)``. ``save_state`` and ``load_state`` then include the
    balancer. ``accelerator.prepare`` itself would wrap the balancer as a model and hide its methods.

    Returns:
        ``balancer`` itself.
    """
    balancer.to(accelerator.device)
    accelerator.register_for_checkpointing(balancer)
    return balancer


def log_task_weights(
    accelerator: Accelerator,
    balancer: Balancer,
    *,
    step: int | None = None,
    task_names: Sequence[str] | None = None,
) -> None:
    """Logs ``task_weight/NAME`` of every task and ``effective_num_tasks`` to the accelerator's trackers.

    Waits for the device once, since trackers take numbers.

    Args:
        accelerator: Made with ``log_with=...``, with initialised trackers.
        balancer: The balancer whose weights are logged.
        step: Number of the step for the trackers.
        task_names: T names; None for the numbers of the tasks.

    Raises:
        ValueError: ``task_names`` does not fit.
    """
    named = named_task_weights(balancer, task_names)
    accelerator.log({name: value.item() for name, value in named.items()}, step=step)
