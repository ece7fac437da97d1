"""What the benchmark compares: every method with the settings it may be tuned over.

A method of one's own is a Python file with a list ``METHODS`` of :class:`Method`, named on the command line:
``excessmtl benchmark --methods uniform --methods mine.py``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
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
from excessmtl_ext.data.seeding import seeded_generator
from excessmtl_ext.training.benchmark.own_file import read_list
from excessmtl_ext.training.benchmark.peers import GramianWeights, UPGrad
from excessmtl_ext.training.run.methods import CONVENTION

Setting = Mapping[str, Any]
"""Options of a method by name; plain values, which a results file can hold."""

BUDGET = 5
"""Settings that a method is tuned over at most: the same for all."""

PAPER_WARMUP_EPOCHS = 3

STEP_SIZES: tuple[Setting, ...] = tuple(
    {"robust_step_size": value} for value in (1e-3, 1e-2, 1e-1, 1.0)
)


@dataclass(frozen=True)
class Method:
    """One way to weight tasks.

    Attributes:
        key: On the command line and in the files.
        label: In tables and pictures.
        build: Makes the balancer from the shared parameters, ``num_tasks`` and the options of a setting. Beyond the
            contract of `Balancer`, it may have ``after_step(losses)``, called after each optimizer step with the losses
            [T] of the same batch, and ``end_epoch(mean_losses)``.
        settings: What it is tuned over, at most `BUDGET`; the first stands where nothing is tuned.
        is_single_task: One run per task, each with the option ``task``, its number.
        is_ours: Drawn and printed in bold.
        takes_steps_per_epoch: ``build`` also gets the number of steps of an epoch, ``steps_per_epoch``.
        packages: What must be importable.
    """

    key: str
    label: str
    build: Callable[..., Balancer]
    settings: Sequence[Setting] = ({},)
    is_single_task: bool = False
    is_ours: bool = False
    takes_steps_per_epoch: bool = False
    packages: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        """Checks the number of settings."""
        if not 1 <= len(self.settings) <= BUDGET:
            raise ValueError(
                f"Expected from 1 to {BUDGET} `settings` of method {self.key!r}, the budget of every method, but got "
                f"{len(self.settings)}."
            )

    def make(
        self, shared: Iterable[Tensor], num_tasks: int, setting: Setting, steps_per_epoch: int
    ) -> Balancer:
        """Makes the balancer with a setting, under the convention of all methods: heads are not weighted."""
        options = {**CONVENTION, **setting, "num_tasks": num_tasks}
        if self.takes_steps_per_epoch:
            options["steps_per_epoch"] = steps_per_epoch
        return self.build(list(shared), **options)

    def missing(self) -> str | None:
        """Returns why the method cannot run here, or None."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None


def _preset(name: Any, **fixed: Any) -> Callable[..., Balancer]:
    return lambda shared, **options: ExcessMTL.from_preset(name, shared, **fixed, **options)


def _paper(shared: list[Tensor], *, steps_per_epoch: int, **options: Any) -> Balancer:
    """Makes the paper's settings: the baseline is the mean over three epochs."""
    warmup = PAPER_WARMUP_EPOCHS * steps_per_epoch
    return ExcessMTL.from_preset("paper", shared, num_warmup_steps=warmup, **options)


def _fixed(shared: list[Tensor], *, num_tasks: int, draw: int, **convention: Any) -> Balancer:
    """Makes fixed weights: uniform for draw 0, else from a flat Dirichlet distribution, the same in every run."""
    generator = seeded_generator(draw, "benchmark", "fixed_weights", num_tasks)
    exponential = -torch.rand(num_tasks, generator=generator, dtype=torch.float64).log()
    weights = torch.ones(num_tasks) if draw == 0 else exponential + 1e-3
    return FixedWeights(shared, num_tasks=num_tasks, weights=weights.tolist(), **convention)


def _torchjd(name: str, **fixed: Any) -> Callable[..., Balancer]:
    def build(shared: list[Tensor], *, num_tasks: int, **options: Any) -> Balancer:
        import torchjd.aggregation

        own = {key: options.pop(key) for key in list(options) if key not in CONVENTION}
        make = getattr(torchjd.aggregation, name)
        return GramianWeights(
            shared, num_tasks=num_tasks, make=lambda: make(**fixed, **own), **options
        )

    return build


def _grid(name: str, *values: float) -> tuple[Setting, ...]:
    return tuple({name: value} for value in values)


_ALL = (
    Method("uniform", "Uniform", Uniform),
    Method("fixed", "Fixed weights, best of 5", _fixed, _grid("draw", 0, 1, 2, 3, 4)),
    Method("single-task", "Each task alone", SingleTask, is_single_task=True),
    Method("groupdro", "GroupDRO", GroupDRO, STEP_SIZES),
    Method("gradnorm", "GradNorm", GradNorm, STEP_SIZES),
    Method("mgda", "MGDA", MGDA),
    Method("imtl", "IMTL-G", IMTL, ({"variant": "G"},), packages=("torchjd",)),
    Method("moml", "MOML", MOML),
    Method(
        "uncertainty",
        "Uncertainty",
        UncertaintyWeights,
        _grid("learning_rate", 1e-3, 1e-2, 1e-1),
    ),
    Method("dwa", "DWA", DynamicWeightAverage, _grid("temperature", 2.0, 0.5)),
    Method("famo", "FAMO", FAMO, _grid("decay", 1e-2, 1e-3)),
    Method("stch", "STCH", SmoothTchebycheff, _grid("smoothness", 0.5, 0.1, 2.0)),
    Method("dbmtl", "DB-MTL", DualBalancing, _grid("beta", 0.9, 0.1)),
    Method(
        "fairgrad",
        "FairGrad",
        _torchjd("FairGradWeighting"),
        _grid("alpha", 1.0, 2.0),
        packages=("torchjd", "scipy"),
    ),
    Method("aligned", "Aligned-MTL", _torchjd("AlignedMTLWeighting"), packages=("torchjd",)),
    Method("upgrad", "UPGrad", UPGrad, packages=("scipy",)),
    Method("inverse-norm", "1 / norm", InverseNorm),
    Method(
        "excessmtl-official", "ExcessMTL, official", _preset("official"), STEP_SIZES, is_ours=True
    ),
    Method(
        "excessmtl-paper",
        "ExcessMTL, paper",
        _paper,
        STEP_SIZES,
        is_ours=True,
        takes_steps_per_epoch=True,
    ),
    Method("excessmtl-recommended", "ExcessMTL, default", _preset("recommended"), is_ours=True),
    Method(
        "excessmtl-features",
        "ExcessMTL, default, from features",
        _preset("recommended", estimate_from="features"),
        is_ours=True,
    ),
)
METHODS: dict[str, Method] = {method.key: method for method in _ALL}


def find_methods(names: Sequence[str]) -> dict[str, Method]:
    """Returns methods by key: those named, and those of the files named.

    Args:
        names: Keys of `METHODS`, and paths of Python files with a list ``METHODS``; none: all of `METHODS`.

    Raises:
        ValueError: a name is neither, or a file gives no methods; says which.
    """
    if not names:
        return dict(METHODS)
    found: dict[str, Method] = {}
    for name in names:
        if name.endswith(".py"):
            found |= {method.key: method for method in read_list(Path(name), "METHODS", Method)}
        elif name in METHODS:
            found[name] = METHODS[name]
        else:
            raise ValueError(
                f"Expected each of `methods` to be one of {', '.join(METHODS)}, or a Python file, but got {name!r}."
            )
    return found
