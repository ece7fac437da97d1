"""Checks of arguments, with one wording: argument, what was expected, what came, and the way out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(
            f"Expected `{name}` to be one of {', '.join(map(repr, choices))}, but got {value!r}."
        )


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless ``value`` is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Expected `{name}` to be a number, but got {type(value).__name__}.")
    if not 0 < value < float("inf"):
        raise ValueError(f"Expected `{name}` > 0, but got {value}.")


def check_count(name: str, value: int, least: int) -> None:
    """Raises unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Expected `{name}` to be an integer, but got {type(value).__name__}.")
    if value < least:
        raise ValueError(f"Expected `{name}` >= {least}, but got {value}.")


def checked_numbers(name: str, given: Any, num_tasks: int) -> list[float]:
    """Lists T numbers, one per task; raises unless ``given`` holds that."""
    try:
        numbers = [float(number) for number in given]
    except (TypeError, ValueError):
        raise TypeError(
            f"Expected `{name}` to hold {num_tasks} numbers, one per task, but got {given!r:.100}."
        ) from None
    if len(numbers) != num_tasks:
        raise ValueError(
            f"Expected `{name}` to hold {num_tasks} numbers, one per task, but got {len(numbers)}."
        )
    return numbers


def checked_parameters(
    shared_parameters: Iterable[Tensor], name: str = "shared_parameters"
) -> list[Tensor]:
    """Lists the shared parameters; raises where there are none, or one is repeated, no leaf or on another device."""
    if isinstance(shared_parameters, (Tensor, nn.Module)):
        raise TypeError(
            f"Expected `{name}` to be parameters, as from model.encoder.parameters(), but got a "
            f"{type(shared_parameters).__name__}."
        )
    parameters = list(shared_parameters)
    for index, parameter in enumerate(parameters):
        if is_lazy(parameter):
            raise ValueError(
                f"Expected `{name}[{index}]` to have a shape, but it gets one in the first forward pass, as in "
                "nn.LazyLinear. Run one batch through the model before the balancer is made."
            )
    if not parameters:
        raise ValueError(
            f"Expected `{name}` to hold at least one parameter, but got none. A generator such as "
            "model.parameters() is empty once it has been read."
        )
    seen: dict[int, int] = {}
    for index, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"Expected `{name}[{index}]` to be a tensor, but got {type(parameter).__name__}. "
                "Pass .parameters(), not .named_parameters()."
            )
        if not parameter.is_leaf:
            raise ValueError(
                f"Expected `{name}[{index}]` to be a leaf, but it was computed from other tensors. "
                "Pass the parameters themselves."
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"Expected `{name}[{index}]` to be real floating point, but got {parameter.dtype}."
            )
        if id(parameter) in seen:
            raise ValueError(
                f"Expected every parameter once, but `{name}[{index}]` is number {seen[id(parameter)]}."
            )
        if parameter.device != parameters[0].device:
            raise ValueError(
                f"Expected `{name}` on one device, but got {parameters[0].device} and {parameter.device}."
            )
        seen[id(parameter)] = index
    refuse_fake(parameters[0])
    return parameters


def refuse_fake(tensor: Tensor | None) -> None:
    """Raises ValueError for a tensor of FakeTensorMode."""
    if isinstance(tensor, FakeTensor):
        raise ValueError(
            "Expected tensors with data, but got those of FakeTensorMode: a balanced step reads values. Measure memory "
            "with balancer.memory_report(step), or leave the balancer out of a dry run, as in sum(losses).backward()."
        )


def trainable(parameters: Sequence[Tensor], name: str = "shared_parameters") -> list[Tensor]:
    """Selects the parameters that require grad; raises ValueError where none does."""
    found = [parameter for parameter in parameters if parameter.requires_grad]
    if not found:
        raise ValueError(
            f"Expected some of `{name}` to require grad, but all {len(parameters)} are frozen. Give the balancer what "
            "trains, such as the adapters of a frozen encoder; if only heads train, there is nothing to balance."
        )
    return found


def shortened(sizes: Sequence[object]) -> str:
    """Returns ``sizes`` for a message, the first six of many."""
    shown = ", ".join(map(str, sizes[:6]))
    return f"[{shown}, ... ({len(sizes)} in all)]" if len(sizes) > 6 else f"[{shown}]"


def stacklevel_of_caller() -> int:
    """Finds the ``stacklevel`` with which a warning of the caller points at the code that uses the package."""
    frame, level = sys._getframe(1), 1  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None:
        module = str(frame.f_globals.get("__name__")).partition(".")[0]
        if module not in (__name__.partition(".")[0], "torch"):
            break
        frame, level = frame.f_back, level + 1
    return level
