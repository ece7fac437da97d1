"""State of ExcessMTL: its tensors, how they are sized, saved and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from excessmtl_ext.balancer import Balancer
from excessmtl_ext.dense_order import DenseOrder, reordered
from excessmtl_ext.extra_state import Fields, are_equal_sizes
from excessmtl_ext.gradient_sizes import Combination
from excessmtl_ext.state import (
    MoveState,
    ParamLayout,
    StepState,
    init_move_state,
    init_state,
    padded_numel,
)
from excessmtl_ext.step import TaskGrads

if TYPE_CHECKING:
    from excessmtl_ext.distributed import DataParallel
    from excessmtl_ext.engines.rotation import RotationEngine

_PER_ELEMENT = ("sq_grad_sum", "grad_mean")
_PER_TENSOR = ("tensor_mean_square", "num_tensor_steps", "tensor_weights")

_FLOAT64_WITH_NARROW_STATE = (
    "Expected gradients narrower than float64 with state_dtype={}, but got float64. Leave `state_dtype` out: float64 "
    "gradients get float64 state."
)


class ExcessMTLState(Balancer):
    """The tensors of :class:`excessmtl_ext.ExcessMTL`, which sets the options named here."""

    transient_state: ClassVar[frozenset[str]] = frozenset(
        {"ticket", "tensor_weights", "log_priorities", "weight_floors"}
    )

    newer_state: ClassVar[frozenset[str]] = frozenset(MoveState._fields) - transient_state

    binding_options: ClassVar[frozenset[str]] = frozenset(
        {"weight_scale", "fisher", "eps", "gradient_momentum", "relative", "estimate_from"}
    )

    robust_step_size: float | None
    gradient_momentum: float
    combination: Combination | None
    min_weight: float | tuple[float, ...]
    priorities: tuple[float, ...] | None
    state_dtype: torch.dtype | None
    _parallel: DataParallel | None
    _rotation: RotationEngine | None

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
    weight_floors: Tensor

    def initial_state(self, device: torch.device) -> dict[str, Tensor]:
        """Returns every state tensor before the first step, by name.

        S and m have their size and type from here on where the parameters are known; else both come
        with the first gradients, and they are [T, 0] until then.
        """
        parallel = self._parallel
        layout = self.layout or ParamLayout([])
        state = init_state(
            self.num_tasks,
            layout if parallel is None else parallel.state_layout,
            dtype=self._own_dtype() if parallel is None else parallel.wire_dtype,
            device=device,
            has_momentum=self.gradient_momentum > 0,
            weight_total=self.weight_total,
        )
        move = init_move_state(
            self.num_tasks,
            len(layout.numels),
            self.priorities,
            device,
            floors=self.min_weight if isinstance(self.min_weight, tuple) else None,
        )
        if self.priorities is not None:
            state.log_task_weights.copy_(move.log_priorities)
        self._set_first_weights(state, move)
        return {**state._asdict(), **move._asdict()}

    def _set_first_weights(self, state: StepState, move: MoveState) -> None:
        """Sets the weights from the log-weights and the floors, as a step does."""
        shares = state.log_task_weights.exp()
        if isinstance(self.min_weight, tuple):
            shares = (1.0 - move.weight_floors.sum()) * shares + move.weight_floors
        elif self.priorities is not None:  # equal shares are above any floor
            shares = (1.0 - self.num_tasks * self.min_weight) * shares + self.min_weight
        else:
            return
        state.task_weights.copy_(self.weight_total * shares)

    def _own_dtype(self) -> torch.dtype:
        """Returns the type of S and m for gradients of the parameters' types."""
        has_float64 = any(each.dtype is torch.float64 for each in self.shared_parameters or ())
        if has_float64 and self.state_dtype is not None:
            raise ValueError(_FLOAT64_WITH_NARROW_STATE.format(self.state_dtype))
        return self.state_dtype or (torch.float64 if has_float64 else torch.float32)

    def size_state(self, grads: TaskGrads, device: torch.device) -> None:
        """Sizes, places and widens what depends on the first gradients; checks the device of all later ones.

        Raises:
            ValueError: the gradients are float64 and the state is narrower by choice, or they are on another device.
        """
        layout = grads.layout
        if device != self.task_weights.device and self.num_calls == 0:
            self.to(device)
        if device != self.sq_grad_sum.device:
            raise ValueError(
                f"Expected gradients on {self.sq_grad_sum.device}, where the balancer's state is, but got {device}. "
                f"Call balancer.to({str(device)!r}) after moving the model."
            )
        unsized = [name for name in _PER_TENSOR if getattr(self, name).shape[1] == 0]
        if layout.numels and unsized:  # `tensor_weights` is not saved, so a loaded state lacks it
            fresh = init_move_state(self.num_tasks, len(layout.numels), None, device)._asdict()
            self.put_back({name: fresh[name] for name in unsized})
        has_float64 = any(grad.dtype == torch.float64 for grad in grads.tensors if grad.numel() > 0)
        if has_float64 and self.state_dtype is not None:
            raise ValueError(_FLOAT64_WITH_NARROW_STATE.format(self.state_dtype))
        stored = self.state_dtype or (torch.float64 if has_float64 else self.sq_grad_sum.dtype)
        for name in _PER_ELEMENT:
            tensor = getattr(self, name)
            if tensor.shape[1] == 0 and (name == "sq_grad_sum" or self.gradient_momentum > 0):
                tensor = tensor.new_zeros(self.num_tasks, layout.padded_numel)
            self.put_back({name: tensor.to(stored)})  # float64 holds all that float32 does

    def follow(self, order: DenseOrder | None) -> None:
        """Brings S and m into the order of the gradients to come, in new memory where it is another one."""
        if order != self.order:
            own = {name: getattr(self, name) for name in _PER_ELEMENT}
            self.put_back(
                {
                    name: reordered(each, self.order, order)
                    for name, each in own.items()
                    if each.shape[1] > 0
                }
            )
        super().follow(order)

    # ---- saving and loading

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _PER_ELEMENT if self.order is not None else ():
            saved = destination.get(prefix + name)
            if saved is not None and saved.shape[1] > 0:
                destination[prefix + name] = reordered(saved, self.order, None)
        if self._parallel is not None and prefix + "sq_grad_sum" in destination:
            for name in _PER_ELEMENT:
                entries = self._parallel.exported(name, destination.pop(prefix + name))
                destination.update({prefix + key: value for key, value in entries.items()})

    def _fqn_modifiers(self) -> dict[str, str]:
        """Returns the attribute in which torch's ``get_model_state_dict`` finds entries such as ``sq_grad_sum.0``."""
        is_cut = self._parallel is not None and self._parallel.is_sharded
        return dict.fromkeys(_PER_ELEMENT, "_pieces") if is_cut else {}

    @property
    def _pieces(self) -> SimpleNamespace:
        """The names of the entries that a rank saves under ``fully_shard``, as attributes."""
        places = {str(place): None for place in range(len(self.shared_parameters or ()))}
        return SimpleNamespace(**{name: SimpleNamespace(**places) for name in _PER_ELEMENT})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self._parallel is not None:
            state_dict = self._parallel.imported(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _entries(
        self, names: Sequence[str], saved: dict[str, Any], fields: Fields, is_old: bool
    ) -> dict[str, Tensor]:
        entries = super()._entries(names, saved, fields, is_old)
        is_fresh = entries["sq_grad_sum"].numel() == 0
        for name in (*_PER_ELEMENT, *_PER_TENSOR):
            # Saved before the first step by a release that sized it then.
            tensor, mine = entries.get(name), getattr(self, name)
            is_unsized = tensor is not None and tensor.dim() == 2 and tensor.shape[1] == 0
            if is_unsized and (name not in _PER_ELEMENT or is_fresh):
                entries[name] = torch.zeros_like(mine)
        sizes, keep = self._given_sizes()
        own = [sizes[place] for place in keep]
        is_of_all = self.layout is not None and list(self.layout.numels) == own != sizes
        is_of_all = is_of_all and are_equal_sizes(fields["param_numels"], sizes)
        if is_of_all and self._parallel is None:  # saved with state for the frozen ones, too
            entries = _kept(entries, sizes, keep)
            fields["param_numels"] = list(map(float, own))
        return entries

    def _given_sizes(self) -> tuple[list[int], list[int]]:
        """Elements of all shared parameters that were given, frozen ones too, and the places of those with state."""
        shared, frozen = self.shared_parameters or [], self.frozen_parameters
        places = [place for place in range(len(shared) + len(frozen)) if place not in frozen]
        sizes = dict(zip(places, (each.numel() for each in shared), strict=True))
        sizes.update({place: each.numel() for place, each in frozen.items()})
        return [sizes[place] for place in sorted(sizes)], places

    def _binds(self, name: str, before: str) -> bool:
        if (
            name == "robust_step_size"
        ):  # bounded moves and those of Eq. 9 keep their weights in other tensors
            return (before == "None") != (self.robust_step_size is None)
        return super()._binds(name, before)

    def _fits(self, name: str, saved: Tensor) -> bool:
        if self.layout is None and name in (*_PER_ELEMENT, *_PER_TENSOR):
            has_columns = name != "grad_mean" or self.gradient_momentum > 0
            is_sized = saved.dim() == 2 and saved.shape[0] == self.num_tasks
            return is_sized and (has_columns or saved.shape[1] == 0)
        return super()._fits(name, saved)

    def _in_own_type(self, name: str, saved: Tensor) -> Tensor:
        """Keeps float64 of S and m where the balancer has no parameters; else the type of the state decides."""
        if name in _PER_ELEMENT and self.layout is None and self.state_dtype is None:
            return saved if saved.dtype == torch.float64 else saved.float()
        saved = super()._in_own_type(name, saved)
        is_ordered = name in _PER_ELEMENT and self.order is not None and saved.shape[1] > 0
        return reordered(saved, None, self.order) if is_ordered else saved


def _kept(entries: dict[str, Tensor], sizes: list[int], keep: list[int]) -> dict[str, Tensor]:
    """Entries for some of the parameters out of those for all of them."""
    kept = dict(entries)
    for name in _PER_ELEMENT:
        if entries[name].shape[1] > 0:
            parts = entries[name].split([padded_numel(size) for size in sizes], dim=1)
            kept[name] = torch.cat([parts[index] for index in keep], dim=1)
    for name in _PER_TENSOR:
        if name in entries and entries[name].shape[1] == len(sizes):
            kept[name] = entries[name][:, keep]
    return kept
