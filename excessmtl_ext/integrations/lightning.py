"""PyTorch Lightning: a callback that logs the task weights.

The step needs no adapter. With automatic optimization ``training_step`` returns
``self.balancer(losses)``; with manual optimization it calls
``self.manual_backward(self.balancer(losses))``. A balancer that is an attribute of the
LightningModule moves and is checkpointed with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from excessmtl_ext.balancer import Balancer
from excessmtl_ext.integrations import missing_package
from excessmtl_ext.integrations.weight_log import checked_task_names, named_task_weights

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise missing_package("lightning", error) from error


class TaskWeightLogger(Callback):
    """Logs ``task_weight/NAME`` of every task and ``effective_num_tasks`` to the Trainer's loggers.

    Logs on every ``log_every_n_steps``-th optimizer step, with the step number of Lightning's own
    rows. Waits for the device once per logged step.

    Args:
        task_names: T names; None for the numbers of the tasks.

    Raises:
        ValueError: at the start of the fit, if the module does not have exactly one balancer among
            its submodules, or ``task_names`` does not have one name per task.
    """

    def __init__(self, task_names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.task_names = None if task_names is None else list(task_names)
        self._balancer: Balancer | None = None
        self._logged_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the balancer before the first step."""
        found = [module for module in pl_module.modules() if isinstance(module, Balancer)]
        if len(found) != 1:
            raise ValueError(
                f"Expected one balancer among the submodules of {type(pl_module).__name__}, but got {len(found)}. "
                "Make it an attribute: self.balancer = ExcessMTL(self.encoder.parameters(), num_tasks=...)."
            )
        checked_task_names(found[0], self.task_names)
        self._balancer = found[0]
        self._logged_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the weights if this batch ended in an optimizer step that is to be logged."""
        step = trainer.global_step
        # log_dict would repeat the values of the last call in the rows between two calls.
        every = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]  # set by its logger connector
        if self._balancer is None or step == self._logged_step or step % every:
            return
        self._logged_step = step
        named = named_task_weights(self._balancer, self.task_names)
        row = dict(zip(named, torch.stack(list(named.values())).tolist(), strict=True))
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step - 1)
