"""What every data set hands to the training loop: tasks, and splits that make batches by index."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

TaskKind = Literal["classification", "regression", "segmentation", "depth", "normals"]

# Columns of task_weights.csv and metrics.csv that are not a task's.
_RESERVED_NAMES = ("step", "mean")

# What labels of pixels say where there is no label.
IGNORED_CLASS = -1


@dataclass(frozen=True)
class Task:
    """One task of a data set. Its kind decides its loss, its metrics, and what its targets look like.

    ================  ===========================  =======================================================
    kind              output of the head           target
    ================  ===========================  =======================================================
    classification    [B, C]                       int64 [B]
    regression        [B, 1]                       float32 [B], standardised
    segmentation      [B, C, H, W]                 int64 [B, H, W]; `IGNORED_CLASS` (-1) where there is none
    depth             [B, 1, H, W]                 float32 [B, 1, H, W], metres; 0 where there is none
    normals           [B, 3, H, W]                 float32 [B, 3, H, W], of length 1; 0 where there is none
    ================  ===========================  =======================================================

    Attributes:
        name: Names its columns in metrics.csv and its lines in figures. Printable, not ``"step"`` or ``"mean"``.
        num_outputs: Channels of its head: C, the number of classes, or 1, or 3.
        kind: What is predicted.
        is_noisy: Its training labels are the ones that noise is added to.
    """

    name: str
    num_outputs: int
    kind: TaskKind = "classification"
    is_noisy: bool = False

    def __post_init__(self) -> None:
        """Checks that the name can name columns of a table, beside those that every table has."""
        if not self.name or not self.name.isprintable() or self.name in _RESERVED_NAMES:
            raise ValueError(
                f"Expected `name` of printable characters, and none of {', '.join(_RESERVED_NAMES)}, "
                f"but got {self.name!r}."
            )


class Batch(NamedTuple):
    """Inputs of a model and one target per task.

    Attributes:
        inputs: One tensor for all tasks, or a list of T where each task has inputs of its own.
        targets: T targets; None where the batch has no sample of that task.
    """

    inputs: Tensor | list[Tensor]
    targets: list[Tensor | None]

    def to(self, device: torch.device) -> "Batch":
        """Returns this batch with its tensors on ``device``."""
        inputs = self.inputs
        moved = (
            [each.to(device) for each in inputs] if isinstance(inputs, list) else inputs.to(device)
        )
        return Batch(
            moved, [None if target is None else target.to(device) for target in self.targets]
        )


class Split(Protocol):
    """Samples that can be read by index, in any order, as often as one likes, always with the same values.

    A split that reads files can be pickled, so that the workers of a ``DataLoader`` can read from it.
    """

    def __len__(self) -> int:
        """Returns the number of samples of an epoch; where tasks have inputs of their own, of the largest task."""
        ...

    def batch(self, indices: Tensor, *, epoch: int | None = None) -> Batch:
        """Returns the samples at ``indices``, ready for a model.

        Args:
            indices: int64 [B] on the CPU, each below ``len(self)``.
            epoch: Augments the samples as in this epoch. What is drawn depends on the seed, the epoch and the index,
                on nothing else: it is the same in any worker and after a resume. None reads them as they are, which
                is also what splits without augmentation do.
        """
        ...

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Iterates over every sample of every task once, in order and not augmented: for evaluation.

        Where tasks have inputs of their own, a smaller one runs out first; its target is None from then on.
        """
        ...

    def to(self, device: torch.device) -> "Split":
        """Returns a split whose batches lie on ``device``."""
        ...


@dataclass(frozen=True)
class TensorSplit:
    """A split that lies in memory. Images stay uint8 and are standardised per batch: a quarter of the memory.

    Attributes:
        inputs: uint8 or float32 [N, ...].
        targets: One tensor [N, ...] per task.
        input_mean: Subtracted from the inputs; of the training inputs, or 0 where they are standardised already.
        input_std: Divides them; of the training inputs, or 1.
    """

    inputs: Tensor
    targets: tuple[Tensor, ...]
    input_mean: float = 0.0
    input_std: float = 1.0

    def __post_init__(self) -> None:
        """Checks that inputs and targets have the same number of samples."""
        lengths = [len(target) for target in self.targets]
        if any(length != len(self.inputs) for length in lengths):
            raise ValueError(
                f"Expected every entry of `targets` to have {len(self.inputs)} samples as `inputs` have, "
                f"but got {lengths}."
            )

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.inputs)

    def batch(self, indices: Tensor, *, epoch: int | None = None) -> Batch:
        """Returns standardised float32 inputs and the targets at ``indices``; nothing is augmented."""
        indices = indices.to(self.inputs.device)
        # Indexing copies, also where float() does not: the stored inputs stay as they are.
        inputs = self.inputs[indices].float().sub_(self.input_mean).div_(self.input_std)
        return Batch(inputs, [target[indices] for target in self.targets])

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Iterates over all samples in order."""
        for indices in torch.arange(len(self)).split(batch_size):
            yield self.batch(indices)

    def to(self, device: torch.device) -> "TensorSplit":
        """Returns this split with its tensors on ``device``."""
        return replace(
            self,
            inputs=self.inputs.to(device),
            targets=tuple(target.to(device) for target in self.targets),
        )


@dataclass(frozen=True)
class MultiTaskData:
    """A data set: its tasks, its three splits, and which training samples were corrupted.

    Attributes:
        tasks: T tasks, in the order of the targets and of the model's heads.
        train: May carry label noise.
        validation: Cut from the training data before the noise is added, hence clean; models are selected on it.
        test: Clean, and the same samples for every seed.
        clean_train: The samples of ``train`` in the same order with their clean labels. Shares the inputs.
        corrupted: Task name -> indices of its corrupted training samples, of its own where a task has its own inputs.
        observed_validation: The samples of ``validation`` in the same order with labels as good as the training
            labels: what a user without clean labels could select by. None where the data set does not offer it.
        noise_shares: Task name -> how noisy its training labels are, in [0, 1], where it is known: of values the share
            of their variance that is noise, of classes the share that is wrong. See `noise_share`.
    """

    tasks: tuple[Task, ...]
    train: Split
    validation: Split
    test: Split
    clean_train: Split
    corrupted: dict[str, Tensor] = field(default_factory=dict)
    observed_validation: Split | None = None
    noise_shares: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks that each task has a name of its own."""
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"Expected `tasks` with a name of its own each, but got {names}.")
