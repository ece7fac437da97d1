"""The ops of ``torch.ops.excessmtl_ext`` with the names of their arguments, and their fake kernels.

The schemas in ``csrc/ops.cpp`` are flat; :mod:`excessmtl_ext.functional` lays state and options out by these names.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from excessmtl_ext import _extension
from excessmtl_ext.state import MoveOptions, MoveState, StepOptions, StepState

NO_STATE = (None,) * len(StepState._fields)
NO_MOVE = (None,) * len(MoveState._fields)
DEFAULT_OPTIONS = StepOptions()
PLAIN = MoveOptions()

COMPILED_FOR = frozenset(name for name in ("cpu", "cuda") if _extension.has_op_for(name))
"""Types of devices that the ops are compiled for."""

COMPOSED_ON = frozenset({"cuda"})
"""Types of devices whose ops do not know ``move``, squares and weights [T, L]: :mod:`excessmtl_ext.composed_ops`."""


SIZES_IN_GRAPHS_ON = frozenset({"cuda"})
"""Types of devices where a compiled graph holds sizes instead of a tensor on the CPU, which ends a CUDA graph."""


def find_op(name: str) -> Any:
    """Returns the compiled op of this name."""
    return getattr(torch.ops.excessmtl_ext, name).default


class ArgumentPlan(NamedTuple):
    """Where the arguments of an op are found, in the order of its schema: in which of the sources, and its key there.

    The sources are what the caller gives by name, the fields of the state, those of the options, ``OF_LAYOUT``,
    ``OF_OPTIONS``, and the fields of the two of the moves, with ``OF_MOVES`` in between.
    """

    positional: list[tuple[int, Any]]
    keywords: list[tuple[str, int, Any]]
    """The name of the argument first."""
    written: list[int]
    """Which positional arguments the op writes; a list of tensors among them is one argument."""
    written_keywords: list[str]
    """Names of the others that it writes."""


OF_LAYOUT = ("param_numels", "chunk_map")
OF_OPTIONS = ("sqrt_fisher",)
OF_MOVES = ("weight_floors",)


@functools.cache
def plan_arguments(name: str, given: frozenset[str]) -> ArgumentPlan:
    """Finds the arguments of an op by the names in its schema, once: a step looks up none of the some twenty names.

    Args:
        name: Of the op.
        given: Arguments that the caller has by name; the others come from state, options and layout.
    """
    places: dict[str, tuple[int, Any]] = {}
    for source, names in enumerate(
        (
            StepState._fields,
            StepOptions._fields,
            OF_LAYOUT,
            OF_OPTIONS,
            MoveState._fields,
            OF_MOVES,
            MoveOptions._fields,
        ),
        start=1,
    ):
        places.update({each: (source, index) for index, each in enumerate(names)})
    places.update({each: (0, each) for each in given})
    arguments = [
        each
        for each in find_op(name)._schema.arguments
        if each.name in places or not each.has_default_value()
    ]

    def is_written(argument: Any) -> bool:
        return argument.alias_info is not None and argument.alias_info.is_write

    return ArgumentPlan(
        [places[each.name] for each in arguments if not each.kwarg_only],
        [(each.name, *places[each.name]) for each in arguments if each.kwarg_only],
        [k for k, each in enumerate(arguments) if is_written(each) and not each.kwarg_only],
        [each.name for each in arguments if is_written(each) and each.kwarg_only],
    )


@functools.cache
def twin_parameters(twin: Callable[..., None]) -> tuple[str, ...]:
    """Returns the names of the arguments that a twin takes."""
    return tuple(inspect.signature(twin).parameters)


def _fake_of(name: str) -> Callable[..., None]:
    """Returns the fake of an op that only mutates: it does nothing, but on one device.

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


_SIZED = torch.library.Library("excessmtl_ext", "FRAGMENT")
_sizes_of = functools.lru_cache(maxsize=64)(lambda numels: torch.tensor(numels, dtype=torch.int64))


def _with_sizes(name: str) -> Any:
    """Defines the overload ``sizes`` of an op, with ``int[] param_numels``; None for an op without them."""
    op = find_op(name)
    names = [each.name for each in op._schema.arguments]
    if "param_numels" not in names:
        return None
    schema = str(op._schema).removeprefix("excessmtl_ext::")
    schema = schema.replace(f"{name}(", f"{name}.sizes(", 1)
    schema = schema.replace("Tensor param_numels", "int[] param_numels", 1)
    position = names.index("param_numels")

    def run(*args: Any, **kwargs: Any) -> None:
        sizes = _sizes_of(tuple(args[position]))
        op(*args[:position], sizes, *args[position + 1 :], **kwargs)

    _SIZED.define(schema)
    _SIZED.impl(f"{name}.sizes", run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"excessmtl_ext::{name}.sizes", _fake_of(name), lib=_SIZED)
    return getattr(torch.ops.excessmtl_ext, name).sizes


for _name in _extension.OP_NAMES if _extension.ops_available else ():
    torch.library.register_fake(f"excessmtl_ext::{_name}", _fake_of(_name))

WITH_SIZES = {
    name: _with_sizes(name) for name in (_extension.OP_NAMES if _extension.ops_available else ())
}
"""The overloads that take sizes, by the name of the op; None for those that need none."""
