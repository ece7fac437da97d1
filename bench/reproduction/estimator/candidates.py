"""Estimates of excess risk that the package does not ship, in plain PyTorch, so that the study can try them.

What the study adopts moves into the package (reference, CPU and CUDA); what it rejects stays here with its numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from excessmtl_ext import Balancer
from excessmtl_ext.step import Step

Numerator = Literal["square", "momentum", "consecutive", "debiased"]


class CandidateExcessMTL(Balancer):
    r"""ExcessMTL with another numerator N, another S or another step size.

    .. math:: R_i = \sum_j N_{ij} / h(S_{ij}) / B_i

    Args:
        shared_parameters: What all tasks share.
        num_tasks: T.
        numerator: ``"square"``: g^2 (as published). ``"momentum"``: m^2, the square of the bias-corrected running mean.
            ``"consecutive"``: g_t g_{t-1}, whose expectation is the squared mean gradient, since two batches are
            independent; can be negative. ``"debiased"``: m^2 minus the variance that m still carries,
            c (v - m^2), with v the running mean of g^2 and c = sum of the squared averaging weights; can be negative.
        momentum: b of the running means.
        forgetting: None: S sums all squares. b2: S is the bias-corrected exponential mean of the squares times t0,
            t0 = 1 / (1 - b2), so that it saturates at the sum over about t0 steps.
        decay: Step size eta / sqrt(t) instead of eta.
        relative: False: h = S (the linear Fisher), R = E / P. True: divided by the first step's E.
        fisher: ``"sqrt"`` or ``"linear"``, as in the package.
        robust_step_size: eta.
        **options: Those of :class:`Balancer`.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"task_grads"})

    can_stream = False

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | None = None,
        *,
        num_tasks: int,
        numerator: Numerator = "momentum",
        momentum: float = 0.98,
        forgetting: float | None = None,
        decay: bool = False,
        relative: bool = False,
        fisher: Literal["sqrt", "linear"] = "linear",
        robust_step_size: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(shared_parameters, num_tasks=num_tasks, **options)
        self.numerator, self.momentum, self.forgetting = numerator, momentum, forgetting
        self.decay, self.relative, self.fisher = decay, relative, fisher
        self.robust_step_size = robust_step_size
        self.sq_grad_sum: Tensor | None = None
        self.excess_risk = torch.zeros(num_tasks, dtype=torch.float64)
        self.relative_excess_risk = torch.zeros(num_tasks, dtype=torch.float64)
        self.baseline: Tensor | None = None

    def update(self, step: Step) -> None:
        """Moves the weights from the task gradients."""
        task_grads = step.task_grads.tensors
        num_tensors = len(task_grads) // self.num_tasks
        grads = torch.stack(
            [
                torch.cat([g.flatten() for g in task_grads[i : i + num_tensors]])
                for i in range(0, len(task_grads), num_tensors)
            ]
        ).double()
        count = int(self.num_steps) + 1
        if self.sq_grad_sum is None:
            self.sq_grad_sum = torch.zeros_like(grads)
            self.grad_mean = torch.zeros_like(grads)
            self.sq_grad_mean = torch.zeros_like(grads)
            self.previous = torch.zeros_like(grads)
        b = self.momentum
        self.grad_mean.mul_(b).add_(grads, alpha=1 - b)
        self.sq_grad_mean.mul_(b).addcmul_(grads, grads, value=1 - b)
        if self.forgetting is not None:
            self.sq_grad_sum.mul_(self.forgetting)
        self.sq_grad_sum.addcmul_(grads, grads)
        mean = self.grad_mean / (1 - b**count)
        if self.numerator == "square":
            numerator = grads.square()
        elif self.numerator == "momentum":
            numerator = mean.square()
        elif self.numerator == "consecutive":
            numerator = grads * (self.previous if count > 1 else grads)
        else:
            # Var[mean] = c Var[g] for independent gradients, c = sum of squared weights of the running mean.
            c = (1 - b) / (1 + b) * (1 - b ** (2 * count)) / (1 - b**count) ** 2
            second = self.sq_grad_mean / (1 - b**count)
            numerator = (
                mean.square() - c / (1 - min(c, 0.999)) * (second - mean.square())
                if count > 1
                else grads.square()
            )
        self.previous = grads
        h = self.sq_grad_sum + 1e-7
        risk = (numerator / (h.sqrt() if self.fisher == "sqrt" else h)).sum(1)
        if self.baseline is None:
            self.baseline = risk.clone() if self.relative else torch.full_like(risk, grads.shape[1])
        self.excess_risk, self.relative_excess_risk = risk, risk / self.baseline
        if count > 1:
            eta = self.robust_step_size / count**0.5 if self.decay else self.robust_step_size
            moved = self.log_task_weights + eta * self.relative_excess_risk
            self.log_task_weights.copy_(moved - moved.logsumexp(0))
            self.task_weights.copy_(self.weight_total * self.log_task_weights.exp())
        self.num_steps += 1
