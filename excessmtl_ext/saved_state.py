"""State of a balancer as buffers of a module, and its checks: a saved state is examined before anything is copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from excessmtl_ext.arguments import shortened
from excessmtl_ext.functional import ParamLayout

STATE_VERSION = 1
"""Version of what ``state_dict`` holds; raised when its meaning changes."""

_NEVER_NAN = (
    "log_task_weights",
    "task_weights",
    "sq_grad_sum",
    "grad_mean",
    "baseline_excess_risk",
)


class StateModule(nn.Module):
    """A module whose buffers are state: they keep their types, and are loaded as a whole or not at all."""

    transient_state: ClassVar[frozenset[str]] = frozenset()
    """Buffers that are not saved."""

    layout: ParamLayout | None
    """Sizes of the parameters that the state belongs to, where they are known."""

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Replaces all buffers."""
        self._buffers.clear()
        for name, tensor in state.items():
            self.register_buffer(name, tensor, persistent=name not in self.transient_state)

    def state_tensors(self) -> dict[str, Tensor]:
        """The state's tensors by name, not copies."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes ``tensors``, as :meth:`state_tensors` gave them, the state again."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def _apply(self, fn: Any, recurse: bool = True) -> StateModule:
        # half() or bfloat16() on a model that holds the balancer must not round its state: only the
        # device follows.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

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
        problem = self._problem_with(state_dict, prefix)
        if problem is not None:  # nothing is copied then: the state stays whole
            error_msgs.append(problem)
            return
        for name, tensor in list(self._buffers.items()):
            saved = state_dict.get(prefix + name)
            if tensor is not None and saved is not None and tensor.shape != saved.shape:
                # A state whose size is known from the first step on: take the size and the type of
                # the saved one.
                self._buffers[name] = torch.empty_like(saved, device=tensor.device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _problem_with(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Returns why ``state_dict`` cannot be loaded, or None."""
        return problem_with(state_dict, prefix, self._buffers, self.layout, self._may_resize)

    def _may_resize(self, name: str, tensor: Tensor, saved: Tensor) -> bool:
        """Returns whether a buffer that is not yet sized may take the size of a saved one."""
        return False


def problem_with(
    state_dict: Mapping[str, Any],
    prefix: str,
    buffers: Mapping[str, Tensor | None],
    layout: ParamLayout | None,
    may_resize: Callable[[str, Tensor, Tensor], bool],
) -> str | None:
    """Why ``state_dict`` cannot be loaded, or None.

    Args:
        state_dict: What was saved, this balancer's entries under ``prefix``.
        prefix: Of the balancer within the module that is loaded.
        buffers: The balancer's state by name, before loading.
        layout: Its shared parameters, where they are known.
        may_resize: Whether the buffer of a name and a tensor may take the size of a saved tensor.
    """
    damage = _damage_in(state_dict, prefix, buffers)
    if damage is not None:
        return f"Expected {damage}. The file is damaged, or not the state of a balancer: take it from a copy."
    extra = state_dict.get(prefix + "_extra_state")
    if extra is not None and extra["version"] > STATE_VERSION:
        return (
            f"Expected a balancer state of version {STATE_VERSION} or older, but got version {extra['version']}. "
            "Install the newer excessmtl_ext it was saved with."
        )
    numels = (
        None if extra is None or extra["param_numels"] is None else tuple(extra["param_numels"])
    )
    if numels is not None and layout is not None and numels != layout.numels:
        return (
            f"Expected a state for shared parameters of sizes {shortened(layout.numels)}, but got one for "
            f"{shortened(numels)}. Give the balancer the parameters it was saved with, or start a new one."
        )
    for name, tensor in buffers.items():
        saved = state_dict.get(prefix + name)
        if saved is None or tensor is None or saved.shape == tensor.shape:
            continue
        if not may_resize(name, tensor, saved):
            return (
                f"Expected `{name}` of shape {list(tensor.shape)}, but got {list(saved.shape)}. It was saved "
                "by a balancer with other tasks, parameters or options; make this one with the same."
            )
    return None


def _damage_in(
    state_dict: Mapping[str, Any], prefix: str, buffers: Mapping[str, Tensor | None]
) -> str | None:
    """What is expected of ``state_dict`` and what it holds instead, or None: no step writes NaN into these."""
    key = prefix + "_extra_state"
    extra = state_dict.get(key)
    if key in state_dict and not (
        isinstance(extra, dict)
        and isinstance(extra.get("version"), int)
        and {"num_calls", "param_numels"} <= extra.keys()
    ):
        return f"`_extra_state` of a balancer, but got {extra!r:.100}"
    for name in buffers:
        saved = state_dict.get(prefix + name)
        if saved is not None and not isinstance(saved, Tensor):
            return f"`{name}` to be a tensor, but got {type(saved).__name__}"
        if name in _NEVER_NAN and type(saved) is Tensor and bool(saved.isnan().any()):
            return f"`{name}` without NaN, but got {int(saved.isnan().sum())} of {saved.numel()}"
    return None
