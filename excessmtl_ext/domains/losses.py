"""T losses from one forward pass over samples, or tokens, of T domains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from excessmtl_ext.arguments import check_count
from excessmtl_ext.balancer import Balancer
from excessmtl_ext.engines.cheaper import subset_rows
from excessmtl_ext.step_arguments import read_step


def domain_losses(
    losses: Tensor, domain_ids: Tensor, num_domains: int, *, mask: Tensor | None = None
) -> list[Tensor | None]:
    """Averages the losses of every domain in a batch; None for a domain that is absent.

    Where a loss is NaN, only its own domain's mean is. Waits for the device of ``domain_ids``, so keep them on the CPU.

    Args:
        losses: Loss of every sample [B] or token [B, L], as from ``cross_entropy(..., reduction="none")``.
        domain_ids: Domain of every sample [B], whose tokens it then holds for, or of every token; integers below
            ``num_domains``. Negative: of no domain, left out.
        num_domains: T.
        mask: True for the losses that count, such as those of tokens that are no padding; the shape of ``losses``, or
            one per sample.

    Shape:
        losses [B, ...], floating point. Returns T scalars, float32 at least.

    Raises:
        ValueError: a shape does not fit, or there is a domain beyond ``num_domains``.
        TypeError: ``domain_ids`` are no integers, or ``mask`` is not boolean.

    Example:
        >>> import torch
        >>> losses = torch.tensor([[1.0, 3.0], [5.0, 9.0]])
        >>> domain_losses(losses, torch.tensor([2, 0]), 3)
        [tensor(7.), None, tensor(2.)]
    """
    check_count("num_domains", num_domains, 1)
    _check_ids(domain_ids)
    ids = _like_losses(domain_ids, losses, "domain_ids").reshape(-1)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"Expected `mask` to be boolean, but got {mask.dtype}.")
        counts = _like_losses(mask, losses, "mask").reshape(-1)
        ids = torch.where(counts.to(ids.device), ids, -1)
    order = torch.argsort(ids, stable=True)
    sizes = torch.bincount(ids.clamp(min=-1) + 1, minlength=num_domains + 1).tolist()
    if len(sizes) > num_domains + 1:
        raise ValueError(
            f"Expected `domain_ids` below num_domains = {num_domains}, but got {len(sizes) - 2}."
        )
    flat = losses.reshape(-1)
    _, *places = order.to(flat.device, non_blocking=True).split(sizes)
    wide = torch.promote_types(flat.dtype, torch.float32)
    return [
        flat[place].to(wide).mean() if size else None
        for place, size in zip(places, sizes[1:], strict=True)
    ]


def split_domains(
    balancer: Any,
    features: Tensor,
    domain_ids: Tensor,
    *,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """Returns the features, through which a backward pass of the summed losses is a balanced step; one pass.

    ::

        z = split_domains(balancer, backbone(inputs), domain_ids)
        losses = domain_losses(cross_entropy(head(z), ...), domain_ids, num_domains)
        sum(loss for loss in losses if loss is not None).backward()  # or a trainer's

    What lies below gets the gradient of the weighted sum, what lies above that of the plain one. Each
    loss must depend on the features of its own domain only, as all do that look at one sample or sequence.
    Otherwise as :meth:`balancer.split <excessmtl_ext.ExcessMTL.split>`.

    Args:
        balancer: An :class:`excessmtl_ext.ExcessMTL` of T domains, with ``feature_dim=-1`` for tokens.
        features: [B, ...], what the head takes.
        domain_ids: As for :func:`domain_losses`: of every sample [B], or of every token.
        grad_scale: As for ``balancer.split``.

    Raises:
        ValueError: a shape does not fit.
        TypeError: ``domain_ids`` are no integers.
    """
    _check_ids(domain_ids)
    if domain_ids.shape != features.shape[: domain_ids.dim()]:
        raise ValueError(
            f"Expected `domain_ids` of shape {list(features.shape[:1])}, one per sample, or "
            f"{list(features.shape[:2])}, one per token, but got {list(domain_ids.shape)}."
        )
    copies: Sequence[Tensor] = balancer.split(features, grad_scale=grad_scale)
    present = set(domain_ids.unique().tolist())
    ids = domain_ids.to(features.device, non_blocking=True)
    ids = ids.reshape(*ids.shape, *[1] * (features.dim() - ids.dim()))
    joined = features.detach()  # of no domain: nothing is learned from them
    for domain, copy in enumerate(copies):
        if domain in present:
            joined = torch.where(ids == domain, copy, joined)
    return joined


def move_weights(
    balancer: Balancer,
    losses: Sequence[Tensor | None],
    *,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """Moves the weights by the losses of a step, and touches no ``.grad``; for weights of a sampler.

    The graphs stay, for the ordinary backward pass of the batch. Methods that need task gradients take one pass per
    domain, which ends at ``estimate_from`` where that names some parameters.

    Args:
        balancer: In one process, with shared parameters.
        losses: T scalar losses, None for absent domains.
        grad_scale: As for :meth:`excessmtl_ext.Balancer.backward`.

    Returns:
        The new weights [T], float64.

    Raises:
        ValueError: as ``backward``.
        NotImplementedError: the options ask for several ranks, or for features.
    """
    if balancer.engine.shards_state or balancer.needs_features:
        raise NotImplementedError(
            "Expected one process, and risks from parameters, for move_weights(). Give `estimate_from` parameters, "
            "such as those of the last layer; or weigh the loss: balancer.backward(losses)."
        )
    if balancer.search is not None:
        balancer.find_shared(losses)
    step = read_step(balancer, losses, grad_scale=grad_scale, retain_graph=True)
    if not step.tasks:
        return balancer.task_weights
    rows = None
    if "task_grads" in balancer.requires:
        subset = getattr(balancer.engine, "subset", None) or step.shared
        rows = [
            row if task in step.tasks else []
            for task, row in enumerate(subset_rows(step, subset, step.tasks))
        ]
    return balancer.update_weights(rows, list(losses), grad_scale=grad_scale)


def _check_ids(domain_ids: Tensor) -> None:
    if domain_ids.is_floating_point() or domain_ids.dtype == torch.bool:
        raise TypeError(f"Expected `domain_ids` to be integers, but got {domain_ids.dtype}.")


def _like_losses(given: Tensor, losses: Tensor, name: str) -> Tensor:
    if losses.dim() == 0 or given.shape != losses.shape[: given.dim()] or given.dim() == 0:
        raise ValueError(
            f"Expected `{name}` of the shape of `losses`, {list(losses.shape)}, or one per sample, but got "
            f"{list(given.shape)}. Losses must not be reduced: reduction='none'."
        )
    return given.reshape(*given.shape, *[1] * (losses.dim() - given.dim())).expand(losses.shape)
