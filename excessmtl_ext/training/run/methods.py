"""The balancers that a run can choose by name, and how each looks in every figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from excessmtl_ext import (
    FAMO,
    IMTL,
    MGDA,
    MOML,
    Balancer,
    DualBalancing,
    DynamicWeightAverage,
    ExcessMTL,
    FixedWeights,
    GradNorm,
    GroupDRO,
    InverseNorm,
    SingleTask,
    SmoothTchebycheff,
    UncertaintyWeights,
    Uniform,
)

# One convention for all methods. With Adam and weight decay, weighted heads in one method and unweighted heads in
# another shift a result by more than any balancer does.
CONVENTION: dict[str, Any] = {"head_weighting": "none", "weight_scale": "simplex"}


@dataclass(frozen=True)
class Method:
    """A balancer with settings of its own.

    Attributes:
        label: Its name in tables and figures.
        colour: Its colour in every figure (after Okabe & Ito: told apart with any colour vision).
        build: Makes the balancer from the shared parameters and keyword options.
        has_step_size: Takes ``robust_step_size``.
        tuned: A sweep chooses its step size. False where the method promises one setting for all data.
        requires_task: Trains one task alone, named by ``task``.
        is_in_paper: He et al. 2024 compare it, or it is ours: a sweep runs it unless told which methods to run.
        spans_ranks: Balances what several processes have of a batch as the joined batch.
    """

    label: str
    colour: str
    build: Callable[..., Balancer]
    has_step_size: bool = True
    tuned: bool = True
    requires_task: bool = False
    is_in_paper: bool = True
    spans_ranks: bool = False


def _preset(name: Any) -> Callable[..., Balancer]:
    return lambda parameters, **options: ExcessMTL.from_preset(name, parameters, **options)


def _peer(label: str, colour: str, build: Callable[..., Balancer]) -> Method:
    """Returns a method that the paper does not compare; colours after Paul Tol's muted scheme."""
    return Method(label, colour, build, has_step_size=False, is_in_paper=False)


def _fixed(
    parameters: Iterable[Tensor],
    *,
    num_tasks: int,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> Balancer:
    """Makes fixed weights, equal ones unless some are given."""
    weights = [1.0] * num_tasks if weights is None else weights
    return FixedWeights(parameters, num_tasks=num_tasks, weights=weights, **options)


METHODS: dict[str, Method] = {
    "excessmtl": Method("ExcessMTL", "#009E73", ExcessMTL, spans_ranks=True),
    "excessmtl-official": Method(
        "ExcessMTL, official", "#56B4E9", _preset("official"), spans_ranks=True
    ),
    "excessmtl-recommended": Method(
        "ExcessMTL, recommended", "#0072B2", _preset("recommended"), tuned=False, spans_ranks=True
    ),
    "uniform": Method("Uniform", "#7F7F7F", Uniform, has_step_size=False),
    "groupdro": Method("GroupDRO", "#D55E00", GroupDRO),
    "gradnorm": Method("GradNorm", "#E69F00", GradNorm),
    "mgda": Method("MGDA", "#CC79A7", MGDA, has_step_size=False),
    "imtl": Method("IMTL", "#B8A900", IMTL, has_step_size=False),
    "moml": Method("MOML", "#8C564B", MOML, has_step_size=False),
    "single-task": Method(
        "Single task", "#000000", SingleTask, has_step_size=False, requires_task=True
    ),
    "fixed": _peer("Fixed weights", "#332288", _fixed),
    "uncertainty": _peer("Uncertainty", "#88CCEE", UncertaintyWeights),
    "dwa": _peer("DWA", "#44AA99", DynamicWeightAverage),
    "famo": _peer("FAMO", "#882255", FAMO),
    "stch": _peer("STCH", "#AA4499", SmoothTchebycheff),
    "dbmtl": _peer("DB-MTL", "#117733", DualBalancing),
    "inverse-norm": _peer("1 / norm", "#999933", InverseNorm),
}


def check_spans_ranks(method: str) -> None:
    """Raises ValueError unless ``method`` can balance what several processes have."""
    able = [name for name, each in METHODS.items() if each.spans_ranks]
    if method not in able:
        raise ValueError(
            f"Expected `method` to be one of {', '.join(able)} in a distributed run, but got {method!r}: the others "
            "would each balance one process's part of the batch. Run it in one process."
        )


def make_balancer(
    method: str,
    shared_parameters: Iterable[Tensor],
    *,
    num_tasks: int,
    robust_step_size: float | None = None,
    task: str | None = None,
    task_names: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Balancer:
    """Makes the balancer called ``method``.

    Args:
        method: A key of `METHODS`.
        shared_parameters: What all tasks share, usually ``model.encoder.parameters()``.
        num_tasks: T.
        robust_step_size: Step size of the weights; None for the method's own.
        task: With ``"single-task"``, the name of the task to train.
        task_names: The names ``task`` is looked up in.
        options: Further keyword options of the balancer.

    Raises:
        ValueError: ``method`` is unknown, or is given a step size, a task or an option that it does not have, or lacks
            its task.
    """
    if method not in METHODS:
        raise ValueError(
            f"Expected `method` to be one of {', '.join(METHODS)}, but got {method!r}."
        )
    chosen = METHODS[method]
    given: dict[str, Any] = {"num_tasks": num_tasks, **CONVENTION, **(options or {})}
    if robust_step_size is not None:
        if not chosen.has_step_size:
            raise ValueError(
                f"Expected no `robust_step_size` with method {method!r}, which has none, "
                f"but got {robust_step_size}."
            )
        given["robust_step_size"] = robust_step_size
    if chosen.requires_task:
        if task is None or task not in task_names:
            raise ValueError(
                f"Expected `task` to be one of {', '.join(task_names)} with method {method!r}, but got {task!r}."
            )
        given["task"] = list(task_names).index(task)
    elif task is not None:
        raise ValueError(
            f"Expected no `task` with method {method!r}, which trains all tasks, but got {task!r}."
        )
    try:
        return chosen.build(shared_parameters, **given)
    except TypeError as error:
        raise ValueError(
            f"Expected `method_options` that {method!r} has, but got: {error}"
        ) from error
