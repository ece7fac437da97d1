"""The networks and the contestants of bench_training_step.py, and the proof that contestants do the same work.

A new mode of a balancer is one more entry in ``ROWS``; a new network one more function in
:func:`named_workloads`.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from excessmtl_ext import IMTL, MGDA, MOML, ExcessMTL, GradNorm, GroupDRO, SingleTask, Uniform
from excessmtl_ext.balancer import Balancer
from excessmtl_ext.models import EncoderHeads, lenet, mlp, resnet18_heads, segnet

ROBUST_STEP_SIZE = 0.01
EPS = 1e-7
NUM_BATCHES = 4
ADAM: dict[str, Any] = {"lr": 1e-4, "foreach": True}
"""The learning rate is small so that a few thousand steps on four batches stay ordinary training steps."""

CHECK_STEPS = 3
CHECK_STEP_SIZE = 0.5
"""Step size while rows are compared: weights must have left uniform, or wrong ones would not be seen."""
TOLERANCE = 1e-3
"""Largest relative difference of gradients that should be equal."""


# ---- workloads ----------------------------------------------------------------------------------

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


# ---- rows ---------------------------------------------------------------------------------------

FillGrads = Callable[[Tensor, list[Tensor]], object]
"""Given features and losses, leaves ``.grad`` of all parameters as the method wants it."""

Kind = Literal["bound", "ours", "baseline", "peer"]


@dataclass(frozen=True)
class Row:
    """One way to fill ``.grad``.

    Attributes:
        key: On the command line and in the files.
        label: In tables and pictures.
        kind: ``"bound"``, ``"ours"`` (ExcessMTL), ``"baseline"`` (this package's other methods),
            ``"peer"``.
        make: Makes the method for a problem.
        agrees_with: The row whose gradients it must reproduce, if any.
        period: Steps after which costs repeat.
        in_sweeps: Whether it is in the pictures.
        trains_all_heads: Whether each head gets a gradient.
        is_cheaper: Whether it promises to cost little more than ``uniform``.
        is_captured: Whether the whole step is replayed as a CUDA graph.
        packages: What must be importable.
    """

    key: str
    label: str
    kind: Kind
    make: Callable[[Problem], FillGrads]
    agrees_with: str | None = None
    period: int = 1
    in_sweeps: bool = False
    trains_all_heads: bool = True
    is_cheaper: bool = False
    is_captured: bool = False
    packages: tuple[str, ...] = ()

    @property
    def is_released_excess(self) -> bool:
        """Whether it is another package's ExcessMTL, and not a loop written for this comparison."""
        return self.kind == "peer" and bool(self.packages) and self.agrees_with is not None

    def missing(self) -> str | None:
        """Why the row cannot run here, or None."""
        if self.is_captured and not torch.cuda.is_available():
            return "no CUDA device for a graph"
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None


def _uniform(problem: Problem) -> FillGrads:
    return lambda features, losses: torch.stack(losses).sum().backward()


def _lower_bound(problem: Problem) -> FillGrads:
    shared = problem.shared

    def fill(features: Tensor, losses: list[Tensor]) -> None:
        # Cheaper than torch.autograd.grad, by 1 % of a step of the MLP: no search for what was asked.
        last = len(losses) - 1
        for task, loss in enumerate(losses):
            for parameter in shared:
                parameter.grad = None  # or this pass would add to it
            loss.backward(retain_graph=task != last)

    return fill


def _excess(problem: Problem, **options: Any) -> ExcessMTL:
    options = {"robust_step_size": problem.robust_step_size, "eps": EPS, **options}
    return ExcessMTL(problem.shared, num_tasks=problem.num_tasks, **options)


def _official(problem: Problem) -> ExcessMTL:
    return ExcessMTL.from_preset(
        "official",
        problem.shared,
        num_tasks=problem.num_tasks,
        robust_step_size=problem.robust_step_size,
    )


def _with_backward(make: Callable[[Problem], Balancer]) -> Callable[[Problem], FillGrads]:
    """``balancer.backward(losses)``."""

    def made(problem: Problem) -> FillGrads:
        balancer = make(problem)
        return lambda features, losses: balancer.backward(losses)

    return made


def _with_features(make: Callable[[Problem], Balancer]) -> Callable[[Problem], FillGrads]:
    """``balancer.backward(losses, features=features)``."""

    def made(problem: Problem) -> FillGrads:
        balancer = make(problem)
        return lambda features, losses: balancer.backward(losses, features=features)

    return made


def _scalar(problem: Problem) -> FillGrads:
    balancer = _excess(problem)
    return lambda features, losses: balancer(losses).backward()


def _streaming(problem: Problem) -> FillGrads:
    balancer = _excess(problem)

    def fill(features: Tensor, losses: list[Tensor]) -> None:
        last = len(losses) - 1
        for task, loss in enumerate(losses):
            balancer.accumulate(task, loss, retain_graph=task != last)
        balancer.finish()

    return fill


def _moml(problem: Problem) -> FillGrads:
    balancer = MOML(problem.shared, num_tasks=problem.num_tasks)

    def fill(features: Tensor, losses: list[Tensor]) -> None:
        balancer.observe_validation(problem.forward()[1])  # the next batch is the validation batch
        balancer.backward(losses)

    return fill


class EagerLoop:
    """ExcessMTL as it is usually written in PyTorch, after He et al. 2024, Algorithm 1 and Eqs. 6, 7 and 9.

    Args:
        problem: Whose gradients to fill.
        weight_total: What the weights sum to.
    """

    def __init__(self, problem: Problem, weight_total: float = 1.0) -> None:
        self.shared, self.heads = problem.shared, problem.heads
        self.robust_step_size = problem.robust_step_size
        self.weight_total = weight_total
        self.numels = [parameter.numel() for parameter in self.shared]
        num_tasks, device = problem.num_tasks, problem.device
        self.sq_grad_sum = torch.zeros(num_tasks, sum(self.numels), device=device)
        self.task_weights = torch.full((num_tasks,), weight_total / num_tasks, device=device)
        self.baseline: Tensor | None = None

    def move_weights(self, task_grads: Tensor) -> None:
        excess_risk = torch.zeros_like(self.task_weights)
        for task, grad in enumerate(task_grads):
            self.sq_grad_sum[task] += grad**2
            fisher = torch.sqrt(self.sq_grad_sum[task] + EPS)
            excess_risk[task] = (grad / fisher) @ grad
        if self.baseline is None:
            self.baseline = excess_risk
            return
        weights = self.task_weights * torch.exp(self.robust_step_size * excess_risk / self.baseline)
        self.task_weights = self.weight_total * weights / weights.sum()

    def __call__(self, features: Tensor, losses: list[Tensor]) -> None:
        """Heads get the gradient of their own loss, the encoder the weighted sum: T passes."""
        last, num_shared = len(losses) - 1, len(self.shared)
        rows = []
        for task, (loss, head) in enumerate(zip(losses, self.heads, strict=True)):
            grads = torch.autograd.grad(loss, [*self.shared, *head], retain_graph=task != last)
            rows.append(torch.cat([grad.reshape(-1) for grad in grads[:num_shared]]))
            for parameter, grad in zip(head, grads[num_shared:], strict=True):
                parameter.grad = grad
        task_grads = torch.stack(rows)
        self.move_weights(task_grads)
        combined = self.task_weights @ task_grads
        for parameter, grad in zip(self.shared, combined.split(self.numels), strict=True):
            parameter.grad = grad.view_as(parameter)


class EagerWeightedLoss(EagerLoop):
    """The same with a pass of the weighted loss at the end, T + 1 in all: heads get weighted gradients."""

    def __call__(self, features: Tensor, losses: list[Tensor]) -> None:
        rows = [
            torch.cat(
                [
                    grad.reshape(-1)
                    for grad in torch.autograd.grad(loss, self.shared, retain_graph=True)
                ]
            )
            for loss in losses
        ]
        self.move_weights(torch.stack(rows))
        (self.task_weights * torch.stack(losses)).sum().backward()


def _torchjd(
    make: Callable[[Problem], Any], *, chunk_size: int | None = None
) -> Callable[[Problem], FillGrads]:
    """The ``mtl_backward`` of torchjd and ``jac_to_grad``, told all parameters, which spares it a search.

    Args:
        make: Makes the aggregator.
        chunk_size: Tasks in one vectorised pass; None: all (its default), 1: a pass per task.
    """

    def made(problem: Problem) -> FillGrads:
        from torchjd.autojac import jac_to_grad, mtl_backward

        aggregator = make(problem).to(problem.device)

        def fill(features: Tensor, losses: list[Tensor]) -> None:
            mtl_backward(
                losses,
                features=features,
                tasks_params=problem.heads,
                shared_params=problem.shared,
                parallel_chunk_size=chunk_size,
            )
            jac_to_grad(problem.shared, aggregator)

        return fill

    return made


def _torchjd_excess(problem: Problem) -> Any:
    from torchjd.aggregation import ExcessMTL as TorchJDExcessMTL

    return TorchJDExcessMTL(problem.robust_step_size, n_warmup_steps=1)


def _torchjd_mgda(problem: Problem) -> Any:
    from torchjd.aggregation import MGDA as TorchJDMGDA

    return TorchJDMGDA()


def _torchjd_upgrad(problem: Problem) -> Any:
    from torchjd.aggregation import UPGrad

    return UPGrad()


def _libmtl_excess(problem: Problem) -> FillGrads:
    """LibMTL's own ExcessMTL in its hard-parameter-sharing model, with the losses as its Trainer hands them over."""
    from LibMTL.architecture import HPS  # pyright: ignore[reportMissingImports]
    from LibMTL.weighting import (  # pyright: ignore[reportMissingImports]
        ExcessMTL as LibMTLExcessMTL,
    )

    class Model(HPS, LibMTLExcessMTL):
        pass

    names = [str(task) for task in range(problem.num_tasks)]
    heads = nn.ModuleDict(dict(zip(names, problem.model.heads, strict=True)))
    encoder = problem.model.encoder
    model = Model(names, lambda: encoder, heads, False, False, problem.device)
    model.init_param()

    def fill(features: Tensor, losses: list[Tensor]) -> None:
        # Assigned one by one to a tensor: from then on they hang together, and each task's pass walks all of them.
        tied = torch.zeros(len(losses), device=problem.device)
        for task, loss in enumerate(losses):
            tied[task] = loss
        model.backward(tied, robust_step_size=problem.robust_step_size)

    return fill


def _last_layer(problem: Problem) -> ExcessMTL:
    """Risks from the encoder's last matrix and what follows it: its bias, a norm."""
    shared = problem.shared
    matrices = [index for index, parameter in enumerate(shared) if parameter.dim() > 1]
    return _excess(problem, estimate_from=shared[matrices[-1] :])


def _from_features(key: str, label: str, *, period: int = 1) -> Row:
    def make(problem: Problem) -> Balancer:
        return _excess(problem, estimate_from="features", update_every=period)

    return Row(key, label, "ours", _with_features(make), period=period, is_cheaper=True)


def _rotating(key: str, label: str, *, period: int = 1) -> Row:
    def make(problem: Problem) -> Balancer:
        return _excess(problem, tasks_per_step=1, update_every=period)

    return Row(key, label, "ours", _with_backward(make), period=period, is_cheaper=True)


def _every(period: int) -> Row:
    def make(problem: Problem) -> Balancer:
        return _excess(problem, update_every=period)

    return Row(
        f"update_every_{period}",
        f"ExcessMTL, update_every={period}",
        "ours",
        _with_backward(make),
        period=period,
        in_sweeps=period == 10,
        is_cheaper=True,
    )


def _baseline(
    kind: type[Balancer],
    *,
    key: str | None = None,
    trains_all_heads: bool = True,
    agrees_with: str | None = None,
    **options: Any,
) -> Row:
    return Row(
        key or kind.__name__.lower(),
        kind.__name__,
        "baseline",
        _with_backward(
            lambda problem: kind(problem.shared, num_tasks=problem.num_tasks, **options)
        ),
        agrees_with=agrees_with,
        trains_all_heads=trains_all_heads,
    )


_ALL_ROWS = (
    Row("uniform", "plain summed loss", "bound", _uniform, in_sweeps=True),
    Row("lower_bound", "lower bound", "bound", _lower_bound, in_sweeps=True),
    Row("uniform_graph", "plain summed loss, as a graph", "bound", _uniform, is_captured=True),
    Row("lower_bound_graph", "lower bound, as a graph", "bound", _lower_bound, is_captured=True),
    Row("exact", "ExcessMTL", "ours", _with_backward(_excess), in_sweeps=True),
    Row("exact_scalar", "ExcessMTL, scalar", "ours", _scalar, agrees_with="exact"),
    Row(
        "exact_features",
        "ExcessMTL, features=",
        "ours",
        _with_features(_excess),
        agrees_with="exact",
    ),
    Row(
        "exact_graph",
        "ExcessMTL, as a graph",
        "ours",
        _with_backward(_excess),
        agrees_with="exact",
        is_captured=True,
    ),
    Row(
        "batched",
        "ExcessMTL, batched=True",
        "ours",
        _with_features(lambda problem: _excess(problem, batched=True)),
        agrees_with="exact",
        in_sweeps=True,
    ),
    Row(
        "auto",
        "ExcessMTL, batched='auto'",
        "ours",
        _with_features(lambda problem: _excess(problem, batched="auto")),
        agrees_with="exact",
    ),
    Row(
        "streaming", "ExcessMTL, streaming", "ours", _streaming, agrees_with="exact", in_sweeps=True
    ),
    Row("official", "ExcessMTL, official preset", "ours", _with_backward(_official)),
    _every(4),
    _every(10),
    Row(
        "last_layer",
        "ExcessMTL, estimate_from=last layer",
        "ours",
        _with_backward(_last_layer),
        is_cheaper=True,
    ),
    _from_features("features", 'ExcessMTL, estimate_from="features"'),
    _from_features("features_every_5", 'ExcessMTL, "features", update_every=5', period=5),
    _rotating("rotation", "ExcessMTL, tasks_per_step=1"),
    _rotating("rotation_every_5", "ExcessMTL, tasks_per_step=1, update_every=5", period=5),
    _baseline(Uniform, key="uniform_balancer", agrees_with="uniform", weight_scale="num_tasks"),
    _baseline(GroupDRO),
    _baseline(GradNorm),
    _baseline(MGDA),
    _baseline(IMTL),
    Row("moml", "MOML", "baseline", _moml),
    _baseline(SingleTask, trains_all_heads=False, task=0),
    Row("eager", "plain PyTorch", "peer", EagerLoop, agrees_with="exact", in_sweeps=True),
    Row(
        "eager_weighted_loss",
        "plain PyTorch, weighted loss",
        "peer",
        lambda problem: EagerWeightedLoss(problem, weight_total=float(problem.num_tasks)),
        agrees_with="official",
    ),
    Row(
        "torchjd_excess",
        "torchjd ExcessMTL",
        "peer",
        _torchjd(_torchjd_excess),
        agrees_with="exact",
        in_sweeps=True,
        packages=("torchjd",),
    ),
    Row(
        "torchjd_excess_sequential",
        "torchjd ExcessMTL, chunks of 1",
        "peer",
        _torchjd(_torchjd_excess, chunk_size=1),
        agrees_with="exact",
        in_sweeps=True,
        packages=("torchjd",),
    ),
    Row("torchjd_mgda", "torchjd MGDA", "peer", _torchjd(_torchjd_mgda), packages=("torchjd",)),
    Row(
        "torchjd_upgrad",
        "torchjd UPGrad",
        "peer",
        _torchjd(_torchjd_upgrad),
        packages=("torchjd", "qpsolvers", "quadprog"),
    ),
    Row(
        "libmtl_excess",
        "LibMTL ExcessMTL",
        "peer",
        _libmtl_excess,
        agrees_with="official",
        packages=("LibMTL",),
    ),
)
ROWS = {row.key: row for row in _ALL_ROWS}
assert len(ROWS) == len(_ALL_ROWS), "two rows have the same key"


class Step:
    """A whole training step of one row: the same for all but for ``fill``."""

    def __init__(self, row: Row, problem: Problem) -> None:
        self.problem = problem
        self.fill = row.make(problem)

    def __call__(self) -> None:
        self.problem.optimizer.zero_grad()
        features, losses = self.problem.forward()
        self.fill(features, losses)
        self.problem.optimizer.step()


class CapturedStep(Step):
    """The same step replayed: a CUDA graph per batch, recorded after one ordinary step with each."""

    def __init__(self, row: Row, problem: Problem) -> None:
        super().__init__(row, problem)
        for group in problem.optimizer.param_groups:
            group["capturable"] = True  # Adam then counts its steps on the device
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(NUM_BATCHES):
                super().__call__()
        torch.cuda.current_stream().wait_stream(side)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        for _ in range(NUM_BATCHES):
            graph = torch.cuda.CUDAGraph()
            pool = self._graphs[0].pool() if self._graphs else None
            with torch.cuda.graph(graph, pool=pool):
                super().__call__()
            self._graphs.append(graph)
        self._num_replays = 0

    def __call__(self) -> None:
        self._graphs[self._num_replays % NUM_BATCHES].replay()
        self._num_replays += 1


def make_step(row: Row, problem: Problem) -> Step:
    """A row's step as it is timed."""
    return (CapturedStep if row.is_captured else Step)(row, problem)


# ---- do the rows do the same work? --------------------------------------------------------------


def filled_grads(row: Row, template: Template) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Gradients of shared parameters and of heads after each of a few fills, parameters held still.

    They are held because Adam divides by the size of a gradient: rounding would grow from step to
    step in coordinates whose gradient is nearly zero.

    Raises:
        RuntimeError: the row did not start where all start, or left a parameter without a gradient.
    """
    problem = Problem(template, CHECK_STEP_SIZE)
    fill = row.make(problem)
    check_same_start(row, problem, template)
    heads = [parameter for head in problem.heads for parameter in head]
    for _ in range(CHECK_STEPS):
        problem.optimizer.zero_grad()
        fill(*problem.forward())
        bare = [parameter for parameter in problem.shared if parameter.grad is None]
        if row.trains_all_heads:
            bare += [parameter for parameter in heads if parameter.grad is None]
        if bare:
            raise RuntimeError(
                f"Expected row `{row.key}` to fill `.grad` of all parameters, but {len(bare)} have none. "
                "Correct it: its step would be cheaper than the others'."
            )
        yield (
            [parameter.grad for parameter in problem.shared if parameter.grad is not None],
            [parameter.grad for parameter in heads if parameter.grad is not None],
        )


def check_same_start(row: Row, problem: Problem, template: Template) -> None:
    """Raises unless a row's parameters, batches and Adam are those of all others."""
    is_same = (
        all(
            torch.equal(mine, theirs)
            for mine, theirs in zip(
                problem.model.state_dict().values(),
                template.model.state_dict().values(),
                strict=True,
            )
        )
        and problem.batches is template.batches
        and all(problem.optimizer.defaults[name] == value for name, value in ADAM.items())
        and len(problem.optimizer.param_groups[0]["params"])
        == len(list(template.model.parameters()))
        and all(parameter.requires_grad for parameter in problem.model.parameters())
    )
    if not is_same:
        raise RuntimeError(
            f"Expected row `{row.key}` to start from the template's parameters, batches and Adam, but its method "
            "has changed them. Rows would not do the same work."
        )


# A convolution whose factors are rounded to TF32, torch's default on a GPU, is no basis for a comparison.
@torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
def difference(row: Row, other: Row, template: Template) -> float:
    """Largest relative difference (norm over norm, shared and heads apart) of two rows' gradients in a few steps.

    Raises:
        RuntimeError: it is above the tolerance.
    """
    worst = 0.0
    pairs = zip(filled_grads(row, template), filled_grads(other, template), strict=True)
    for mine, theirs in pairs:
        for part, expected in zip(mine, theirs, strict=True):
            errors = torch.stack([(a - b).norm() for a, b in zip(part, expected, strict=True)])
            sizes = torch.stack([b.norm() for b in expected])
            relative = float(errors.norm() / sizes.norm())
            worst = relative if math.isnan(relative) else max(worst, relative)
            if not worst <= TOLERANCE:
                raise RuntimeError(
                    f"Expected row `{row.key}` to leave the gradients of row `{other.key}`, but they differ by "
                    f"{worst:.2g}, more than {TOLERANCE:g}. One of them computes something else."
                )
    return worst
