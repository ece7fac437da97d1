"""Calls an op of ``torch.ops.excessmtl_ext`` from named arguments, or its twin where none is compiled for the device.

The schemas in ``csrc/ops.cpp`` are flat. Here alone state and options are laid out for them, by name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from excessmtl_ext import _extension
from excessmtl_ext.state import ParamLayout, StepOptions, StepState

_NAMES = (*StepState._fields, *StepOptions._fields, "sqrt_fisher")
_NO_STATE = (None,) * len(StepState._fields)
_DEFAULT_OPTIONS = StepOptions()


class _Op(NamedTuple):
    """A compiled op, and the names of its arguments."""

    run: Callable[..., None]
    positional: tuple[str, ...]
    keywords: tuple[str, ...]


def _find_op(name: str) -> _Op:
    run = getattr(torch.ops.excessmtl_ext, name).default
    arguments = run._schema.arguments
    positional = tuple(argument.name for argument in arguments if not argument.kwarg_only)
    keywords = tuple(argument.name for argument in arguments if argument.kwarg_only)
    return _Op(run, positional, keywords)


_OPS = {name: _find_op(name) for name in _extension.OP_NAMES} if _extension.ops_available else {}


def op_arguments(
    name: str,
    device: torch.device,
    layout: ParamLayout | None = None,
    state: StepState | None = None,
    options: StepOptions = _DEFAULT_OPTIONS,
    **given: Any,
) -> tuple[list[Any], dict[str, Any]]:
    """Lays out the arguments of an op in the order of its schema.

    Args:
        name: Of the op.
        device: Of the step.
        layout: Gives ``param_numels``, ``chunk_map`` and ``raw_risk_scale``.
        state: Gives what the schema names as a field of the state.
        options: Give what the schema names as one of the options.
        **given: The other arguments, and those that are to be others than the state's.

    Returns:
        The positional and the keyword arguments.
    """
    values = _flat(device, layout, state, options, given)
    return [values[key] for key in _OPS[name].positional], {
        key: values[key] for key in _OPS[name].keywords
    }


def _flat(
    device: torch.device,
    layout: ParamLayout | None,
    state: StepState | None,
    options: StepOptions,
    given: dict[str, Any],
) -> dict[str, Any]:
    """Everything at hand by its name in the schemas."""
    flat = (*(state or _NO_STATE), *options, options.fisher == "sqrt")
    values = dict(zip(_NAMES, flat, strict=True))
    if layout is not None:
        values["param_numels"] = layout.param_numels
        values["chunk_map"] = layout.chunk_map(device)
        values["raw_risk_scale"] = options.raw_risk_scale(layout)
    values.update(given)
    return values


@functools.cache
def _parameters(twin: Callable[..., None]) -> tuple[str, ...]:
    return tuple(inspect.signature(twin).parameters)


def call(
    twin: Callable[..., None],
    device: torch.device,
    layout: ParamLayout | None = None,
    state: StepState | None = None,
    options: StepOptions = _DEFAULT_OPTIONS,
    *,
    op: str | None = None,
    **given: Any,
) -> None:
    """Runs the op compiled for ``device``, or its twin.

    Args:
        twin: Takes what it needs of the arguments, by name.
        device: Of the step.
        layout: As in :func:`op_arguments`.
        state: As there.
        options: As there.
        op: The op's name, where it is not the twin's.
        **given: As there.
    """
    if _extension.has_op_for(device.type):
        name = twin.__name__ if op is None else op
        run, positional, keywords = _OPS[name]
        values = _flat(device, layout, state, options, given)
        run(*[values[key] for key in positional], **{key: values[key] for key in keywords})
    else:
        if device.type == "cuda":
            _extension.warn_of_missing_cuda_ops()
        given.update(layout=layout, state=state, options=options)
        twin(**{name: given[name] for name in _parameters(twin)})


def _fake_of(name: str) -> Callable[..., None]:
    """The fake of an op that only mutates: it does nothing, but on one device.

    One meta tensor among others sends a call here, where it would pass for a step.
    """
    names = _OPS[name].positional

    def fake(*args: Any, **kwargs: Any) -> None:
        devices: dict[torch.device, str] = {}
        for name, arg in (*zip(names, args, strict=False), *kwargs.items()):
            for tensor in arg if isinstance(arg, (list, tuple)) else [arg]:
                # `param_numels` is on the CPU, whatever the device of the step.
                if isinstance(tensor, Tensor) and (name, tensor.device.type) != (
                    "param_numels",
                    "cpu",
                ):
                    devices.setdefault(tensor.device, name)
        if len(devices) > 1:
            where = ", ".join(f"`{name}` on {device}" for device, name in devices.items())
            raise RuntimeError(f"Expected one device, but got {where}. Move them to one device.")

    return fake


for _name in _OPS:
    torch.library.register_fake(f"excessmtl_ext::{_name}", _fake_of(_name))
