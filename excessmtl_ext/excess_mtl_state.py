"""State of ExcessMTL: its tensors, how they are sized, saved and loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from excessmtl_ext.balancer import Balancer
from excessmtl_ext.bounded_moves import MoveState, init_move_state
from excessmtl_ext.state import Fisher, ParamLayout, init_state
from excessmtl_ext.step import TaskGrads

if TYPE_CHECKING:
    from excessmtl_ext.distributed import DataParallel

Combination = Literal["per_tensor", "sum"]

_SIZED_BY_FIRST_STEP = ("sq_grad_sum", "grad_mean")
_SIZED_BY_TENSORS = ("tensor_mean_square", "num_tensor_steps", "tensor_weights")


class ExcessMTLState(Balancer):
    """The tensors of :class:`excessmtl_ext.ExcessMTL`, which sets the options named here."""

    transient_state: ClassVar[frozenset[str]] = frozenset(
        {"ticket", "tensor_weights", "log_priorities"}
    )

    robust_step_size: float | None
    max_log_ratio: float
    fisher: Fisher
    eps: float
    num_warmup_steps: int
    gradient_momentum: float
    relative: bool
    combination: Combination | None
    priorities: tuple[float, ...] | None
    state_dtype: torch.dtype | None
    rounding_seed: int
    _parallel: DataParallel | None

    sq_grad_sum: Tensor
    grad_mean: Tensor
    excess_risk: Tensor
    relative_excess_risk: Tensor
    baseline_excess_risk: Tensor
    num_task_steps: Tensor
    ticket: Tensor
    risk_share_sum: Tensor
    num_gradient_steps: Tensor
    momentum_mass: Tensor
    momentum_sq_mass: Tensor
    tensor_mean_square: Tensor
    num_tensor_steps: Tensor
    tensor_weights: Tensor
    log_priorities: Tensor

    def initial_state(self, device: torch.device) -> dict[str, Tensor]:
        """Every state tensor before the first step, by name.

        S and m get their size, type and device from the first gradients: [T, 0] until then. A rank's part of them is
        known beforehand, and torch.distributed.checkpoint loads into what is there.
        """
        parallel = self._parallel
        state = init_state(
            self.num_tasks,
            ParamLayout([]) if parallel is None else parallel.state_layout,
            dtype=self.state_dtype or torch.float32 if parallel is None else parallel.wire_dtype,
            device=device,
            has_momentum=parallel is not None and self.gradient_momentum > 0,
            weight_total=self.weight_total,
        )
        move = init_move_state(
            self.num_tasks,
            0 if self.layout is None else len(self.layout.numels),
            self.priorities,
            device,
        )
        if self.priorities is not None:
            state.log_task_weights.copy_(move.log_priorities)
            state.task_weights.copy_(self.weight_total * move.log_priorities.exp())
        return {**state._asdict(), **move._asdict()}

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        if self._parallel is not None:
            for name in _SIZED_BY_FIRST_STEP:
                entries = self._parallel.exported(name, destination.pop(prefix + name))
                destination.update({prefix + key: value for key, value in entries.items()})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self._parallel is not None:
            state_dict = self._parallel.imported(state_dict, prefix)
        else:
            state_dict = self._in_own_type(state_dict, prefix)
        if (
            prefix + "task_weights" in state_dict
        ):  # of a release that had fewer entries: those start fresh
            fresh = self.initial_state(self.task_weights.device)
            saved_with = {name: fresh[name] for name in MoveState._fields}
            missing = {prefix + name: fresh for name, fresh in saved_with.items()}
            for name in self.transient_state:
                missing.pop(prefix + name, None)
            state_dict = {**missing, **state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _in_own_type(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """A state saved in another type in this balancer's: widened, or rounded to nearest once."""
        is_narrow = self.state_dtype is torch.bfloat16
        has_float64 = any(each.dtype is torch.float64 for each in self.shared_parameters or ())
        own = dict(state_dict)
        for name in _SIZED_BY_FIRST_STEP:
            saved = state_dict.get(prefix + name)
            if saved is None:
                continue
            if (saved.dtype is torch.bfloat16) != is_narrow:
                saved = saved.bfloat16() if is_narrow else saved.float()
            if has_float64 and saved.dtype is torch.float32:
                saved = saved.double()  # what the op asks of the state for such gradients
            own[prefix + name] = saved
        return own

    def _may_resize(self, name: str, tensor: Tensor, saved: Tensor) -> bool:
        if name in _SIZED_BY_TENSORS:
            if saved.dim() != 2 or saved.shape[0] != self.num_tasks:
                return False
            return self.layout is None or saved.shape[1] in (0, len(self.layout.numels))
        if name not in _SIZED_BY_FIRST_STEP or saved.dim() != 2 or saved.shape[0] != self.num_tasks:
            return False
        if saved.shape[1] == 0:  # saved before its first step, or without momentum
            return name == "sq_grad_sum" or self.gradient_momentum == 0.0 or tensor.shape[1] > 0
        if name == "grad_mean" and self.gradient_momentum == 0.0:
            return False
        return self.layout is None or saved.shape[1] == self.layout.padded_numel

    def size_state(self, grads: TaskGrads, device: torch.device) -> None:
        """Sizes and places what depends on the first gradients; checks the device of all later ones.

        Raises:
            ValueError: the gradients are float64 and the state is narrower by choice, or they are on another device.
        """
        layout = grads.layout
        if layout.numels and self.tensor_weights.shape[1] == 0:  # not saved, or not sized yet
            device_of_state = self.task_weights.device
            fresh = init_move_state(self.num_tasks, len(layout.numels), None, device_of_state)
            for name in _SIZED_BY_TENSORS:
                if getattr(self, name).shape[1] == 0:
                    setattr(self, name, getattr(fresh, name))
        if self.sq_grad_sum.shape[1] == 0:
            has_float64 = any(
                grad.dtype == torch.float64 for grad in grads.tensors if grad.numel() > 0
            )
            if has_float64 and self.state_dtype is not None:
                raise ValueError(
                    f"Expected gradients narrower than float64 with state_dtype={self.state_dtype}, but got float64. "
                    "Leave `state_dtype` out: float64 gradients get float64 state."
                )
            stored = self.state_dtype or (torch.float64 if has_float64 else torch.float32)
            if device != self.task_weights.device:
                self.to(device)
            columns = layout.padded_numel
            self.sq_grad_sum = torch.zeros(self.num_tasks, columns, dtype=stored, device=device)
            self.grad_mean = torch.zeros(
                self.num_tasks,
                columns if self.gradient_momentum > 0 else 0,
                dtype=stored,
                device=device,
            )
        elif device != self.sq_grad_sum.device:
            raise ValueError(
                f"Expected gradients on {self.sq_grad_sum.device}, where the balancer's state is, but got {device}. "
                f"Call balancer.to({str(device)!r}) after moving the model."
            )
