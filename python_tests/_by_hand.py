"""ExcessMTL by hand: each equation once, in float64, on plain lists of gradients, for any pattern of present tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MAX_LOG_STEP = 1e100

Row = list[Tensor | None]
"""L gradients of a task in float64; None where it does not reach the parameter."""


@dataclass
class Setting:
    """The options that the equations depend on."""

    step_size: float | None = None
    fisher: str = "linear"
    eps: float = 2.0**-126
    momentum: float = 0.98
    total: float = 1.0
    sizes: bool = True
    warmup: int = 1
    max_log_ratio: float = 0.2
    floor: float = 0.0
    priorities: Sequence[float] | None = None


@dataclass
class TaskByHand:
    """What is known of one task."""

    squares: list[Tensor]
    means: list[Tensor]
    steps: int = 0
    mass: float = 0.0
    sq_mass: float = 0.0
    num_grads: int = 0
    signal: float = 0.0
    baseline: float = 0.0
    ratio: float = 0.0
    log_weight: float = 0.0
    sizes: list[float] = field(default_factory=list)
    num_sizes: list[int] = field(default_factory=list)
    now: list[float] = field(default_factory=list)
    new_signal: float = 0.0


class ByHand:
    """The state of ExcessMTL and its step in three parts: take tasks in, move the weights, add what was signal."""

    def __init__(self, num_tasks: int, shapes: Sequence[torch.Size], setting: Setting) -> None:
        self.setting = setting
        self.numels = [shape.numel() for shape in shapes]
        self.tasks = [
            TaskByHand(
                [torch.zeros(shape).double() for shape in shapes],
                [torch.zeros(shape).double() for shape in shapes],
                sizes=[0.0] * len(shapes),
                num_sizes=[0] * len(shapes),
                now=[0.0] * len(shapes),
                log_weight=-math.log(num_tasks),
            )
            for _ in range(num_tasks)
        ]
        if setting.priorities is not None:
            for task, priority in zip(self.tasks, setting.priorities, strict=True):
                task.log_weight = math.log(priority / sum(setting.priorities))
        self.log_priorities = [task.log_weight for task in self.tasks]
        self.num_steps = 0
        self.lone: set[int] = set()

    def end_lone_step(self, present: Sequence[int]) -> None:
        """Eq. 9 once every task has had a batch of its own; after the gradients of the step have been summed."""
        if len(present) == 1 < len(self.tasks) and self.setting.step_size is not None:
            self.lone |= set(present)
            if len(self.lone) == len(self.tasks):
                self.lone.clear()
                self.move(range(len(self.tasks)))
                self.num_steps -= 1

    def measure(self, task: int, row: Row) -> None:
        """Running mean square of each tensor; a tensor of zeros says nothing."""
        state = self.tasks[task]
        for index, grad in enumerate(row):
            now = 0.0 if grad is None else float(grad.square().mean())
            state.now[index] = now
            if now > 0.0:
                bounded = min(now, 100.0 * state.sizes[index]) if state.num_sizes[index] else now
                state.num_sizes[index] += 1
                share = 1.0 / min(state.num_sizes[index], 100)
                state.sizes[index] += share * (bounded - state.sizes[index])

    def take(self, task: int, row: Row) -> None:
        """S, m, E, B, R of a task, and how much of its gradient was signal."""
        state, setting = self.tasks[task], self.setting
        b, risk_sum, has_grad = setting.momentum, 0.0, False
        for index, grad in enumerate(row):
            if grad is None:
                continue  # the op passes over such a tensor: neither S nor m move
            has_grad = has_grad or bool(grad.any())
            state.squares[index] += grad**2
            state.means[index] = b * state.means[index] + (1 - b) * grad
            fisher = state.squares[index] + setting.eps
            fisher = fisher.sqrt() if setting.fisher == "sqrt" else fisher
            mean = state.means[index] if b > 0 else grad
            risk_sum += float((mean**2 / fisher).sum())
        self.measure(task, row)
        if risk_sum > 0.0 or state.baseline > 0.0:
            state.steps += 1
            risk = risk_sum / (1 - b**state.steps) ** 2 if b > 0 else risk_sum
            if self.num_steps < setting.warmup:
                state.baseline += (risk - state.baseline) / state.steps
            elif state.baseline == 0.0:
                state.baseline = risk
            state.ratio = risk / state.baseline
        share = (1 - b) * has_grad
        state.mass = b * state.mass + share
        state.sq_mass = b * b * state.sq_mass + share**2
        state.num_grads += has_grad
        if has_grad and setting.step_size is None:
            numel = sum(n for n, k in zip(self.numels, state.num_sizes, strict=True) if k > 0)
            variance = state.sq_mass / state.mass**2
            ratio = state.num_grads * risk_sum / state.mass**2 / numel
            if 1 - variance > 1e-6:
                state.new_signal = min(max((ratio - variance) / (1 - variance), 0.0), 1.0)

    def move(self, present: Sequence[int]) -> None:
        """The weights: bounded moves, or Eq. 9 among the tasks that are present."""
        setting, tasks = self.setting, self.tasks
        is_past_warmup = self.num_steps >= setting.warmup
        self.num_steps += 1
        if setting.step_size is None:
            largest = max(task.signal for task in tasks)
            for task, log_priority in zip(tasks, self.log_priorities, strict=True):
                ratio = task.signal / largest if largest > 0 else 1.0
                ratio = 1 + (ratio - 1) * min(task.num_grads / 150, 1.0)
                task.log_weight = log_priority + is_past_warmup * setting.max_log_ratio * ratio
            total = _log_sum_exp([task.log_weight for task in tasks])
            for task in tasks:
                task.log_weight -= total
        elif is_past_warmup:
            had = _log_sum_exp([tasks[task].log_weight for task in present])
            for index in present:
                tasks[index].log_weight += min(setting.step_size * tasks[index].ratio, MAX_LOG_STEP)
            total = _log_sum_exp([tasks[task].log_weight for task in present])
            for index in present:
                tasks[index].log_weight += had - total

    def add_signal(self) -> None:
        """The end of a step: what the tasks have shown counts from the next one on."""
        for task in self.tasks:
            task.signal += task.new_signal
            task.new_signal = 0.0

    def weights(self) -> list[float]:
        """[T]."""
        total = _log_sum_exp([task.log_weight for task in self.tasks])
        floor = self.setting.floor
        shares = [math.exp(task.log_weight - total) for task in self.tasks]
        return [self.setting.total * ((1 - len(shares) * floor) * x + floor) for x in shares]

    def tensor_factors(self) -> list[list[float]]:
        """[T][L] factors of the gradients in the sum of a step with a pass per task."""
        weights = self.weights()
        if not self.setting.sizes:
            return [[weight] * len(self.numels) for weight in weights]
        largest = [max(task.sizes[k] for task in self.tasks) for k in range(len(self.numels))]
        return [
            [
                weight * math.sqrt(largest[k] / max(task.sizes[k], task.now[k] / 100.0))
                if task.sizes[k] > 0
                else weight
                for k in range(len(self.numels))
            ]
            for weight, task in zip(weights, self.tasks, strict=True)
        ]

    def pass_factors(self) -> list[float]:
        """[T] factors in a step of one pass for all tasks."""
        weights = self.weights()
        if not self.setting.sizes:
            return weights
        means = []
        for task in self.tasks:
            reached = sum(n for n, k in zip(self.numels, task.num_sizes, strict=True) if k > 0)
            total = sum(n * size for n, size in zip(self.numels, task.sizes, strict=True))
            means.append(total / max(reached, 1))
        largest = max(means)
        if largest == 0.0:
            return weights
        ratios = [math.sqrt(largest / mean) if mean > 0 else 0.0 for mean in means]
        return [weight * ratio for weight, ratio in zip(weights, ratios, strict=True)]


def _log_sum_exp(values: Sequence[float]) -> float:
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))
