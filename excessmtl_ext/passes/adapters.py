r"""Task gradients of a small adapter behind the encoder, from what the heads hand to the features.

A layer that changes nothing is thought of between the features z and the heads. Its gradient at
that point is known once the gradients g of the features are, so every task's risk can be estimated
from one backward pass. With N rows of C channels, one per sample and position:

- ``"full"``: z -> A z at A = I. :math:`\partial \ell_i / \partial A = \sum_n g_{in} z_n^\top`,
  C * C elements, 2 N C^2 operations per task.
- ``"low_rank"``: z -> z + P M P^T z at M = 0, with ``RANK`` orthonormal directions P [C, r].
  :math:`\partial \ell_i / \partial M = \sum_n (P^\top g_{in}) (P^\top z_n)^\top`, r * r elements,
  2 N C r operations. Channels have no order that means anything, so that any fixed directions will
  do: those of the discrete cosine transform need no random numbers and are the same on every rank.
- ``"diagonal"``: z -> gamma * z + beta at gamma = 1, beta = 0.
  :math:`\partial \ell_i / \partial \gamma = \sum_n g_{in} \odot z_n` and
  :math:`\partial \ell_i / \partial \beta = \sum_n g_{in}`, 2 C elements, 3 N C operations.
- ``"auto"``: ``"full"`` up to ``LARGEST_FULL`` channels, ``"low_rank"`` above.

Symbols: T tasks, K features, N rows of C channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Adapter = Literal["auto", "full", "low_rank", "diagonal"]

ADAPTERS = ("auto", "full", "low_rank", "diagonal")

RANK = 16
"""Directions of the low-rank adapter."""

LARGEST_FULL = 32
"""Most channels for which ``"auto"`` takes the full adapter: above, its products cost more than the heads do."""


STACKED_TASKS = 16
"""From so many tasks on one copy of their gradients costs less than as many calls."""


def kind_of(adapter: Adapter, num_channels: int) -> Adapter:
    """Returns the adapter that is meant for so many channels; never ``"auto"``."""
    if adapter == "auto":
        adapter = "full" if num_channels <= LARGEST_FULL else "low_rank"
    return "full" if adapter == "low_rank" and num_channels <= RANK else adapter


def adapter_numel(adapter: Adapter, num_channels: int) -> int:
    """Elements of the adapter's gradient."""
    kind = kind_of(adapter, num_channels)
    if kind == "diagonal":
        return 2 * num_channels
    return (RANK if kind == "low_rank" else num_channels) ** 2


def check_feature(feature: Tensor, dim: int, name: str) -> None:
    """Raises ValueError unless ``feature`` has samples and, in dimension ``dim``, channels."""
    if not -feature.dim() <= dim < feature.dim() or feature.dim() < 2:
        raise ValueError(
            f"Expected `{name}` of shape [samples, ..., channels, ...] with the channels in dimension {dim} "
            f"(`feature_dim`), but got {list(feature.shape)}."
        )


def adapter_grads(
    feature: Tensor, grads: Sequence[Tensor | None], dim: int, adapter: Adapter
) -> list[Tensor | None]:
    """Gradients of the adapter behind one feature, one per task; None where the task has none.

    Args:
        feature: z, any shape with the channels in dimension ``dim``.
        grads: Per task the gradient of z, or None.
        dim: The dimension of the channels.
        adapter: Which adapter.

    Returns:
        Tensors [C, C], [r, r] or [2, C], float32 at least: a sum over samples is no place for bfloat16.
    """
    present = [grad for grad in grads if grad is not None]
    if not present:
        return [None] * len(grads)
    rows = rows_of_channels(feature, dim)
    mine = [rows_of_channels(grad, dim) for grad in present]
    kind = kind_of(adapter, rows.shape[1])
    found: Sequence[Tensor]
    if kind == "diagonal":
        found = [torch.stack([(each * rows).sum(0), each.sum(0)]) for each in mine]
    else:
        basis = None
        if kind == "low_rank":
            basis = _directions(rows.shape[1], rows.dtype, rows.device)
            rows = rows @ basis
        if len(mine) >= STACKED_TASKS:
            products = torch.stack(mine).transpose(1, 2) @ rows
            found = (products if basis is None else basis.T @ products).unbind()
        elif basis is None:
            found = [each.T @ rows for each in mine]
        else:
            # Transposed: r rows times a gradient as it lies in memory takes 0.6 of the time.
            across = rows.T.contiguous()
            found = [(across @ each @ basis).T for each in mine]
    row = iter(found)
    return [None if grad is None else next(row) for grad in grads]


def rows_of_channels(tensor: Tensor, dim: int) -> Tensor:
    """Returns [samples * positions, channels], float32 at least."""
    if tensor.dim() == 2 and dim in (1, -1) and tensor.dtype in (torch.float32, torch.float64):
        return tensor
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.movedim(dim, -1).flatten(0, -2).to(wide)


@functools.cache
def _directions(num_channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns [C, r]: the first columns of the orthonormal discrete cosine transform (type II)."""
    angles = (torch.arange(num_channels, dtype=torch.float64) + 0.5) * (math.pi / num_channels)
    basis = (angles[:, None] * torch.arange(RANK)).cos() * math.sqrt(2.0 / num_channels)
    basis[:, 0] *= math.sqrt(0.5)
    return basis.to(device, dtype)
