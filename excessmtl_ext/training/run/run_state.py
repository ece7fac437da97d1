"""The state of a run between two steps: model, optimizer, balancer, position, and the sums of the epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from excessmtl_ext import Balancer, ExcessMTL
from excessmtl_ext.distributed import full_state_dict
from excessmtl_ext.functional import ParamLayout
from excessmtl_ext.training.run.parallel_model import ParallelModel
from excessmtl_ext.training.run.ranks import RunRanks

# Names, headers and padding of the saved tensors, and the tables and JSON files of a long run.
BYTES_FOR_TABLES = 1 << 20


class RunState:
    """Everything that a step changes, and that a checkpoint therefore holds.

    Args:
        parallel: The model.
        optimizer: Of the model's parameters.
        balancer: Of the model's encoder.
        ranks: The processes of the run.
        num_tasks: T.
        device: Where the sums of the epoch are kept.

    Attributes:
        step: Steps done.
        best_score: Of the epochs so far, on validation.
        epoch_sums: [5, T] float64: losses times labels, labels (both of this process), weights, risks, relative risks.
        num_finite_steps: Steps of the epoch in ``epoch_sums``.
        num_skipped_steps: The other steps of the epoch.
        weight_rows: Rows of task_weights.csv that are not written yet.
        seconds: Time of the epoch's steps.
    """

    def __init__(
        self,
        parallel: ParallelModel,
        optimizer: torch.optim.Optimizer,
        balancer: Balancer,
        ranks: RunRanks,
        *,
        num_tasks: int,
        device: torch.device,
    ) -> None:
        self.parallel = parallel
        self.optimizer = optimizer
        self.balancer = balancer
        self.ranks = ranks
        self.device = device
        self.step = 0
        self.best_score = -float("inf")
        self.epoch_sums = torch.zeros(5, num_tasks, dtype=torch.float64, device=device)
        self.num_finite_steps = 0
        self.num_skipped_steps = 0
        self.weight_rows: list[tuple[int, Tensor]] = []
        self.seconds = 0.0

    def add(self, losses: Tensor, counts: Sequence[int]) -> None:
        """Adds a step to the sums of the epoch: its losses [T], and how many labels each is a mean over."""
        num_labels = torch.tensor(counts, dtype=torch.float64, device=self.device)
        rows = [losses * num_labels, num_labels, self.balancer.task_weights]
        rows += [getattr(self.balancer, name) for name in self.risk_names()]
        for total, row in zip(self.epoch_sums, rows, strict=False):
            total += row
        self.num_finite_steps += 1

    def risk_names(self) -> list[str]:
        """Returns the names of the risks that the balancer estimates, none for most methods."""
        names = ("excess_risk", "relative_excess_risk")
        return [name for name in names if hasattr(self.balancer, name)]

    def joined_epoch_sums(self) -> list[list[float]]:
        """Returns the sums of all processes; weights and risks are the same on each."""
        losses = self.ranks.gather(self.epoch_sums[:2].cpu())
        return [*torch.stack(losses).sum(0).tolist(), *self.epoch_sums[2:].tolist()]

    def begin_epoch(self) -> None:
        """Clears the sums of the epoch before."""
        self.weight_rows.clear()
        self.epoch_sums.zero_()
        self.num_finite_steps = self.num_skipped_steps = 0
        self.seconds = 0.0

    def checkpoint(self) -> dict[str, Any]:
        """Returns what `restore` needs; every process of the run calls this."""
        own, *others = self.ranks.gather(self._own_state())
        return {
            "step": self.step,
            "best_score": self.best_score,
            "num_finite_steps": self.num_finite_steps,
            "num_skipped_steps": self.num_skipped_steps,
            "weight_rows": [list(row) for row in self.weight_rows],
            "seconds": self.seconds,
            "model": self.parallel.state(),
            "optimizer": self.parallel.optimizer_state(self.optimizer),
            "balancer": _whole_state(self.balancer),
            **own,
            "other_ranks": others,
        }

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Takes the state of an interrupted run.

        Raises:
            KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError: the checkpoint does not hold it.
        """
        own = checkpoint
        if self.ranks.rank > 0:
            own = checkpoint["other_ranks"][self.ranks.rank - 1]
        self._check(checkpoint, own)
        self.step = checkpoint["step"]
        self.best_score = checkpoint["best_score"]
        self.epoch_sums.copy_(own["epoch_sums"])
        self.num_finite_steps = checkpoint["num_finite_steps"]
        self.num_skipped_steps = checkpoint["num_skipped_steps"]
        self.weight_rows = [(step, weights) for step, weights in checkpoint["weight_rows"]]
        self.seconds = checkpoint["seconds"]
        self.parallel.load_state(checkpoint["model"])
        self.parallel.load_optimizer_state(self.optimizer, checkpoint["optimizer"])
        self.balancer.load_state_dict(checkpoint["balancer"])
        torch.set_rng_state(own["cpu_generator"])
        if own["cuda_generator"] is not None:
            torch.cuda.set_rng_state(own["cuda_generator"], self.device)

    def _check(self, checkpoint: dict[str, Any], own: dict[str, Any]) -> None:
        """Raises where the checkpoint's own entries are not of this run; model, optimizer and balancer check theirs."""
        counts = {
            name: checkpoint[name] for name in ("step", "num_finite_steps", "num_skipped_steps")
        }
        numbers = {name: checkpoint[name] for name in ("best_score", "seconds")}
        if not all(type(count) is int and count >= 0 for count in counts.values()):
            raise TypeError(f"counts {counts}")
        if not all(type(number) is float and number == number for number in numbers.values()):
            raise TypeError(f"numbers {numbers}")
        sums, rows = own["epoch_sums"], checkpoint["weight_rows"]
        if sums.shape != self.epoch_sums.shape or sums.dtype != self.epoch_sums.dtype:
            raise TypeError(f"epoch_sums {sums.dtype} {list(sums.shape)}")
        for step, weights in rows:
            if type(step) is not int or weights.shape != self.epoch_sums.shape[1:]:
                raise TypeError(f"a row of weights {list(weights.shape)} of step {step!r}")

    def file_sizes(self, *, is_new: bool) -> list[int]:
        """Returns the bytes of the files that the run will write: checkpoint, best model, tables.

        Args:
            is_new: The folder has neither yet: each is there twice while it is being replaced.
        """
        module = self.parallel.module
        model = sum(tensor.nbytes for tensor in module.state_dict().values())
        checkpoint = model + 2 * 4 * sum(p.numel() for p in module.parameters())  # Adam's two means
        if isinstance(self.balancer, ExcessMTL):
            layout = ParamLayout([p.numel() for p in module.encoder.parameters()])
            num_states = 1 + (self.balancer.gradient_momentum > 0)
            checkpoint += num_states * self.balancer.num_tasks * 4 * layout.padded_numel
        return [*[checkpoint, model] * (1 + is_new), BYTES_FOR_TABLES]

    def _own_state(self) -> dict[str, Any]:
        """Returns what differs between the processes of a run."""
        has_cuda = self.device.type == "cuda"
        return {
            "epoch_sums": self.epoch_sums.cpu(),
            "cpu_generator": torch.get_rng_state(),
            "cuda_generator": torch.cuda.get_rng_state(self.device) if has_cuda else None,
        }


def _whole_state(balancer: Balancer) -> dict[str, Any]:
    """Returns the state as one process would save it; every process of a run calls this."""
    return full_state_dict(balancer) if isinstance(balancer, ExcessMTL) else balancer.state_dict()
