"""The networks of the training step's benchmark, their batches, and each row's own copy of them.

A new network is one more function in :func:`named_workloads`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from excessmtl_ext.models import EncoderHeads, lenet, mlp, resnet18_heads, segnet

ROBUST_STEP_SIZE = 0.01
NUM_BATCHES = 4
ADAM: dict[str, Any] = {"lr": 1e-4, "foreach": True}
"""The learning rate is small so that a few thousand steps on four batches stay ordinary training steps."""

Section = Literal["workloads", "tasks", "parameters"]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Inputs, and a target per task."""

    inputs: Tensor
    targets: list[Tensor]


@dataclass(frozen=True)
class Workload:
    """A network, its batches and its losses; the balancer is the only thing that varies.

    Attributes:
        key: On the command line and in the files.
        title: In tables.
        section: ``"workloads"``, or the sweep it is a point of.
        make_model: Makes the network from torch's global random state.
        make_batch: Makes one batch.
        losses: One per task.
    """

    key: str
    title: str
    section: Section
    make_model: Callable[[], EncoderHeads]
    make_batch: Callable[[torch.Generator], Batch]
    losses: tuple[Loss, ...]

    @property
    def num_tasks(self) -> int:
        return len(self.losses)


class SmallTransformer(nn.Module):
    """Two encoder layers (Vaswani et al. 2017, torch's) over learned embeddings, averaged over the tokens.

    Args:
        num_tokens: Size of the vocabulary.
        length: Tokens per sample.
        width: Width of the model; four heads, feed-forward layers of four times the width.

    Shape:
        tokens int64 [B, length]; returns [B, width].
    """

    def __init__(self, num_tokens: int, length: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        # No dropout: rows could not be compared.
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.embedding(tokens) + self.positions).mean(dim=1)


