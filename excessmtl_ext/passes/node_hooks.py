"""Hooks of nodes that read or scale what a backward pass hands on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def scaling(
    positions: Sequence[int], weight: Tensor
) -> Callable[[Sequence[Tensor | None], Sequence[Tensor | None]], tuple[Tensor | None, ...]]:
    """A node's hook that multiplies what it passes on at ``positions`` by ``weight``."""

    def scale(
        grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        return tuple(
            grad * weight.to(grad.dtype) if index in positions and grad is not None else grad
            for index, grad in enumerate(grad_inputs)
        )

    return scale


def reading(
    positions: Sequence[tuple[int, int]], found: dict[int, Tensor]
) -> Callable[[Sequence[Tensor | None], Sequence[Tensor | None]], None]:
    """A node's hook that adds what it passes on at each position to ``found``, by feature."""

    def read(grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]) -> None:
        for position, feature in positions:
            grad = grad_inputs[position]
            if grad is not None:
                found[feature] = found[feature] + grad if feature in found else grad

    return read
