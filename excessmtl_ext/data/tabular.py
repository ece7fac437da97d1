"""Data sets whose samples are rows: splits by groups, standardised columns, and noise on the flagged tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from excessmtl_ext.data.label_noise import (
    CLASS_NOISE,
    VALUE_NOISE,
    CorruptedLabels,
    corrupt_classes,
    corrupt_values,
    noise_share,
)
from excessmtl_ext.data.multitask_data import MultiTaskData, Task, TensorSplit
from excessmtl_ext.data.seeding import seeded_generator

TEST_SHARE = 0.2
VALIDATION_SHARE = 0.1
# The test rows do not depend on the seed of a run.
TEST_SPLIT_SEED = 0

# Standardised inputs are cut here: a typing error of the data must not rule the first layer.
INPUT_LIMIT = 5.0


@dataclass(frozen=True)
class Table:
    """Rows before they are split.

    Attributes:
        name: Names the random streams.
        inputs: Floating point [N, D].
        tasks: T tasks, classification or regression.
        targets: T tensors [N]: int64 class indices, or floating point values.
        groups: Rows with the same number stay in one part, int64 [N]; None where each row is its own.
        noise_kinds: Kind of task -> kind of noise where none is asked for.
    """

    name: str
    inputs: Tensor
    tasks: tuple[Task, ...]
    targets: tuple[Tensor, ...]
    groups: Tensor | None = None
    noise_kinds: Mapping[str, str] | None = None


def split_rows(
    num_rows: int, name: str, seed: int, groups: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the numbers of training, validation and test rows, int64, in random order.

    A fifth of the groups tests, the same for every seed; of the others a tenth of all validates.

    Args:
        num_rows: N.
        name: Names the random streams.
        seed: Decides the validation rows and the order of the training rows.
        groups: Rows with the same number stay together; None where each row is its own.
    """
    if groups is None:
        own, num_groups = torch.arange(num_rows), num_rows
    else:
        _, own = groups.unique(return_inverse=True)
        num_groups = int(own.max()) + 1
    order = torch.randperm(num_groups, generator=seeded_generator(TEST_SPLIT_SEED, "split", name))
    num_test, num_validation = (
        round(share * num_groups) for share in (TEST_SHARE, VALIDATION_SHARE)
    )
    rest = order[num_test:]
    generator = seeded_generator(seed, "split", name, "validation")
    rest = rest[torch.randperm(len(rest), generator=generator)]
    # A group's place in this order: test, validation, training.
    place = torch.empty(num_groups, dtype=torch.int64)
    place[torch.cat([order[:num_test], rest])] = torch.arange(num_groups)
    rows = place[own].argsort(stable=True)
    places = place[own][rows]
    return (
        rows[places >= num_test + num_validation],
        rows[(places >= num_test) & (places < num_test + num_validation)],
        rows[places < num_test],
    )


