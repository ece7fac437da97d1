"""The input of one fused step, and everything that computes the step on it: the op, its twin, and the usual loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from timing import CacheState
from torch import Tensor

from excessmtl_ext import functional, reference
from excessmtl_ext.op_arguments import op_arguments

ROBUST_STEP_SIZE = 0.01
EPS = 1e-7


@dataclass(frozen=True)
class Workload:
    """One input: T tasks with the same parameter sizes."""

    num_tasks: int
    numels: tuple[int, ...]
    grad_dtype: torch.dtype = torch.float32
    gradient_momentum: float = 0.0
    cache: CacheState = "warm"

    @property
    def numel(self) -> int:
        """T * P."""
        return self.num_tasks * sum(self.numels)

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float64 if self.grad_dtype == torch.float64 else torch.float32

    @property
    def bytes_moved(self) -> int:
        """The floor: gradients once; sums of squares, and means if there are any, twice."""
        states = 2 if self.gradient_momentum > 0 else 1
        return self.numel * (self.grad_dtype.itemsize + 2 * states * self.state_dtype.itemsize)

    def describe(self) -> str:
        kind = str(self.grad_dtype).removeprefix("torch.")
        momentum = f", momentum {self.gradient_momentum:g}" if self.gradient_momentum else ""
        sizes = f"{len(self.numels):,} x {self.numels[0]:,}"
        return f"T={self.num_tasks}, {sizes}, {kind}{momentum}, {self.cache}"


class EagerLoop:
    """The published algorithm as it is usually written in PyTorch (He et al. 2024, Algorithm 1)."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        num_tasks, num_params = workload.num_tasks, sum(workload.numels)
        self.num_tasks, self.num_tensors = num_tasks, len(workload.numels)
        self.sq_grad_sum = torch.zeros(
            num_tasks, num_params, dtype=workload.state_dtype, device=device
        )
        self.task_weights = torch.full(
            (num_tasks,), 1.0 / num_tasks, dtype=workload.state_dtype, device=device
        )
        self.baseline: Tensor | None = None

    def joined(self, task_grads: Sequence[Tensor]) -> Tensor:
        """[T, P]: what every such implementation builds first."""
        count = self.num_tensors
        return torch.stack(
            [
                torch.cat([g.reshape(-1) for g in task_grads[i * count : (i + 1) * count]])
                for i in range(self.num_tasks)
            ]
        ).to(self.sq_grad_sum.dtype)

    def step(self, task_grads: Sequence[Tensor]) -> None:
        grads = self.joined(task_grads)
        excess_risk = torch.zeros_like(self.task_weights)
        for i in range(self.num_tasks):
            self.sq_grad_sum[i] += grads[i] ** 2
            fisher = torch.sqrt(self.sq_grad_sum[i] + EPS)
            excess_risk[i] = (grads[i] / fisher) @ grads[i]
        self.update_weights(excess_risk)

    def update_weights(self, excess_risk: Tensor) -> None:
        if self.baseline is None:
            self.baseline = excess_risk
            return
        weights = self.task_weights * torch.exp(ROBUST_STEP_SIZE * excess_risk / self.baseline)
        self.task_weights = weights / weights.sum()


class CompiledStep(EagerLoop):
    """The same formula over all tasks at once, compiled into as few kernels as ``torch.compile`` finds."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        super().__init__(workload, device)
        torch._dynamo.reset()  # one workload's graph must not become the next one's dynamic shapes
        self._excess_risk = torch.compile(self._formula, fullgraph=True, dynamic=False)

    def _formula(self, task_grads: Sequence[Tensor], sq_grad_sum: Tensor) -> Tensor:
        grads = self.joined(task_grads)
        sq_grad = grads * grads
        sq_grad_sum.add_(sq_grad)
        return (sq_grad / torch.sqrt(sq_grad_sum + EPS)).sum(1)

    def step(self, task_grads: Sequence[Tensor]) -> None:
        self.update_weights(self._excess_risk(task_grads, self.sq_grad_sum))


class ForeachStep(EagerLoop):
    """The same formula tensor by tensor with multi-tensor kernels: no concatenation, four temporaries of T * P."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        super().__init__(workload, device)
        self._sums = [part for row in self.sq_grad_sum for part in row.split(list(workload.numels))]

    def step(self, task_grads: Sequence[Tensor]) -> None:
        grads = [g.reshape(-1).to(self.sq_grad_sum.dtype) for g in task_grads]
        sq_grads = torch._foreach_mul(grads, grads)
        torch._foreach_add_(self._sums, sq_grads)
        fisher = torch._foreach_add(self._sums, EPS)
        torch._foreach_sqrt_(fisher)
        torch._foreach_div_(sq_grads, fisher)
        # Shares are not negative, so the 1-norm is their sum.
        parts = torch.stack(torch._foreach_norm(sq_grads, 1))
        self.update_weights(parts.view(self.num_tasks, self.num_tensors).sum(1))


def make_task_grads(workload: Workload, device: torch.device) -> list[Tensor]:
    """T * L gradients, task-major, of the size of real ones."""
    generator = torch.Generator(device=device).manual_seed(0)
    return [
        torch.empty(numel, device=device)
        .normal_(std=1e-2, generator=generator)
        .to(workload.grad_dtype)
        for _ in range(workload.num_tasks)
        for numel in workload.numels
    ]


def make_calls(
    workload: Workload, names: Sequence[str], device: torch.device
) -> dict[str, Callable[[], object]]:
    """Builds the contestants named, each with state of its own, on the same gradients."""
    task_grads = make_task_grads(workload, device)
    layout = functional.ParamLayout(workload.numels)
    options = functional.StepOptions(
        eps=EPS,
        gradient_momentum=workload.gradient_momentum,
        robust_step_size=ROBUST_STEP_SIZE,
    )

    def new_state() -> functional.StepState:
        return functional.init_state(
            workload.num_tasks,
            layout,
            dtype=workload.state_dtype,
            device=device,
            has_momentum=workload.gradient_momentum > 0,
        )

    def fused() -> Callable[[], object]:
        state = new_state()
        return lambda: functional.fused_step_(task_grads, layout, state, options)

    def op() -> Callable[[], object]:
        run = torch.ops.excessmtl_ext.fused_step_.default
        state = new_state()
        arguments, keywords = op_arguments(
            "fused_step_", device, layout, state, options, task_grads=task_grads, grad_scale=None
        )
        return lambda: run(*arguments, **keywords)

    def twin() -> Callable[[], object]:
        state = new_state()
        return lambda: reference.fused_step_(task_grads, layout, state, options)

    def floor() -> Callable[[], object]:
        if device.type == "cuda":
            source = torch.zeros(workload.bytes_moved // 2, dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            return lambda: target.copy_(source)
        numel = max(1, workload.bytes_moved // 12)
        source, target = torch.full((numel,), 1e-3), torch.zeros(numel)
        return lambda: torch.add(source, target, out=target)

    def steps_of(kind: type[EagerLoop]) -> Callable[[], object]:
        loop = kind(workload, device)
        return lambda: loop.step(task_grads)

    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "fused": fused,
        "op": op,
        "floor": floor,
        "eager": lambda: steps_of(EagerLoop),
        "compiled": lambda: steps_of(CompiledStep),
        "foreach": lambda: steps_of(ForeachStep),
        "reference": twin,
    }
    return {name: makers[name]() for name in names}
