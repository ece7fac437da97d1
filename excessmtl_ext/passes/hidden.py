"""Parameters that a walk over the graph cannot see: those of a node that runs a backward pass of its own.

``torch.utils.checkpoint`` with ``use_reentrant=True`` is such a node, and so is any custom
``torch.autograd.Function`` whose ``backward`` calls ``torch.autograd.backward`` or writes ``.grad``.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

_KNOWN_CLASSES: WeakKeyDictionary[type, bool] = WeakKeyDictionary()

_HARMLESS = (
    *(bool, int, float, complex, str, bytes, type(None), type(Ellipsis), slice, range, type),
    *(types.ModuleType, types.BuiltinFunctionType, types.MethodDescriptorType),
)


def hides_parameters(node: Node) -> bool:
    """Tells whether the backward pass of ``node`` runs another one, into parameters that have no edge here."""
    if not isinstance(node, BackwardCFunction):
        return False
    function: type = node._forward_cls  # type: ignore[attr-defined]  # pyright: ignore
    if function not in _KNOWN_CLASSES:
        _KNOWN_CLASSES[function] = _runs_a_pass(function)
    return _KNOWN_CLASSES[function]


def hidden_parameters(node: Node) -> list[Tensor] | None:
    """Collects every parameter that the pass inside ``node`` may reach; None where they cannot be told.

    They are looked up in what the node keeps: the function that is run again, the modules and
    tensors that it refers to.
    """
    search = _Search()
    search.look_at(dict(vars(node)))
    if type(node).__module__ != "torch.utils.checkpoint":
        for function in _functions_of(node._forward_cls):  # type: ignore[attr-defined]  # pyright: ignore
            search.look_at(function)
    return list(search.found.values()) if search.is_complete and search.found else None


def described(node: Node) -> str:
    """Names ``node`` for a message."""
    if "Checkpoint" in type(node).__name__:
        return "torch.utils.checkpoint with use_reentrant=True"
    function = node._forward_cls  # type: ignore[attr-defined]  # pyright: ignore
    return f"the autograd Function {function.__name__}, which runs a backward pass of its own,"


def _functions_of(function: type) -> list[Callable[..., Any]]:
    return [getattr(function, name) for name in ("backward", "vjp") if name in vars(function)]


def _runs_a_pass(function: type) -> bool:
    if function.__module__ == "torch.utils.checkpoint":
        return True
    if function.__module__.partition(".")[0] == "torch":
        return False
    seen: set[types.CodeType] = set()
    stack: list[Any] = _functions_of(function)
    while stack:
        current = stack.pop()
        if not isinstance(current, types.FunctionType) or current.__code__ in seen:
            continue
        seen.add(current.__code__)
        names = set()
        for code in _codes_of(current.__code__):
            names |= set(code.co_names)
            if any(
                each.opname == "STORE_ATTR" and each.argval == "grad"
                for each in dis.get_instructions(code)
            ):
                return True
        if any(name in ("backward", "run_backward", "backward_pass") for name in names):
            return True
        if {"grad", "add_"} <= names:
            return True
        stack += _values_of(current.__closure__)
        stack += [
            value
            for name in names
            if isinstance(value := current.__globals__.get(name), types.FunctionType)
            and value.__module__.partition(".")[0] != "torch"
        ]
    return False


def _codes_of(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes_of(constant)


def _values_of(closure: tuple[types.CellType, ...] | None) -> list[Any]:
    return [value for cell in closure or () for value in _value_in(cell)]


def _value_in(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # not assigned yet
        return []


class _Search:
    """Collects the parameters that an object refers to.

    Attributes:
        found: Parameters by id.
        is_complete: False once there was an object that it cannot look into.
    """

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}
        self.is_complete = True
        self._seen: set[int] = set()

    def look_at(self, value: Any) -> None:
        """Collects the parameters of ``value`` and of what it refers to."""
        if isinstance(value, _HARMLESS) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            if value.is_leaf and value.requires_grad:
                self.found[id(value)] = value
        elif isinstance(value, nn.Module):
            for parameter in value.parameters():
                self.look_at(parameter)
        elif isinstance(value, Mapping):
            for each in value.values():
                self.look_at(each)
        elif isinstance(value, (list, tuple, set, frozenset)):
            for each in value:
                self.look_at(each)
        elif isinstance(value, functools.partial):
            self.look_at([value.func, value.args, value.keywords])
        elif isinstance(value, types.MethodType):
            self.look_at([value.__self__, value.__func__])
        elif isinstance(value, types.FunctionType):
            self._look_at_function(value)
        elif type(value).__module__.partition(".")[0] != "torch":
            self.is_complete = False

    def _look_at_function(self, function: types.FunctionType) -> None:
        if function.__module__.partition(".")[0] == "torch":
            return
        self.look_at([_values_of(function.__closure__), function.__defaults__])
        self.look_at(function.__kwdefaults__)
        for code in _codes_of(function.__code__):
            for name in code.co_names:
                self.look_at(function.__globals__.get(name))