def make_tabular_data(
    table: Table,
    *,
    noise: float,
    noise_kind: str | None = None,
    seed: int = 0,
    num_train: int | None = None,
    standardise_inputs: bool = True,
) -> MultiTaskData:
    """Splits rows, standardises inputs and regression targets, and corrupts the labels of the noisy tasks.

    Means and deviations are those of the clean training rows. The validation labels as a user would have them carry
    the same share and kind of noise as the training labels.

    Args:
        table: The rows.
        noise: Share of the noisy tasks' training labels to corrupt.
        noise_kind: How; None for the table's own kinds.
        seed: Decides the validation rows and the noise.
        num_train: Number of training rows; all when None.
        standardise_inputs: False leaves the inputs as they are.

    Raises:
        ValueError: ``noise_kind`` fits no noisy task, ``noise`` is outside [0, 1], or ``num_train`` out of range.
    """
    kinds = _noise_kinds(table, noise_kind)
    train, validation, test = split_rows(len(table.inputs), table.name, seed, table.groups)
    num_train = len(train) if num_train is None else num_train
    if not 1 <= num_train <= len(train):
        raise ValueError(f"Expected `num_train` in [1, {len(train)}], but got {num_train}.")
    train = train[:num_train]

    scale = _Scale.of(table.inputs[train]) if standardise_inputs else None

    def inputs_of(rows: Tensor) -> Tensor:
        # Not of the whole table at once: it may be mapped from a file.
        part = table.inputs[rows]
        return part.float() if scale is None else scale(part).clamp(-INPUT_LIMIT, INPUT_LIMIT)

    targets = [
        _Scale.of(target[train])(target) if task.kind == "regression" else target
        for task, target in zip(table.tasks, table.targets, strict=True)
    ]

    def corrupted(rows: Tensor, inputs: Tensor, part: str) -> dict[str, CorruptedLabels]:
        return {
            task.name: _corrupt(
                target[rows],
                task,
                inputs,
                fraction=noise,
                kind=kinds[task.kind],
                seed=seed,
                stream=f"{table.name}/{task.name}{part}",
            )
            for task, target in zip(table.tasks, targets, strict=True)
            if task.is_noisy
        }

    def split(rows: Tensor, inputs: Tensor, noisy: Mapping[str, CorruptedLabels]) -> TensorSplit:
        return TensorSplit(
            inputs,
            tuple(
                noisy[task.name].labels if task.name in noisy else target[rows]
                for task, target in zip(table.tasks, targets, strict=True)
            ),
        )

    own, held_out = inputs_of(train), inputs_of(validation)
    noisy = corrupted(train, own, "")
    return MultiTaskData(
        tasks=table.tasks,
        train=split(train, own, noisy),
        validation=split(validation, held_out, {}),
        test=split(test, inputs_of(test), {}),
        clean_train=split(train, own, {}),
        corrupted={name: labels.corrupted for name, labels in noisy.items()},
        observed_validation=split(validation, held_out, corrupted(validation, held_out, "/val")),
        noise_shares={
            task.name: noise_share(noisy[task.name].labels, target[train])
            for task, target in zip(table.tasks, targets, strict=True)
            if task.is_noisy
        },
    )


@dataclass(frozen=True)
class _Scale:
    """Mean and deviation of columns."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, values: Tensor) -> _Scale:
        """Takes them from these rows; a column that never changes has deviation 1."""
        wide = values.double()
        std = wide.std(0, correction=0)
        return cls(wide.mean(0), torch.where(std > 0, std, torch.ones_like(std)))

    def __call__(self, values: Tensor) -> Tensor:
        """Returns standardised values, float32."""
        return ((values.double() - self.mean) / self.std).float()


def _noise_kinds(table: Table, noise_kind: str | None) -> dict[str, str]:
    """Returns the kind of noise for each kind of task."""
    kinds = {"classification": "symmetric", "regression": "gaussian", **(table.noise_kinds or {})}
    if noise_kind is None:
        return kinds
    known = {"classification": CLASS_NOISE, "regression": VALUE_NOISE}
    noisy: Sequence[str] = sorted({task.kind for task in table.tasks if task.is_noisy})
    fitting = [kind for kind in noisy if noise_kind in known[kind]]
    if not fitting:
        allowed = [each for kind in noisy for each in known[kind]]
        raise ValueError(
            f"Expected `noise_kind` to be one of {', '.join(allowed)} for {table.name}, whose noisy tasks are "
            f"{' and '.join(noisy)}, but got {noise_kind!r}."
        )
    return {**kinds, **dict.fromkeys(fitting, noise_kind)}


def _corrupt(
    labels: Tensor, task: Task, inputs: Tensor, *, kind: str, **options: Any
) -> CorruptedLabels:
    if task.kind == "regression":
        return corrupt_values(labels, kind=kind, **options)  # type: ignore[arg-type]
    return corrupt_classes(
        labels,
        num_classes=task.num_outputs,
        kind=kind,  # type: ignore[arg-type]
        inputs=inputs,
        **options,
    )
