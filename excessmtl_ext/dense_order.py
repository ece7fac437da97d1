"""The order in which the elements of parameters lie in memory, where it is not the contiguous one (channels_last, say).

What the ops do to a gradient is elementwise or a sum, so any order of its elements will do, if gradients, state and
result are all in the same. A dense tensor seen in the order of its memory is a contiguous view, which no op copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat, starmap
from math import prod
from operator import is_not
from typing import NamedTuple

from torch import Tensor

from excessmtl_ext.state import padded_numel


class DenseOrder(NamedTuple):
    """How L parameters are seen so that they are contiguous."""

    shapes: tuple[tuple[int, ...], ...]
    """Of the parameters."""
    permutations: tuple[tuple[int, ...], ...]
    """Their dimensions from the slowest to the fastest."""
    inverses: tuple[tuple[int, ...], ...]

    def seen(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Returns views of L tensors of the parameters' shapes; None stays."""
        if all(
            map(is_not, tensors, repeat(None))
        ):  # no loop over parameters: it runs once per task
            return list(map(Tensor.permute, tensors, self.permutations))  # type: ignore[arg-type]
        pairs = zip(tensors, self.permutations, strict=True)
        return [None if each is None else each.permute(order) for each, order in pairs]

    def undone(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns L tensors of :meth:`seen` in the parameters' shapes, in their memory; those without elements stay.

        Detached, so that they are no views for autograd: ``detach_`` of a ``.grad`` works.
        """
        pairs = zip(tensors, self.inverses, strict=True)
        return [each.permute(order).detach() if each.numel() > 0 else each for each, order in pairs]


def order_of(parameters: Sequence[Tensor]) -> DenseOrder | None:
    """Returns the order of the parameters' memory; None where all are contiguous."""
    if all(map(Tensor.is_contiguous, parameters)):
        return None
    shapes = tuple(map(tuple, map(Tensor.size, parameters)))
    return _order(shapes, tuple(map(Tensor.stride, parameters)))


@lru_cache(maxsize=16)
def _order(
    shapes: tuple[tuple[int, ...], ...], strides: tuple[tuple[int, ...], ...]
) -> DenseOrder | None:
    permutations = tuple(starmap(_permutation, zip(shapes, strides, strict=True)))
    if all(order == tuple(range(len(order))) for order in permutations):
        return None
    inverses = tuple(tuple(map(order.index, range(len(order)))) for order in permutations)
    return DenseOrder(shapes, permutations, inverses)


def _permutation(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the dimensions from the slowest to the fastest; as they are where that leaves gaps or overlaps."""
    order = tuple(sorted(range(len(shape)), key=lambda dim: (-strides[dim], dim)))
    expected = prod(shape)
    for dim in order:
        if shape[dim] == 1:
            continue
        expected //= shape[dim] or 1
        if strides[dim] != expected:
            return tuple(range(len(shape)))
    return order


def reordered(flat: Tensor, before: DenseOrder | None, after: DenseOrder | None) -> Tensor:
    """Returns a copy of a flat state tensor [..., padded P] of one order in another; None: the contiguous one."""
    copy = flat.clone()
    given = before or after
    if given is None:
        return copy
    start = 0
    for index, shape in enumerate(given.shapes):
        numel = prod(shape)
        part = slice(start, start + numel)
        start += padded_numel(numel)
        own = flat[..., part]
        if before is not None:
            order = before.permutations[index]
            own = _permuted(own, [shape[dim] for dim in order], before.inverses[index])
        if after is not None:
            own = _permuted(own, shape, after.permutations[index])
        copy[..., part] = own
    return copy


def _permuted(part: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """Returns the elements [..., n] of tensors of ``shape`` as those of their permuted views."""
    behind = part.dim() - 1
    if not shape:
        return part
    whole = part.unflatten(-1, tuple(shape))
    return whole.permute(*range(behind), *(behind + dim for dim in order)).flatten(behind)


__all__ = ["DenseOrder", "order_of", "reordered"]
