"""State of a balancer: plain tensors that other tools leave alone, and checks of what is loaded.

The tensors are attributes and no buffers: whatever walks ``buffers()`` (weight averages, the
broadcast of DistributedDataParallel, ``half()``) would spoil or refuse them. They have their places
in ``state_dict`` all the same, and follow the module from device to device.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from excessmtl_ext.arguments import shortened, stacklevel_of_caller
from excessmtl_ext.extra_state import (
    Fields,
    are_equal_sizes,
    damaged,
    differences,
    pack,
    unpack,
)
from excessmtl_ext.state import ParamLayout

EXTRA = "_extra_state"

_NEVER_NEGATIVE = frozenset(
    {
        "sq_grad_sum",
        "excess_risk",
        "relative_excess_risk",
        "baseline_excess_risk",
        "risk_share_sum",
        "momentum_mass",
        "momentum_sq_mass",
        "tensor_mean_square",
        "learned_sq_grad_mean",
        "losses_before",
        "epoch_means",
        "first_mean_loss",
    }
)
"""Besides everything that counts."""


class StateModule(nn.Module):
    """A module with state tensors: they keep their types, and are loaded as a whole or not at all."""

    transient_state: ClassVar[frozenset[str]] = frozenset()
    """State that is not saved."""

    newer_state: ClassVar[frozenset[str]] = frozenset()
    """State that releases with version 1 did not save; it then starts afresh."""

    open_state: ClassVar[frozenset[str]] = frozenset()
    """State that may be NaN or infinite."""

    binding_options: ClassVar[frozenset[str]] = frozenset({"weight_scale"})
    """Options without which the state means something else: one that was saved with others is refused."""

    layout: ParamLayout | None
    """Sizes of the parameters that the state belongs to, where they are known."""

    weight_total: float
    """What the weights sum to."""

    state_names: tuple[str, ...] = ()
    """Attributes that hold the state, in the order in which it is saved."""

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Replaces all state tensors."""
        for name in self.state_names:
            del self.__dict__[name]
        self.state_names = tuple(state)
        self.put_back(state)

    def state_tensors(self) -> dict[str, Tensor]:
        """Returns the state's tensors by name, not copies."""
        return {name: self.__dict__[name] for name in self.state_names}

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes ``tensors``, as :meth:`state_tensors` gave them, the state again."""
        with torch.inference_mode(False):
            for name, tensor in tensors.items():
                # Made in inference mode it could not be written outside of it.
                self.__dict__[name] = tensor.clone() if tensor.is_inference() else tensor

    def host_state(self) -> Fields:
        """Returns what is saved besides the state tensors, as numbers."""
        raise NotImplementedError

    def set_host_state(self, fields: Fields) -> None:
        """Takes what :meth:`host_state` gave; fields that an older release did not save are missing."""
        raise NotImplementedError

    def saved_options(self) -> dict[str, Any]:
        """Returns the options that a state is saved with."""
        return {}

    @property
    def is_placeholder(self) -> bool:
        """Whether the parameters have no memory: the module only shows what there will be."""
        return False

    def get_extra_state(self) -> Tensor:
        """:meth:`host_state` as a tensor; called by ``state_dict``."""
        device = next(iter(self.state_tensors().values())).device
        return pack(self.host_state(), device)

    def set_extra_state(self, state: Any) -> None:
        """Takes what :meth:`get_extra_state` gave; called by ``load_state_dict`` after the checks."""
        self.set_host_state(unpack(state, tuple(self.host_state())))

    # ---- devices

    def _apply(self, fn: Any, recurse: bool = True) -> StateModule:
        super()._apply(fn, recurse)
        # half() must not round the state, and to_empty() not lose it: only the device follows.
        # One without memory is none to go to.
        moved: dict[str, Tensor] = {}
        for name, tensor in self.state_tensors().items():
            device = fn(tensor.new_empty(0)).device
            moved[name] = tensor if device.type == "meta" else tensor.to(device)
        self.put_back(moved)
        return self

    # ---- saving and loading

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.is_placeholder:
            return
        for name, tensor in self.state_tensors().items():
            if name not in self.transient_state:
                # Averages subtract, which bool does not do.
                saved = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
                destination[prefix + name] = saved.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads a state as a whole, or raises and keeps the one there is.

        Args:
            state_dict: As from ``state_dict()``, of this release or an older one.
            strict: False: entries that are no state are passed over, and no entry at all is no error.
            assign: Without effect: state is always copied.

        Raises:
            RuntimeError: the state is damaged or incomplete, or was saved by a balancer with other
                tasks, parameters or options that it depends on.

        Warns:
            UserWarning: it was saved with other options that only say how to go on.
        """
        known = {*self.state_names, EXTRA, *self._parameters, *self._buffers, *self._modules}
        unknown = sorted(key for key in state_dict if key.partition(".")[0] not in known)
        if strict and unknown:
            raise RuntimeError(
                f"Expected the state of a {type(self).__name__}, but got unknown entries {shortened(unknown)}. Take "
                "them out, or pass strict=False."
            )
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [name for name in self.state_names if name not in self.transient_state]
        saved = {
            name: state_dict[prefix + name]
            for name in (*names, EXTRA)
            if prefix + name in state_dict
        }
        rest = {
            key: value
            for key, value in state_dict.items()
            if not (key.startswith(prefix) and key[len(prefix) :] in names)
        }
        if saved:
            problem = self._take(names, saved)
            if problem is not None:  # nothing is copied then: the state stays whole
                error_msgs.append(problem)
                return
        else:
            missing_keys += [prefix + name for name in names]
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _take(self, names: Sequence[str], saved: dict[str, Any]) -> str | None:
        """Takes over a saved state, or returns why it cannot be taken."""
        problem = self._obstacle()
        if problem is not None:
            return problem
        try:
            if EXTRA not in saved:
                raise ValueError(f"Expected a whole state, but got one without `{EXTRA}`.")
            fields = unpack(saved[EXTRA], tuple(self.host_state()))
            is_old = isinstance(saved[EXTRA], dict)
            entries = self._entries(names, saved, fields, is_old)
            self._check_sizes(fields)
            tensors = {name: self._checked(name, each) for name, each in entries.items()}
            differing = self._checked_options(fields)
            self._check_sum(tensors["task_weights"])
        except ValueError as error:
            return str(error)
        if differing:
            warnings.warn(
                f"The state was saved with other options: {differing}. It goes on with those of this balancer.",
                stacklevel=stacklevel_of_caller(),
            )
        with torch.no_grad(), torch.inference_mode(False):
            for name, tensor in tensors.items():
                mine = self.__dict__[name]
                if mine.shape == tensor.shape:
                    mine.copy_(tensor)
                else:
                    self.put_back({name: tensor.to(mine.device, copy=True)})
        return None

    def _obstacle(self) -> str | None:
        """Returns why no state can be loaded now, or None."""
        return None

    def _entries(
        self, names: Sequence[str], saved: dict[str, Any], fields: Fields, is_old: bool
    ) -> dict[str, Tensor]:
        """Returns the saved tensors, fresh ones where older releases had none; raises ValueError if others miss."""
        lacking = [name for name in names if name not in saved]
        if is_old:
            fresh = [name for name in lacking if name in self.newer_state]
            lacking = [name for name in lacking if name not in self.newer_state]
            saved = {**saved, **{name: torch.zeros_like(self.__dict__[name]) for name in fresh}}
        if lacking:
            raise ValueError(
                f"Expected a whole state, but got one without {', '.join(f'`{name}`' for name in lacking)}. Nothing "
                "was loaded: take the state from a copy."
            )
        for name in names:
            if not isinstance(saved[name], Tensor):
                raise ValueError(
                    damaged(f"`{name}` to be a tensor, but got {type(saved[name]).__name__}")
                )
        return {name: saved[name] for name in names}

    def _check_sizes(self, fields: Fields) -> None:
        saved = fields["param_numels"]
        if saved and self.layout is not None and not are_equal_sizes(saved, self.layout.numels):
            raise ValueError(
                f"Expected a state for shared parameters of sizes {shortened(self.layout.numels)}, but got one for "
                f"{shortened([round(numel) for numel in saved])}. Give the balancer the parameters it was saved with, "
                "frozen as they were, or start a new one."
            )

    def _checked_options(self, fields: Fields) -> str:
        """Describes options that differ; raises ValueError where the state depends on them."""
        if "options" not in fields:  # version 1
            return ""
        own = self.saved_options()
        differing = differences(fields["options"], own)
        told = {
            name: f"`{name}` was {before} and is {own[name]!r} here"
            for name, before in differing.items()
        }
        binding = [told[name] for name, before in differing.items() if self._binds(name, before)]
        if binding:
            raise ValueError(
                f"Expected a state of the same options, but {', '.join(binding)}. Make the balancer with the options "
                "the state was saved with: it means something else under others."
            )
        return ", ".join(told.values())

    def _binds(self, name: str, before: str) -> bool:
        """Returns whether the state depends on an option that differs."""
        return name in self.binding_options

    def _fits(self, name: str, saved: Tensor) -> bool:
        """Returns whether a saved tensor has the right size."""
        return saved.shape == self.__dict__[name].shape

    def _checked(self, name: str, saved: Tensor) -> Tensor:
        """Returns a saved tensor in the type of the state.

        Raises:
            ValueError: its size, type or values are not those of such a state.
        """
        mine: Tensor = self.__dict__[name]
        if not self._fits(name, saved):
            raise ValueError(
                f"Expected `{name}` of shape {list(mine.shape)}, but got {list(saved.shape)}. It was saved "
                "by a balancer with other tasks, parameters or options; make this one with the same."
            )
        is_narrowed = mine.is_floating_point() and not saved.is_floating_point()
        is_narrowed |= saved.dtype == torch.bool and mine.dtype != torch.bool
        if is_narrowed or saved.is_complex() or saved.is_quantized or saved.is_meta:
            found = "no data (meta)" if saved.is_meta else saved.dtype
            raise ValueError(damaged(f"`{name}` as {mine.dtype}, but got {found}"))
        if name not in self.open_state and not bool(saved.isfinite().all()):
            what = "NaN" if bool(saved.isnan().any()) else "infinities"
            num_bad = int((~saved.isfinite()).sum())
            raise ValueError(
                damaged(f"`{name}` without {what}, but got {num_bad} of {saved.numel()}")
            )
        is_signed = mine.is_floating_point() and name not in _NEVER_NEGATIVE
        if name == "task_weights" and "log_task_weights" in self.state_names:
            is_signed = False
        if not is_signed and bool((saved < 0).any()):
            raise ValueError(damaged(f"`{name}` >= 0, but got {saved.min().item():g}"))
        return self._in_own_type(name, saved)

    def _check_sum(self, weights: Tensor) -> None:
        """Raises ValueError unless the weights have their sum, to what averages in float16 leave of it."""
        found = float(weights.sum())
        if abs(found - self.weight_total) > 1e-2 * self.weight_total:
            raise ValueError(
                damaged(f"`task_weights` that sum to {self.weight_total:g}, but got {found:g}")
            )

    def _in_own_type(self, name: str, saved: Tensor) -> Tensor:
        """Returns a saved tensor in the type of the state, rounded to nearest."""
        dtype = self.__dict__[name].dtype
        if dtype == torch.bool:
            return saved > 0
        if not dtype.is_floating_point:  # a mean of counts, as over clients, need not be a count
            return saved.round().to(dtype) if saved.is_floating_point() else saved.to(dtype)
        if name not in self.open_state and saved.dtype.itemsize > dtype.itemsize:
            largest = torch.finfo(dtype).max
            saved = saved.clamp(-largest, largest)
        return saved.to(dtype)
