"""The rows of the training step's benchmark: every way to fill ``.grad`` that is compared.

A new mode of a balancer is one more entry in ``ROWS``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from excessmtl_ext import IMTL, MGDA, MOML, ExcessMTL, GradNorm, GroupDRO, SingleTask, Uniform
from excessmtl_ext.balancer import Balancer
from excessmtl_ext.passes.per_task import backward_of_task
from excessmtl_ext.passes.stacked import StackedLayers
from training_step.workloads import Problem

EPS = 1e-7

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


def _uniform_stacked(problem: Problem) -> FillGrads:
    """One pass of the summed loss with the weight gradients of ``batched="stacked"``."""
    shared = problem.shared

    def fill(features: Tensor, losses: list[Tensor]) -> None:
        total = torch.stack(losses).sum()
        start = torch.ones_like(total)
        (row,), _ = backward_of_task(0, total, start, shared, stacker=StackedLayers)
        for parameter, grad in zip(shared, row, strict=True):
            parameter.grad = grad

    return fill


def _excess(problem: Problem, **options: Any) -> ExcessMTL:
    published = {"combine": "sum", "fisher": "sqrt", "gradient_momentum": 0.0}
    options = {**published, "robust_step_size": problem.robust_step_size, "eps": EPS, **options}
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
    """Estimates risks from the encoder's last matrix and what follows it: its bias, a norm."""
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
    Row(
        "uniform_stacked",
        "plain summed loss, weight gradients as in batched='stacked'",
        "bound",
        _uniform_stacked,
        agrees_with="uniform",
    ),
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
        "stacked",
        "ExcessMTL, batched='stacked'",
        "ours",
        _with_backward(lambda problem: _excess(problem, batched="stacked")),
        agrees_with="exact",
    ),
    Row(
        "batched_graph",
        "ExcessMTL, batched=True, as a graph",
        "ours",
        _with_features(lambda problem: _excess(problem, batched=True)),
        agrees_with="exact",
        is_captured=True,
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
