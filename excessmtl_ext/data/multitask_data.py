"""What every data set hands to the training loop: tasks, and splits that make batches by index."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """One task of a data set.

    Attributes:
        name: Names its columns in metrics.csv and its lines in figures.
        num_classes: Outputs of its head.
        is_noisy: Its training labels are the ones that noise is added to.
    """

    name: str
    num_classes: int
    is_noisy: bool = False


class Batch(NamedTuple):
    """Inputs of a model and one target per task."""

    inputs: Tensor
    targets: list[Tensor]


class Split(Protocol):
    """Samples that can be read by index, in any order, as often as one likes, always with the same values."""

    def __len__(self) -> int:
        """Returns the number of samples."""
        ...

    def batch(self, indices: Tensor) -> Batch:
        """Returns the samples at ``indices``, int64 [B] on the CPU, ready for a model."""
        ...

    def to(self, device: torch.device) -> "Split":
        """Returns a split whose batches lie on ``device``."""
        ...


@dataclass(frozen=True)
class TensorSplit:
    """A split that lies in memory. Inputs stay uint8 and are standardised per batch: a quarter of the memory.

    Attributes:
        inputs: uint8 [N, ...].
        targets: One tensor [N] per task.
        input_mean: Subtracted from the inputs; of the training inputs.
        input_std: Divides them; of the training inputs.
    """

    inputs: Tensor
    targets: tuple[Tensor, ...]
    input_mean: float
    input_std: float

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

    def batch(self, indices: Tensor) -> Batch:
        """Returns standardised float32 inputs and the targets at ``indices``."""
        indices = indices.to(self.inputs.device)
        inputs = self.inputs[indices].float().sub_(self.input_mean).div_(self.input_std)
        return Batch(inputs, [target[indices] for target in self.targets])

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
        test: Clean, and the same for every seed.
        corrupted: Task name -> indices of its corrupted training samples.
    """

    tasks: tuple[Task, ...]
    train: Split
    validation: Split
    test: Split
    corrupted: dict[str, Tensor] = field(default_factory=dict)
