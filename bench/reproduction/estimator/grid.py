"""Which estimates the study compares, on which data, in which order."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from excessmtl_ext.data import MultiTaskData, load_multimnist
from excessmtl_ext.data.multitask_data import TensorSplit
from excessmtl_ext.models import mlp
from excessmtl_ext.training.run.config import TrainConfig
from excessmtl_ext.training.run.workloads import WORKLOADS, Workload

NOISES = (0.0, 0.8)
ALL_NOISES = (0.8, 0.0, 0.4, 0.2, 0.6, 1.0)  # in the order of their interest
FULL_SEEDS = 3
BATCH_SIZES = (256, 64, 1024)  # in the order of their interest: half a screen is still a result
MOMENTA = (0.98, 0.0, 0.9, 0.99)
WARMUP_EPOCHS = 3  # He et al. 2024, Appendix C.1

# Epochs of the wide screen, and of the runs at full size; SARCOS converges slowly.
SCREEN = {"multimnist-14px": 12, "sarcos": 15, "digits": 30}
FULL = {"multimnist": 10, "sarcos": 60}
NUM_TRAIN = {"multimnist-14px": 20_000, "multimnist": 20_000, "sarcos": None, "digits": None}

# Five step sizes over two decades, around the size of R: with the linear Fisher R falls like 1 / t, with the root like
# 1 / sqrt(t); a momentum numerator is smaller than the first step's baseline, the warm-up's mean is not.
STEP_SIZES = {
    ("sqrt", "first", False): (0.003, 0.01, 0.03, 0.1, 0.3),
    ("sqrt", "first", True): (0.03, 0.1, 0.3, 1.0, 3.0),
    ("sqrt", "warmup", False): (0.001, 0.003, 0.01, 0.03, 0.1),
    ("sqrt", "warmup", True): (0.003, 0.01, 0.03, 0.1, 0.3),
    ("sqrt", "raw", False): (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    ("sqrt", "raw", True): (1e-3, 3e-3, 1e-2, 3e-2, 0.1),
    ("linear", "first", False): (0.1, 0.3, 1.0, 3.0, 10.0),
    ("linear", "first", True): (0.1, 0.3, 1.0, 3.0, 10.0),
    ("linear", "warmup", False): (0.003, 0.01, 0.03, 0.1, 0.3),
    ("linear", "warmup", True): (0.003, 0.01, 0.03, 0.1, 0.3),
    ("linear", "raw", False): (0.1, 0.3, 1.0, 3.0, 10.0),
    ("linear", "raw", True): (0.1, 0.3, 1.0, 3.0, 10.0),
}


# What the screen leaves for the runs at full size: the three settings that met the goal on SARCOS and came nearest on
# MultiMNIST, and the published ones.
_MOMENTUM_LINEAR = {"fisher": "linear", "gradient_momentum": 0.98}
FULL_SETTINGS: dict[str, tuple[str, float | None, int, dict[str, Any]]] = {
    "uniform": ("uniform", None, 0, {}),
    "relative, 3": ("excessmtl", 3.0, 0, {**_MOMENTUM_LINEAR, "relative": True}),
    "raw, 3": ("excessmtl", 3.0, 0, {**_MOMENTUM_LINEAR, "relative": False}),
    "raw, 10": ("excessmtl", 10.0, 0, {**_MOMENTUM_LINEAR, "relative": False}),
    "official": ("excessmtl-official", None, 0, {}),
    "paper": ("excessmtl", 0.01, WARMUP_EPOCHS, {"fisher": "linear"}),
}

# What the options of a cell are added to: Eq. 9 on plain sums, which is not the default of ExcessMTL.
PUBLISHED: dict[str, Any] = {
    "fisher": "sqrt",
    "eps": 1e-7,
    "gradient_momentum": 0.0,
    "combine": "sum",
}

# What the sweep over all methods chose for the authors' setting, by the validation score at noise 0 and 0.8.
OFFICIAL_STEP_SIZES = {"multimnist": 1.0, "sarcos": 0.001}


@dataclass(frozen=True)
class Cell:
    """One training run of the study.

    Attributes:
        stage: ``"screen"``, ``"candidates"`` or ``"full"``.
        dataset: A workload.
        noise: Share of corrupted labels of the noisy tasks.
        seed: Of everything.
        batch_size: Samples per step.
        method: A key of METHODS, or ``"candidate"``.
        step_size: Of the weights; None for Uniform.
        warmup_epochs: Epochs of the baseline's warm-up; 0: the first step.
        options: Of the balancer.
    """

    stage: str
    dataset: str
    noise: float
    seed: int
    batch_size: int
    method: str
    step_size: float | None = None
    warmup_epochs: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def key(self) -> str:
        """Returns what names this run in results and folders."""
        options = ",".join(f"{name}={value}" for name, value in sorted(self.options.items()))
        step = "-" if self.step_size is None else f"{self.step_size:g}"
        return (
            f"{self.stage}|{self.dataset}|{self.noise:g}|{self.seed}|{self.batch_size}|{self.method}|{step}|"
            f"{self.warmup_epochs}|{options}"
        )

    def epochs(self) -> int:
        """Returns how long it trains: at batch 64 half as long, which is twice the steps of batch 256."""
        epochs = (FULL if self.stage == "full" else SCREEN)[self.dataset]
        return epochs // 2 if self.batch_size == 64 else epochs

    def balancer_options(self) -> dict[str, Any]:
        """Returns all options of the balancer, those included that the whole study shares."""
        return {**PUBLISHED, **self.options} if self.method == "excessmtl" else self.options

    def config(self, data_root: str | None) -> TrainConfig:
        """Returns the training run, without the warm-up, which needs the number of steps."""
        workload = WORKLOADS[self.dataset]
        return TrainConfig(
            dataset=self.dataset,
            method=self.method,
            epochs=self.epochs(),
            batch_size=self.batch_size,
            lr=workload.lr,
            weight_decay=workload.weight_decay,
            noise=self.noise,
            seed=self.seed,
            robust_step_size=self.step_size,
            method_options=json.loads(json.dumps(self.balancer_options())),
            num_train=NUM_TRAIN[self.dataset],
            data_root=data_root,
        )


def uniform_cells(stage: str, dataset: str, noises: tuple[float, ...], seeds: int) -> list[Cell]:
    """Returns the runs that the others are measured against."""
    batch_sizes = BATCH_SIZES if stage == "screen" else BATCH_SIZES[:1]
    return [
        Cell(stage, dataset, noise, seed, batch_size, "uniform")
        for batch_size, noise, seed in itertools.product(batch_sizes, noises, range(seeds))
    ]


def screen_cells(dataset: str) -> Iterator[Cell]:
    """Yields every combination of the named choices, one seed, the most telling batch size first."""
    yield from uniform_cells("screen", dataset, NOISES, seeds=3)
    for batch_size in BATCH_SIZES:
        for momentum, fisher, baseline in itertools.product(
            MOMENTA, ("linear", "sqrt"), ("first", "warmup", "raw")
        ):
            for step_size, noise in itertools.product(
                STEP_SIZES[fisher, baseline, momentum > 0], NOISES
            ):
                yield Cell(
                    "screen",
                    dataset,
                    noise,
                    0,
                    batch_size,
                    "excessmtl",
                    step_size,
                    WARMUP_EPOCHS if baseline == "warmup" else 0,
                    {
                        "fisher": fisher,
                        "gradient_momentum": momentum,
                        "relative": baseline != "raw",
                    },
                )


def full_cells(dataset: str) -> Iterator[Cell]:
    """Yields the settings that are left, at full size, all noise levels, three seeds; whole seeds first."""
    for seed, noise in itertools.product(range(FULL_SEEDS), ALL_NOISES):
        for method, step_size, warmup_epochs, options in FULL_SETTINGS.values():
            if method == "excessmtl-official":
                step_size = OFFICIAL_STEP_SIZES[dataset]
            yield Cell("full", dataset, noise, seed, 256, method, step_size, warmup_epochs, options)


def candidate_cells(dataset: str) -> Iterator[Cell]:
    """Yields the estimates that the package does not have, batch 256, two seeds."""
    variants: list[tuple[dict[str, Any], tuple[float, ...]]] = [
        ({"numerator": "momentum"}, (1.0, 3.0, 10.0)),
        ({"numerator": "momentum", "decay": True}, (3.0, 10.0, 30.0, 100.0)),
        ({"numerator": "momentum", "forgetting": 0.99}, (0.1, 0.3, 1.0, 3.0)),
        ({"numerator": "momentum", "forgetting": 0.99, "decay": True}, (1.0, 3.0, 10.0, 30.0)),
        ({"numerator": "debiased"}, (1.0, 3.0, 10.0, 30.0)),
        ({"numerator": "debiased", "momentum": 0.9}, (1.0, 3.0, 10.0, 30.0)),
        ({"numerator": "debiased", "forgetting": 0.99, "decay": True}, (1.0, 3.0, 10.0, 30.0)),
        ({"numerator": "consecutive"}, (1.0, 3.0, 10.0, 30.0)),
        ({"numerator": "consecutive", "fisher": "sqrt", "relative": True}, (0.03, 0.1, 0.3, 1.0)),
    ]
    for seed, (options, step_sizes) in itertools.product(range(2), variants):
        for step_size, noise in itertools.product(step_sizes, NOISES):
            yield Cell("candidates", dataset, noise, seed, 256, "candidate", step_size, 0, options)


def _halved(split: TensorSplit) -> TensorSplit:
    small = split.inputs.float()
    small = small.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)).round().to(split.inputs.dtype)
    return TensorSplit(small, split.targets, split.input_mean, split.input_std)


def _load_small_multimnist(config: TrainConfig) -> MultiTaskData:
    assert config.data_root is not None
    data = load_multimnist(
        config.data_root, noise=config.noise, seed=config.seed, num_train=config.num_train
    )
    splits = (data.train, data.validation, data.test, data.clean_train)
    train, validation, test, clean_train = [_halved(split) for split in splits]  # type: ignore[arg-type]
    return MultiTaskData(data.tasks, train, validation, test, clean_train, data.corrupted)


WORKLOADS["multimnist-14px"] = Workload(
    title="MultiMNIST at 14 x 14 pixels",
    load=_load_small_multimnist,
    build_model=lambda data, config: mlp(
        (1, 14, 14), [task.num_outputs for task in data.tasks], hidden=(128, 80)
    ),
    needs_data_root=True,
    epochs=12,
    batch_size=256,
    # Three times the full size's: 12 epochs then reach the part of training in which gradient variance dominates.
    lr=3e-3,
)