def _classes(size: tuple[int, ...], num_classes: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(num_classes, size, generator=generator)


def _normal(*size: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(size, generator=generator)


def _batches(
    inputs: Callable[[torch.Generator], Tensor],
    targets: Sequence[Callable[[torch.Generator], Tensor]],
) -> Callable[[torch.Generator], Batch]:
    return lambda generator: Batch(inputs(generator), [make(generator) for make in targets])


def _cosine_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return 1.0 - nnf.cosine_similarity(outputs, targets, dim=1).mean()


def _perceptron(
    key: str, title: str, section: Section, *, inputs: int, hidden: int, num_tasks: int, batch: int
) -> Workload:
    return Workload(
        key,
        title,
        section,
        lambda: mlp((inputs,), [1] * num_tasks, hidden=(hidden,) * 3),
        _batches(_normal(batch, inputs), [_normal(batch, 1)] * num_tasks),
        (nnf.mse_loss,) * num_tasks,
    )


def _multimnist(*, quick: bool) -> Workload:
    batch = 8 if quick else 256
    return Workload(
        "multimnist",
        f"MultiMNIST network, T = 2, batch {batch}",
        "workloads",
        lambda: lenet([10, 10]),
        _batches(_normal(batch, 1, 28, 28), [_classes((batch,), 10)] * 2),
        (nnf.cross_entropy,) * 2,
    )


def _mlp(*, quick: bool) -> Workload:
    batch, hidden = (8, 8) if quick else (256, 128)
    return _perceptron(
        "mlp",
        f"MLP 3 x {hidden}, T = 7, batch {batch}",
        "workloads",
        inputs=21,
        hidden=hidden,
        num_tasks=7,
        batch=batch,
    )


def _resnet18(*, quick: bool) -> Workload:
    size, batch = (32, 2) if quick else (64, 8)
    return Workload(
        "resnet18",
        f"ResNet-18, {size} x {size}, T = 4, batch {batch}",
        "workloads",
        lambda: resnet18_heads([65] * 4),
        _batches(_normal(batch, 3, size, size), [_classes((batch,), 65)] * 4),
        (nnf.cross_entropy,) * 4,
    )


def _segnet(*, quick: bool) -> Workload:
    size, batch, width = (32, 2, 4) if quick else (64, 4, 32)
    targets = [
        _classes((batch, size, size), 13),
        _normal(batch, 1, size, size),
        _normal(batch, 3, size, size),
    ]
    return Workload(
        "segnet",
        f"SegNet of width {width}, {size} x {size}, T = 3, batch {batch}",
        "workloads",
        lambda: segnet([13, 1, 3], unit_heads=(2,), width=width),
        _batches(_normal(batch, 3, size, size), targets),
        (nnf.cross_entropy, nnf.l1_loss, _cosine_loss),
    )


def _transformer(*, quick: bool) -> Workload:
    num_tokens, length, width, batch = (50, 8, 8, 4) if quick else (1000, 32, 128, 32)
    return Workload(
        "transformer",
        f"two-layer transformer of width {width}, {length} tokens, T = 4, batch {batch}",
        "workloads",
        lambda: EncoderHeads(
            SmallTransformer(num_tokens, length, width), [nn.Linear(width, 10) for _ in range(4)]
        ),
        _batches(_classes((batch, length), num_tokens), [_classes((batch,), 10)] * 4),
        (nnf.cross_entropy,) * 4,
    )


def named_workloads(*, quick: bool) -> dict[str, Workload]:
    """The five networks. ``quick`` shrinks them all: it shows that the bench works, nothing else."""
    makers = (_multimnist, _mlp, _resnet18, _segnet, _transformer)
    return {workload.key: workload for workload in (make(quick=quick) for make in makers)}


TASK_COUNTS = (2, 5, 10, 20, 40, 100, 500)
PARAM_COUNTS = (10_000, 100_000, 1_000_000, 5_000_000, 25_000_000)


def task_sweep(counts: Sequence[int], *, quick: bool) -> list[Workload]:
    """A small encoder with more and more tasks."""
    hidden, batch = (8, 8) if quick else (64, 64)
    return [
        _perceptron(
            f"tasks_{count}",
            f"MLP 3 x {hidden}, T = {count}, batch {batch}",
            "tasks",
            inputs=32,
            hidden=hidden,
            num_tasks=count,
            batch=batch,
        )
        for count in counts
    ]


def param_sweep(counts: Sequence[int], *, quick: bool) -> list[Workload]:
    """Four tasks on wider and wider perceptrons; a small batch, so that P is what costs."""
    inputs, batch, num_tasks = 64, 16, 4
    found = []
    for count in counts:
        target = count // 1000 if quick else count
        # P = (inputs + 1) w + 2 (w^2 + w) of three layers of width w.
        linear = inputs + 3
        hidden = max(4, round((math.sqrt(linear**2 + 8 * target) - linear) / 4))
        found.append(
            _perceptron(
                f"parameters_{count}",
                f"MLP 3 x {hidden}, T = {num_tasks}, batch {batch}",
                "parameters",
                inputs=inputs,
                hidden=hidden,
                num_tasks=num_tasks,
                batch=batch,
            )
        )
    return found


class Template:
    """What all rows of a workload start from: one initialised network, and the batches.

    Args:
        workload: Is made on the CPU, so that devices agree, and moved.
        device: Where it goes.
    """

    def __init__(self, workload: Workload, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = workload.make_model().to(device)
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            Batch(batch.inputs.to(device), [target.to(device) for target in batch.targets])
            for batch in (workload.make_batch(generator) for _ in range(NUM_BATCHES))
        ]
        self.losses = workload.losses
        self.device = device

    @property
    def num_shared(self) -> int:
        """P."""
        return sum(parameter.numel() for parameter in self.model.encoder.parameters())


class Problem:
    """A row's own copy of the network with its own Adam, on the template's batches.

    Args:
        template: What to copy.
        robust_step_size: For the methods that have one.
    """

    def __init__(self, template: Template, robust_step_size: float = ROBUST_STEP_SIZE) -> None:
        self.model = copy.deepcopy(template.model)
        self.batches = template.batches
        self.loss_functions = template.losses
        self.device = template.device
        self.num_tasks = len(template.losses)
        self.robust_step_size = robust_step_size
        self.shared = list(self.model.encoder.parameters())
        self.heads = [list(head.parameters()) for head in self.model.heads]
        self.optimizer = torch.optim.Adam(self.model.parameters(), **ADAM)
        self._num_forwards = 0

    def forward(self) -> tuple[Tensor, list[Tensor]]:
        """Features of the next batch, and T losses."""
        batch = self.batches[self._num_forwards % NUM_BATCHES]
        self._num_forwards += 1
        features = self.model.encoder(batch.inputs)
        return features, [
            loss(head(features), target)
            for head, loss, target in zip(
                self.model.heads, self.loss_functions, batch.targets, strict=True
            )
        ]
