"""What the benchmark trains on: every data set with its doses of noise.

A data set of one's own is a Python file with a list ``DATASETS`` of :class:`Dataset`, named on the command line:
``excessmtl benchmark --datasets human-ratings --datasets mine.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch.optim import Adam, Optimizer

from excessmtl_ext.data import MultiTaskData
from excessmtl_ext.models import EncoderHeads
from excessmtl_ext.training.benchmark.own_file import read_list
from excessmtl_ext.training.run.config import TrainConfig
from excessmtl_ext.training.run.workloads import WORKLOADS, find_workload

Dose = Mapping[str, Any]
"""Arguments of the loader that make the noise; plain values, which a results file can hold."""


@dataclass(frozen=True)
class Dataset:
    """A data set, its network, its doses of noise, and how long it is trained.

    Attributes:
        key: On the command line and in the files.
        title: In tables and pictures.
        load: Makes the data from a dose, ``seed`` and ``num_train`` (None for all).
        build_model: Makes the network for that data, randomly initialised from torch's global state.
        doses: Name -> arguments of the loader. The last one is the noisy one that methods are ranked at.
        epochs: Passes over the training data.
        batch_size: Samples per step.
        lr: Learning rate, the same for every method.
        weight_decay: Of Adam, added to the gradient.
        num_train: Training samples; None for all.
        quick: Training samples and epochs of ``--quick``.
        needs_data_root: The data must be on disk; without the folder the data set is left out.
        make_optimizer: Makes the optimizer from the parameters and the keyword arguments ``lr`` and ``weight_decay``.
    """

    key: str
    title: str
    load: Callable[..., MultiTaskData]
    build_model: Callable[[MultiTaskData], EncoderHeads]
    doses: Mapping[str, Dose]
    epochs: int
    batch_size: int
    lr: float = 1e-3
    weight_decay: float = 0.0
    num_train: int | None = None
    quick: tuple[int, int] = (2_000, 3)
    needs_data_root: bool = False
    make_optimizer: Callable[..., Optimizer] = Adam

    def __post_init__(self) -> None:
        """Checks that there is a dose."""
        if not self.doses:
            raise ValueError(f"Expected at least one of `doses` of data set {self.key!r}.")

    @property
    def ranked_dose(self) -> str:
        """The name of the dose that methods are ranked at."""
        return list(self.doses)[-1]


def from_workload(key: str, *, doses: Mapping[str, Dose], **changes: Any) -> Dataset:
    """Makes a data set of the benchmark from a workload of ``excessmtl train``.

    Args:
        key: Of `WORKLOADS`.
        doses: See `Dataset`; fields of `TrainConfig`.
        changes: Fields of `Dataset`.
    """
    workload = WORKLOADS[key]

    def config(**values: Any) -> TrainConfig:
        fields: dict[str, Any] = {
            "dataset": key,
            "method": "uniform",
            "epochs": 1,
            "batch_size": workload.batch_size,
            "lr": workload.lr,
            **values,
        }
        return TrainConfig(**fields)

    def load(**values: Any) -> MultiTaskData:
        return find_workload(key).load(config(**values))

    fields: dict[str, Any] = {
        "epochs": workload.epochs,
        "batch_size": workload.batch_size,
        "lr": workload.lr,
        "weight_decay": workload.weight_decay,
        "needs_data_root": workload.needs_data_root,
        **changes,
    }
    return Dataset(
        key=key,
        title=workload.title,
        load=load,
        build_model=lambda data: workload.build_model(data, config()),
        doses=doses,
        **fields,
    )


def _noise(level: float, **options: Any) -> dict[str, Dose]:
    return {"none": {"noise": 0.0}, f"{level:.0%}": {"noise": level, **options}}


@cache
def builtin_datasets() -> dict[str, Dataset]:
    """Returns the data sets that come with the package, by key."""
    found = (
        from_workload(
            "human-ratings",
            doses={"all raters": {"raters": 0}, "one rater": {"raters": 1}},
            epochs=6,
        ),
        from_workload("diamonds", doses=_noise(0.4), epochs=8, num_train=20_000),
        from_workload("movielens", doses=_noise(0.4), epochs=4, num_train=30_000),
        from_workload("qm9", doses=_noise(0.8), epochs=12, num_train=20_000),
        from_workload("digits", doses=_noise(0.8), epochs=15),
        from_workload("multimnist", doses=_noise(0.8), epochs=6, num_train=20_000),
        from_workload(
            "sarcos",
            doses={name: {**dose, "disjoint": True} for name, dose in _noise(0.8).items()},
            epochs=15,
            weight_decay=0.0,
        ),
    )
    return {dataset.key: dataset for dataset in found}


def find_datasets(names: Sequence[str]) -> dict[str, Dataset]:
    """Returns data sets by key: those named, and those of the files named.

    Args:
        names: Keys of `builtin_datasets`, and paths of Python files with a list ``DATASETS``; none: all that come with
            the package.

    Raises:
        ValueError: a name is neither, or a file gives no data sets; says which.
    """
    known = builtin_datasets()
    if not names:
        return dict(known)
    found: dict[str, Dataset] = {}
    for name in names:
        if name.endswith(".py"):
            found |= {one.key: one for one in read_list(Path(name), "DATASETS", Dataset)}
        elif name in known:
            found[name] = known[name]
        else:
            raise ValueError(
                f"Expected each of `datasets` to be one of {', '.join(known)}, or a Python file, but got {name!r}."
            )
    return found
