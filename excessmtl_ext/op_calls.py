"""The ops of ``torch.ops.excessmtl_ext`` with the names of their arguments, and their fake kernels.

The schemas in ``csrc/ops.cpp`` are flat; :mod:`excessmtl_ext.functional` lays state and options out by these names.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from excessmtl_ext import _extension
from excessmtl_ext.state import StepOptions, StepState

NO_STATE = (None,) * len(StepState._fields)

COMPILED_FOR = frozenset(name for name in ("cpu", "cuda") if _extension.has_op_for(name))
"""Types of devices that the ops are compiled for."""

_EXPRESSIONS = {
    **{name: f"state[{index}]" for index, name in enumerate(StepState._fields)},
    **{name: f"options[{index}]" for index, name in enumerate(StepOptions._fields)},
    "sqrt_fisher": "options[0] == 'sqrt'",
    "param_numels": "layout.param_numels",
    "chunk_map": "layout.chunk_maps[device]",
    "raw_risk_scale": "options.raw_risk_scale(layout)",
}


def find_op(name: str) -> Any:
    """The compiled op of this name."""
    return getattr(torch.ops.excessmtl_ext, name).default


@functools.cache
def invoker(name: str, given: frozenset[str]) -> Callable[..., Any]:
    """Compiles a function that calls with the arguments of an op, laid out by the names in its schema.

    Compiled from source, as a dataclass compiles ``__init__``: looking up some twenty names in every step would take
    longer than the op's own checks.

    Args:
        name: Of the op.
        given: Arguments that the caller has by name; the others come from layout, state and options.

    Returns:
        ``invoke(run, device, given, layout, state, options)``, which returns what ``run`` returns.
    """
    expressions = {**_EXPRESSIONS, **{each: f"given[{each!r}]" for each in given}}
    arguments = ", ".join(
        f"{each.name}={expressions[each.name]}" if each.kwarg_only else expressions[each.name]
        for each in find_op(name)._schema.arguments
    )
    source = f"lambda run, device, given, layout, state, options: run({arguments})"
    return eval(compile(source, f"<arguments of {name}>", "eval"), {})


@functools.cache
def twin_parameters(twin: Callable[..., None]) -> tuple[str, ...]:
    """The names of the arguments that a twin takes."""
    return tuple(inspect.signature(twin).parameters)


def _fake_of(name: str) -> Callable[..., None]:
    """The fake of an op that only mutates: it does nothing, but on one device.

    One meta tensor among others sends a call here, where it would pass for a step.
    """
    names = [each.name for each in find_op(name)._schema.arguments if not each.kwarg_only]

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


for _name in _extension.OP_NAMES if _extension.ops_available else ():
    torch.library.register_fake(f"excessmtl_ext::{_name}", _fake_of(_name))
