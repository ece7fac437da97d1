"""Compares what a JSON file holds with what its writer has put there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Schema = Any
"""What a value may be; see `find_mismatch`."""


@dataclass(frozen=True)
class AtLeast:
    """A whole number from ``minimum`` on."""

    minimum: int


@dataclass(frozen=True)
class OneOf:
    """One of some values."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Nullable:
    """A value that may also be null or missing."""

    schema: Schema


def find_mismatch(value: Any, schema: Schema, place: str = "") -> str | None:
    """Describes the first place where ``value`` is not what ``schema`` says; None where there is none.

    Args:
        value: As `json.loads` returns it.
        schema: A type (``float`` takes whole numbers too, ``int`` no truth values); ``[schema]``, a list of such
            values; ``{"name": schema, ...}``, an object with these entries and perhaps others; ``{str: schema}``, an
            object of such values; `AtLeast`, `OneOf`, or `Nullable`, which may be missing from its object.
        place: Where the value lies, such as ``tasks[0].name``; empty for the whole content.
    """
    if isinstance(schema, Nullable):
        return None if value is None else find_mismatch(value, schema.schema, place)
    if isinstance(schema, OneOf):
        is_right = any(type(value) is type(each) and value == each for each in schema.values)
        return None if is_right else _describe(place, f"one of {list(schema.values)}", value)
    if isinstance(schema, AtLeast):
        is_right = type(value) is int and value >= schema.minimum
        return (
            None
            if is_right
            else _describe(place, f"a whole number from {schema.minimum} on", value)
        )
    if isinstance(schema, list):
        if not isinstance(value, list):
            return _describe(place, "a list", value)
        found = (find_mismatch(each, schema[0], f"{place}[{i}]") for i, each in enumerate(value))
        return next((mismatch for mismatch in found if mismatch is not None), None)
    if isinstance(schema, dict):
        return _find_in_object(value, schema, place)
    kinds = (int, float) if schema is float else (schema,)
    if isinstance(value, kinds) and (schema is bool or not isinstance(value, bool)):
        return None
    return _describe(place, f"of type {schema.__name__}", value)


def _find_in_object(value: Any, schema: dict[Any, Schema], place: str) -> str | None:
    if not isinstance(value, dict):
        return _describe(place, "an object", value)
    entries = [
        (name, each) for key, each in schema.items() for name in (value if key is str else [key])
    ]
    for name, each in entries:
        inner = f"{place}.{name}" if place else name
        if name not in value:
            if isinstance(each, Nullable):
                continue
            return f"`{inner}`, but it is missing"
        mismatch = find_mismatch(value[name], each, inner)
        if mismatch is not None:
            return mismatch
    return None


def _describe(place: str, expected: str, value: Any) -> str:
    what = f"`{place}` being " if place else "content being "
    return f"{what}{expected}, but got {repr(value)[:80]}"
