"""Hugging Face transformers: a Trainer whose model returns one loss per task."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from excessmtl_ext.balancer import Balancer
from excessmtl_ext.integrations import missing_package
from excessmtl_ext.integrations.weight_log import checked_task_names, named_task_weights

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
except ModuleNotFoundError as error:
    raise missing_package("transformers", error) from error

STATE_FILE = "balancer.pt"
"""Name of the balancer's state in a checkpoint folder."""


class _BalancerCallback(TrainerCallback):
    """Adds the balancer's state to every checkpoint, and skips steps with a non-finite gradient."""

    def __init__(self, balancer: Balancer) -> None:
        self.balancer = balancer

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, model: torch.nn.Module, **kwargs: Any
    ) -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        # The Trainer has clipped by now, which spreads a NaN to all gradients. Without gradients the
        # optimizer changes nothing; a loss scaler has recorded the overflow before.
        if grads and not torch.nn.utils.get_total_norm(grads).isfinite():
            model.zero_grad()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self.balancer.state_dict(), folder / STATE_FILE)


class BalancedTrainer(Trainer):
    """A Trainer that balances the task losses which the model returns.

    The model's ``forward`` returns a dict (or ``ModelOutput``) with ``losses``: T scalars, None for
    a task without labels in this batch, or one tensor [T]. Each backward pass is one step of the
    balancer: with ``gradient_accumulation_steps=k`` the weights move k times per optimizer step.
    The optimizer skips a step with a NaN or infinite gradient, under every method.
    Evaluation reports the plain mean of the losses, which is comparable across weights.

    Args:
        *args: As for ``transformers.Trainer``.
        balancer: Made with the parameters of the model that is trained, and not a submodule of it.
            Each checkpoint has its state in ``balancer.pt``, and
            ``train(resume_from_checkpoint=...)`` restores it.
        task_names: T names for the log, ``task_weight/NAME``; None for the numbers of the tasks.
        losses_key: The key of the losses in the model's output.
        **kwargs: As for ``transformers.Trainer``.

    Raises:
        ValueError: ``model_init`` is given, which makes models without the balancer's parameters; there are
            several GPUs in one process; ``task_names`` does not fit; or the model's output has no losses.
    """

    def __init__(
        self,
        *args: Any,
        balancer: Balancer,
        task_names: Sequence[str] | None = None,
        losses_key: str = "losses",
        **kwargs: Any,
    ) -> None:
        self.task_names = checked_task_names(balancer, task_names)
        super().__init__(*args, **kwargs)
        if self.model_init is not None:
            raise ValueError(
                "Expected `model`, but got `model_init`: the balancer holds the parameters of one model."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"Expected one GPU per process, but got {self.args.n_gpu}: DataParallel replicates the model and "
                "the balancer would see the copies. Hide all but one with CUDA_VISIBLE_DEVICES."
            )
        self.balancer = balancer.to(self.args.device)
        self.losses_key = losses_key
        # compute_loss returns a value per batch, which the Trainer divides by the accumulation steps.
        self.loss_is_scaled_for_ga = False
        self.add_callback(_BalancerCallback(self.balancer))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the balanced loss in training and the mean of the losses elsewhere; called by the Trainer."""
        outputs = model(**inputs)
        if self.losses_key not in outputs:
            raise ValueError(
                f"Expected the model's output to hold {self.losses_key!r}, the losses of the {self.balancer.num_tasks} "
                f"tasks, but got {', '.join(map(repr, outputs))}. Return them there, or name them with `losses_key`."
            )
        losses = outputs[self.losses_key]
        if torch.is_grad_enabled() and model.training:
            loss = self.balancer(losses)
        else:
            present = [loss.detach() for loss in losses if loss is not None]
            loss = torch.stack(present).mean()
        if not return_outputs:
            return loss
        # The Trainer gathers the rest as predictions.
        return loss, {name: value for name, value in outputs.items() if name != self.losses_key}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs like the Trainer, with the task weights in the rows of training."""
        if "loss" in logs:
            named = named_task_weights(self.balancer, self.task_names)
            logs = {**logs, **{name: value.item() for name, value in named.items()}}
        super().log(logs, *args, **kwargs)

    def checkpoint_folder(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Returns the folder that ``train`` resumes from, None for a new run."""
        if resume_from_checkpoint is True:
            last: str | None = get_last_checkpoint(str(self.args.output_dir))
            return last
        return resume_from_checkpoint or None

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Trains like the Trainer; a resumed run restores the balancer's state from the checkpoint.

        Raises:
            FileNotFoundError: the checkpoint has no ``balancer.pt``.
        """
        checkpoint = self.checkpoint_folder(resume_from_checkpoint)
        if checkpoint is not None:
            path = os.path.join(checkpoint, STATE_FILE)
            if not os.path.exists(path):
                raise FileNotFoundError(
                    f"Expected {STATE_FILE} in {checkpoint}, but there is none: it was not saved by a BalancedTrainer. "
                    "Train without resume_from_checkpoint to start the weights anew."
                )
            state = torch.load(path, map_location=self.args.device, weights_only=True)
            self.balancer.load_state_dict(state)
        return super().train(resume_from_checkpoint, *args, **kwargs)
