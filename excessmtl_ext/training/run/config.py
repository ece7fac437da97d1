"""Everything that decides the numbers of a training run."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

# A resumed run may read its data from elsewhere or go on for longer; anything else would make it another run.
FREE_ON_RESUME = frozenset({"data_root", "epochs", "num_workers"})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The values of one run, written to config.json in full.

    Attributes:
        dataset: A key of `excessmtl_ext.training.run.workloads.WORKLOADS`.
        method: A key of `excessmtl_ext.training.run.methods.METHODS`.
        epochs: Passes over the training data.
        batch_size: Samples per step, of all processes together; the last batch of an epoch may be smaller.
        lr: Learning rate of Adam, constant.
        weight_decay: Of Adam, added to the gradient.
        noise: Share of the noisy task's training labels that is corrupted.
        seed: Decides initial parameters, splits, pairing, noise and batch order, each by a stream of its own.
        robust_step_size: Step size of the weights; None for the method's own.
        method_options: Further options of the balancer, by name; they override those of the method.
        num_train: Training samples; None for all.
        data_root: Folder of the data; None where the data set needs none.
        device: Where the run computes, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        task_weight_interval: Steps between two rows of task_weights.csv.
        task: With method ``"single-task"``, the task that is trained; None otherwise.
        num_workers: Processes that read the training data; 0 for none. Does not change the numbers.
        disjoint: SARCOS: drop the training rows that the test file repeats.
        pretrained: Office-Home: start from ImageNet weights.
        image_size: Height of the images, for runs on small machines; the width follows (NYUv2: 4 / 3 of it, both
            multiples of 16; Office-Home: square). None: 288 for NYUv2, 224 for Office-Home.
        network_width: NYUv2: channels of SegNet's first stage; None: 64.
        noise_kind: How the noisy tasks' labels are corrupted, see `corrupt_classes` and `corrupt_values`; None for the
            data set's own kind.
        raters: Human ratings: how many raters' mean is a training label; 0 for all of them.
        distributed: How several processes share the run: ``"ddp"``, ``"fsdp"``, or None for one process.
        num_ranks: How many they are; filled in by the run.
    """

    dataset: str
    method: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.0
    noise: float = 0.0
    seed: int = 0
    robust_step_size: float | None = None
    method_options: dict[str, Any] = field(default_factory=dict)
    num_train: int | None = None
    data_root: str | None = None
    device: str = "cpu"
    task_weight_interval: int = 10
    task: str | None = None
    num_workers: int = 0
    disjoint: bool = False
    pretrained: bool = False
    image_size: int | None = None
    network_width: int | None = None
    noise_kind: str | None = None
    raters: int = 1
    distributed: Literal["ddp", "fsdp"] | None = None
    num_ranks: int | None = None

    def __post_init__(self) -> None:
        """Checks every value by itself; what the data and the method allow is checked when they are there."""
        for name in ("dataset", "method", "device"):
            _check_type(name, getattr(self, name), str, "a string")
        for name, minimum, maximum in _WHOLE_NUMBERS:
            value = getattr(self, name)
            if name in _MAY_BE_NONE and value is None:
                continue
            _check_type(name, value, int, "a whole number")
            if value < minimum:
                raise ValueError(f"Expected `{name}` of at least {minimum}, but got {value}.")
            if value > maximum:
                raise ValueError(f"Expected `{name}` of at most {maximum:,}, but got {value:.6g}.")
        for name, may_be_zero in (
            ("lr", False),
            ("weight_decay", True),
            ("robust_step_size", False),
        ):
            value = getattr(self, name)
            if name in _MAY_BE_NONE and value is None:
                continue
            _check_number(name, value)
            if not (value >= 0 if may_be_zero else value > 0):
                raise ValueError(
                    f"Expected `{name}` {'>=' if may_be_zero else '>'} 0, but got {value}."
                )
            if math.isinf(value):
                raise ValueError(f"Expected `{name}` to be finite, but got {value}.")
        _check_number("noise", self.noise)
        if not 0 <= self.noise <= 1:
            raise ValueError(f"Expected `noise` in [0, 1], but got {self.noise}.")
        if self.distributed not in (None, "ddp", "fsdp"):
            raise ValueError(
                f"Expected `distributed` to be 'ddp', 'fsdp' or None, but got {self.distributed!r}."
            )
        if self.data_root is not None:
            object.__setattr__(self, "data_root", os.fspath(self.data_root))
        try:
            json.dumps(self.method_options, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Expected `method_options` that config.json can hold, numbers that are finite, strings, truth values, "
                f"null and lists of them, but got {self.method_options!r}: {error}."
            ) from error


# Name, least and largest value. The largest are beyond any sensible run: a slip of the keyboard ends in a sentence
# and not in hours of allocating.
_WHOLE_NUMBERS = (
    ("epochs", 1, 10**6),
    ("batch_size", 1, 10**7),
    ("task_weight_interval", 1, 10**9),
    ("num_workers", 0, 256),
    ("seed", -(2**63), 2**63 - 1),  # what torch's generators take
    ("num_train", 1, 10**9),
    ("image_size", 1, 4_096),
    ("network_width", 1, 4_096),
    ("num_ranks", 1, 10**6),
)
_MAY_BE_NONE = frozenset(
    {"num_train", "image_size", "network_width", "num_ranks", "robust_step_size"}
)


def _check_type(name: str, value: object, kind: type, what: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"Expected `{name}` to be {what}, but got {value!r}.")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"Expected `{name}` to be a number, but got {value!r}.")
