"""The options of ExcessMTL: their checks, which of them go together, and the engine they ask for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from excessmtl_ext.arguments import (
    check_choice,
    check_count,
    check_positive,
    checked_numbers,
    checked_parameters,
    trainable,
)
from excessmtl_ext.engines.cheaper import (
    SubsetEngine,
    checked_subset,
)
from excessmtl_ext.engines.exact import ExactEngine
from excessmtl_ext.engines.from_features import FeatureEngine
from excessmtl_ext.engines.rotation import RotationEngine, TaskRotation
from excessmtl_ext.passes.adapters import ADAPTERS
from excessmtl_ext.state import SMALLEST_EPS
from excessmtl_ext.step import Engine

if TYPE_CHECKING:
    from excessmtl_ext.distributed import DataParallel

Preset = Literal["paper", "official", "recommended"]

EstimateFrom: TypeAlias = Literal["parameters", "features"] | Iterable[Tensor]
"""Source of the risk estimates; see :class:`excessmtl_ext.ExcessMTL`."""

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "robust_step_size": 0.01,
        "combine": "sum",
        "fisher": "linear",
        "eps": 1e-7,
        "weight_scale": "simplex",
        "head_weighting": "none",
        "gradient_momentum": 0.0,
        "relative": True,
    },
    "official": {
        "robust_step_size": 0.01,
        "combine": "sum",
        "fisher": "sqrt",
        "eps": 1e-7,
        "num_warmup_steps": 1,
        "weight_scale": "num_tasks",
        "head_weighting": "task_weights",
        "gradient_momentum": 0.0,
        "relative": True,
    },
    "recommended": {
        "robust_step_size": None,
        "max_log_ratio": 0.2,
        "combine": None,
        "fisher": "linear",
        "eps": SMALLEST_EPS,
        "num_warmup_steps": 1,
        "weight_scale": "simplex",
        "head_weighting": "none",
        "gradient_momentum": 0.98,
        "relative": True,
    },
}
"""Named sets of options; see :meth:`excessmtl_ext.ExcessMTL.from_preset`."""


def check_options(given: Mapping[str, Any]) -> None:
    """Checks each of ExcessMTL's own options by itself.

    Args:
        given: The arguments of the constructor, by name.

    Raises:
        ValueError: an option is out of range.
        TypeError: an option has the wrong type.
    """
    check_choice("fisher", given["fisher"], ("sqrt", "linear"))
    if given["combine"] is not None:
        check_choice("combine", given["combine"], ("per_tensor", "sum"))
    check_positive("eps", given["eps"])
    if given["eps"] < SMALLEST_EPS:
        raise ValueError(
            f"Expected `eps` >= {SMALLEST_EPS} (the smallest normal float32), but got {given['eps']}."
        )
    check_count("num_warmup_steps", given["num_warmup_steps"], 0)
    if not 0.0 <= given["gradient_momentum"] < 1.0:
        raise ValueError(
            f"Expected `gradient_momentum` in [0, 1), but got {given['gradient_momentum']}."
        )
    if not isinstance(given["relative"], bool):
        raise TypeError(
            f"Expected `relative` to be True or False, but got {type(given['relative']).__name__}."
        )
    check_count("update_every", given["update_every"], 1)
    num_tasks = given["num_tasks"]
    check_count("num_tasks", num_tasks, 1)
    _check_moves(given)
    _check_floors(given["min_weight"], num_tasks)
    _check_priorities(given["priorities"], num_tasks)
    if given["state_dtype"] not in (None, torch.bfloat16):
        raise ValueError(
            f"Expected `state_dtype` to be None (float32, or float64 for float64 gradients) or torch.bfloat16, but "
            f"got {given['state_dtype']}."
        )
    check_count("rounding_seed", given["rounding_seed"], 0)
    tasks_per_step = given["tasks_per_step"]
    if tasks_per_step is not None:
        check_count("tasks_per_step", tasks_per_step, 1)
        if tasks_per_step > num_tasks:
            raise ValueError(
                f"Expected `tasks_per_step` <= num_tasks = {num_tasks}, but got {tasks_per_step}."
            )
    feature_dim = given["feature_dim"]
    if isinstance(feature_dim, bool) or not isinstance(feature_dim, int):
        raise TypeError(
            f"Expected `feature_dim` to be an integer, but got {type(feature_dim).__name__}."
        )
    check_choice("feature_adapter", given["feature_adapter"], ADAPTERS)
    check_choice("reduce", given["reduce"], ("grads", "risks"))
    if isinstance(given["estimate_from"], str):
        check_choice("estimate_from", given["estimate_from"], ("parameters", "features"))


def _check_moves(given: Mapping[str, Any]) -> None:
    """Checks the step size, or what bounded moves need where there is none."""
    ratio = given["max_log_ratio"]
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise TypeError(f"Expected `max_log_ratio` to be a number, but got {type(ratio).__name__}.")
    if not 0.0 <= ratio < math.inf:
        raise ValueError(f"Expected `max_log_ratio` >= 0 and finite, but got {ratio}.")
    if given["robust_step_size"] is not None:
        check_positive("robust_step_size", given["robust_step_size"])
        return
    for name, is_met, needed in (
        ("fisher", given["fisher"] == "linear", "'linear'"),
        ("gradient_momentum", given["gradient_momentum"] > 0.0, "above 0"),
        ("relative", given["relative"], "True"),
    ):
        if not is_met:
            raise ValueError(
                f"Expected `{name}` {needed} with robust_step_size=None, but got {given[name]!r}. Give a "
                "`robust_step_size`, such as 0.01, for the steps of Eq. 9, or leave this option out."
            )


def _check_floors(min_weight: Any, num_tasks: int) -> None:
    if isinstance(min_weight, int | float):
        if not 0.0 <= min_weight <= 1.0 / num_tasks:
            raise ValueError(
                f"Expected `min_weight` between 0 and 1 / num_tasks = {1.0 / num_tasks:g}, but got {min_weight}."
            )
        return
    floors = checked_numbers("min_weight", min_weight, num_tasks)
    if not all(floor >= 0.0 for floor in floors) or not sum(floors) <= 1.0:
        raise ValueError(
            f"Expected `min_weight` of numbers >= 0 that sum to 1 at most, but got {floors} with sum {sum(floors):g}."
        )


def _check_priorities(priorities: Any, num_tasks: int) -> None:
    if priorities is None:
        return
    shares = checked_numbers("priorities", priorities, num_tasks)
    if not all(0.0 < share < math.inf for share in shares):
        raise ValueError(f"Expected `priorities` > 0 and finite, but got {shares}.")


def candidates_in(module: nn.Module, given: dict[str, Any]) -> list[Tensor]:
    """Returns the parameters of a model that may turn out shared; fills in what the model says of ``given``.

    With several ranks it is the whole model, unless another one is given.
    """
    for name in ("self", "__class__", "shared_parameters"):
        given.pop(name, None)
    if not isinstance(given["estimate_from"], str):
        given["estimate_from"] = list(given["estimate_from"])
    candidates = trainable(
        checked_parameters(module.parameters(), "model.parameters()"), "model.parameters()"
    )
    has_ranks = given["process_group"] is not None or is_sharded(candidates)
    if given["model"] is None and (has_ranks or isinstance(module, DistributedDataParallel)):
        given["model"] = module
    return candidates


def choose_engine(given: Mapping[str, Any], shared: Sequence[Tensor] | None) -> Engine:
    """Returns the engine that the options ask for; the one place that knows which options exclude each other.

    Args:
        given: The arguments of the constructor, by name, each checked by itself.
        shared: The shared parameters, or None.

    Raises:
        ValueError: two options exclude each other, or one needs another.
        NotImplementedError: an option does not work with several ranks.
    """
    estimate_from: EstimateFrom = given["estimate_from"]
    tasks_per_step: int | None = given["tasks_per_step"]
    rotates = tasks_per_step is not None and tasks_per_step < given["num_tasks"]
    has_ranks = (
        given["process_group"] is not None or given["model"] is not None or is_sharded(shared)
    )
    data_parallel = (
        _data_parallel(given, shared) if has_ranks and estimate_from != "features" else None
    )
    subset = None if isinstance(estimate_from, str) else checked_subset(estimate_from, shared)
    if estimate_from == "parameters" and not rotates:
        return data_parallel or ExactEngine(given["batched"])
    if shared is None and estimate_from != "features":
        raise ValueError(
            "Expected `shared_parameters` with `estimate_from` or `tasks_per_step`: they decide which backward passes "
            "run. Without them, give update_weights() the gradients that you want risks estimated from."
        )
    if given["combine"] == "per_tensor":
        raise ValueError(
            "Expected no combine='per_tensor' with `estimate_from` or `tasks_per_step`: they apply the weights in one "
            "pass, which takes one factor per task. combine=None brings each task's gradient to size by one number."
        )
    if rotates and estimate_from == "features":
        raise ValueError(
            "Expected no `tasks_per_step` with estimate_from='features': one pass gives the features' gradients of all "
            "tasks already."
        )
    if has_ranks and estimate_from != "features":
        raise NotImplementedError(
            "Expected no `process_group` with `estimate_from` or `tasks_per_step`: several ranks exchange the whole "
            "gradient of every task. Use update_every, which works with ranks."
        )
    if given["batched"] is not False:
        raise ValueError(
            f"Expected batched=False with `estimate_from` or `tasks_per_step`, but got {given['batched']!r}: their "
            "steps have no encoder passes of several tasks that could be one."
        )
    if rotates:
        rotation = TaskRotation(given["num_tasks"], cast(int, tasks_per_step))
        return RotationEngine(rotation, subset)
    if subset is not None:
        return SubsetEngine(subset)
    return FeatureEngine(given["process_group"], has_ranks=has_ranks)


def _data_parallel(given: Mapping[str, Any], shared: Sequence[Tensor] | None) -> DataParallel:
    if given["state_dtype"] is not None:
        raise ValueError(
            "Expected `state_dtype` to be None with several ranks, each of which keeps its part of the state "
            f"in float32, but got {given['state_dtype']}. Leave one of the two out."
        )
    from excessmtl_ext.distributed import DataParallel

    return DataParallel(
        shared,
        num_tasks=given["num_tasks"],
        process_group=given["process_group"],
        reduce=given["reduce"],
        model=given["model"],
        batched=given["batched"],
    )


def is_sharded(parameters: Sequence[Tensor] | None) -> bool:
    """Returns whether ``fully_shard`` has cut the parameters; asked without importing torch.distributed."""
    return any(hasattr(parameter, "device_mesh") for parameter in parameters or ())


def preset_options(preset: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a named set, overridden by ``options``.

    Raises:
        ValueError: the preset is unknown, or ``"paper"`` is given no ``num_warmup_steps``.
    """
    check_choice("preset", preset, tuple(PRESETS))
    if preset == "paper" and "num_warmup_steps" not in options:
        raise ValueError(
            "Expected `num_warmup_steps` with preset='paper': its baseline is the mean over 3 epochs, so pass "
            "3 * len(loader)."
        )
    return {**PRESETS[preset], **options}


__all__ = [
    "PRESETS",
    "EstimateFrom",
    "Preset",
    "candidates_in",
    "check_options",
    "checked_parameters",
    "choose_engine",
    "is_sharded",
    "preset_options",
]
