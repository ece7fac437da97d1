"""What a balancer saves besides its state tensors, as one float64 tensor: its counters, sizes and options.

A tensor, because tools that walk ``state_dict().values()`` (safetensors, weight averages, means over
clients) take nothing else. Layout: the version, then for each field its length and its numbers. A
mean of such tensors, or a running one, is such a tensor.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

STATE_VERSION = 2
"""Version of what ``state_dict`` holds; raised when its meaning changes. 1: ``_extra_state`` was a dict."""

Fields: TypeAlias = dict[str, list[float]]
"""Numbers by name."""

_WORDS = (
    "linear",
    "sqrt",
    "simplex",
    "num_tasks",
    "none",
    "task_weights",
    "per_tensor",
    "sum",
    "parameters",
    "features",
    "G",
    "L",
    "both",
)
"""Values of options that are words; their places are saved."""

_TOLERANCE = 1e-6
"""Relative, for numbers that must be equal: a mean of equal numbers may be rounded, in float32 too."""


def pack(fields: Mapping[str, Sequence[float]], device: torch.device) -> Tensor:
    """Returns the fields as one tensor."""
    numbers = [float(STATE_VERSION)]
    for values in fields.values():
        numbers += [float(len(values)), *map(float, values)]
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def unpack(extra: object, names: Sequence[str]) -> Fields:
    """Returns the fields that :func:`pack` was given, or those of version 1; the latter may lack some.

    Args:
        extra: The entry ``_extra_state`` of a saved state.
        names: Of the fields, in order.

    Raises:
        ValueError: it is no such entry, or a newer one.
    """
    if isinstance(extra, dict):
        return _of_version_1(extra)
    if not isinstance(extra, Tensor) or extra.dim() != 1 or not extra.is_floating_point():
        raise ValueError(damaged(f"`_extra_state` of a balancer, but got {extra!r:.100}"))
    if extra.is_meta:
        raise ValueError(
            "Expected a state with data, but its tensors are on the meta device. Load the file with another "
            "map_location."
        )
    numbers: list[float] = extra.double().tolist()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(damaged(f"`_extra_state` of finite numbers, but got {numbers!r:.100}"))
    if round(numbers[0]) > STATE_VERSION:
        raise ValueError(_newer(round(numbers[0])))
    values = list(_cut(numbers[1:]))
    if len(values) != len(names):
        raise ValueError(
            f"Expected `_extra_state` with the fields {', '.join(names)}, but got {len(values)} of them. It is "
            "damaged, or was saved by a balancer of another class."
        )
    return dict(zip(names, values, strict=True))


def waiting_tasks(fields: Fields, num_tasks: int) -> list[int]:
    """Returns the tasks that wait for their turn in a saved round; all of them where a round begins."""
    waits = fields.get("waits", [1.0] * num_tasks)
    waiting = [task for task, waits_now in enumerate(waits) if round(waits_now)]
    if "waiting_tasks" in fields:  # of version 1
        waiting = [round(task) for task in fields["waiting_tasks"]]
    return waiting or list(range(num_tasks))


def damaged(expected: str) -> str:
    """Returns the message for a state that no balancer saves."""
    return f"Expected {expected}. The file is damaged, or not the state of a balancer: take it from a copy."


def _newer(version: int) -> str:
    return (
        f"Expected a balancer state of version {STATE_VERSION} or older, but got version {version}. "
        "Install the newer excessmtl_ext it was saved with."
    )


def _of_version_1(extra: dict[str, Any]) -> Fields:
    version, num_calls = extra.get("version"), extra.get("num_calls")
    if isinstance(version, int) and version > 1:
        raise ValueError(_newer(version))
    numels = extra.get("param_numels", "missing")
    lists = (numels or [], extra.get("waiting_tasks", []))
    is_whole = (
        version == 1
        and _is_count(num_calls)
        and all(isinstance(each, list) and all(map(_is_count, each)) for each in lists)
    )
    if not is_whole:
        raise ValueError(damaged(f"`_extra_state` of a balancer, but got {extra!r:.100}"))
    fields: Fields = {
        "num_calls": [float(extra["num_calls"])],
        "param_numels": [float(numel) for numel in numels or []],
    }
    for name in ("has_warned_of_collapse", "has_observed", "task"):
        if name in extra:
            fields[name] = [float(extra[name])]
    if "waiting_tasks" in extra:
        fields["waiting_tasks"] = [float(task) for task in extra["waiting_tasks"]]
    return fields


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _cut(numbers: Sequence[float]) -> Iterator[list[float]]:
    """Yields lists, each of which follows its length."""
    start = 0
    while start < len(numbers):
        length = round(numbers[start])
        if not 0 <= length < len(numbers) - start:
            raise ValueError(damaged(f"`_extra_state` of a balancer, but got {numbers!r:.100}"))
        yield list(numbers[start + 1 : start + 1 + length])
        start += 1 + length


# ---- options


def option_numbers(options: Mapping[str, object]) -> list[float]:
    """Returns the values of options as numbers: for each its length, then as many."""
    numbers: list[float] = []
    for value in options.values():
        own = _numbers_of(value)
        numbers += [float(len(own)), *own]
    return numbers


def differences(saved: Sequence[float], options: Mapping[str, object]) -> dict[str, str]:
    """Returns which of ``options`` had another value when ``saved`` was made of them, and that value: for a message.

    Raises:
        ValueError: ``saved`` is of other options.
    """
    values = list(_cut(saved))
    if len(values) != len(options):
        raise ValueError(
            f"Expected a state with {len(options)} options, but got one with {len(values)}. It was saved by a balancer "
            "of another class."
        )
    return {
        name: _described(before, value)
        for (name, value), before in zip(options.items(), values, strict=True)
        if not _are_equal(before, _numbers_of(value))
    }


def are_equal_sizes(saved: Sequence[float], numels: Sequence[int]) -> bool:
    """Returns whether saved sizes are those of a layout."""
    return _are_equal(saved, [float(numel) for numel in numels])


def _are_equal(first: Sequence[float], second: Sequence[float]) -> bool:
    return len(first) == len(second) and all(
        math.isclose(a, b, rel_tol=_TOLERANCE) for a, b in zip(first, second, strict=True)
    )


def _numbers_of(value: object) -> list[float]:
    if isinstance(value, str):
        # Below 0, where no number of an option is.
        is_known = value in _WORDS
        place = _WORDS.index(value) if is_known else 100 + zlib.crc32(value.encode()) % 1000
        return [-1.0 - place]
    if isinstance(value, bool | int | float):
        return [float(value)]
    if isinstance(value, tuple | list):
        return [number for each in value for number in _numbers_of(each)]
    return []  # None, and objects, which cannot be compared


def _described(numbers: Sequence[float], like: object) -> str:
    """Describes the saved numbers of an option whose value is now ``like``."""
    shown = [_word(number) if number < 0 else f"{number:g}" for number in numbers]
    if isinstance(like, bool):
        shown = [str(bool(round(number))) for number in numbers]
    if len(shown) < 2:
        return shown[0] if shown else "None"
    return f"({', '.join(shown)})"


def _word(number: float) -> str:
    place = round(-1.0 - number)
    return repr(_WORDS[place]) if place < len(_WORDS) else "another one"
