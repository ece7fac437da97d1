"""The balancers that a run can choose by name, and how each looks in every figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from excessmtl_ext import Balancer, ExcessMTL, GroupDRO, Uniform

# One convention for all methods. With Adam and weight decay, weighted heads in one method and unweighted heads in
# another shift a result by more than any balancer does.
CONVENTION: dict[str, Any] = {"head_weighting": "none", "weight_scale": "simplex"}


@dataclass(frozen=True)
class Method:
    """A balancer with settings of its own.

    Attributes:
        label: Its name in tables and figures.
        colour: Its colour in every figure (Okabe & Ito: told apart with any colour vision).
        build: Makes the balancer from the shared parameters and keyword options.
        has_step_size: Takes ``robust_step_size``.
    """

    label: str
    colour: str
    build: Callable[..., Balancer]
    has_step_size: bool = True


def _preset(name: Any) -> Callable[..., Balancer]:
    return lambda parameters, **options: ExcessMTL.from_preset(name, parameters, **options)


METHODS: dict[str, Method] = {
    "excessmtl": Method("ExcessMTL", "#009E73", ExcessMTL),
    "excessmtl-official": Method("ExcessMTL, official", "#56B4E9", _preset("official")),
    "excessmtl-recommended": Method("ExcessMTL, recommended", "#0072B2", _preset("recommended")),
    "uniform": Method("Uniform", "#7F7F7F", Uniform, has_step_size=False),
    "groupdro": Method("GroupDRO", "#D55E00", GroupDRO),
}


def make_balancer(
    method: str,
    shared_parameters: Iterable[Tensor],
    *,
    num_tasks: int,
    robust_step_size: float | None = None,
) -> Balancer:
    """Makes the balancer called ``method``.

    Args:
        method: A key of `METHODS`.
        shared_parameters: What all tasks share, usually ``model.encoder.parameters()``.
        num_tasks: T.
        robust_step_size: Step size of the weights; None for the method's own.

    Raises:
        ValueError: ``method`` is unknown, or is given a step size that it does not have.
    """
    if method not in METHODS:
        raise ValueError(
            f"Expected `method` to be one of {', '.join(METHODS)}, but got {method!r}."
        )
    chosen = METHODS[method]
    options = {"num_tasks": num_tasks, **CONVENTION}
    if robust_step_size is not None:
        if not chosen.has_step_size:
            raise ValueError(
                f"Expected no `robust_step_size` with method {method!r}, whose weights never move, "
                f"but got {robust_step_size}."
            )
        options["robust_step_size"] = robust_step_size
    return chosen.build(shared_parameters, **options)
