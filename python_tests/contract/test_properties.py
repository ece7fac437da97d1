"""Properties of the op and of the balancer over drawn shapes, dtypes, strides, task counts and options.

The examples are the same in every run. EXCESSMTL_PROPERTY_EXAMPLES=1000 draws so many new ones for each property.
"""

from __future__ import annotations

import copy
import io
import os
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from _asserts import assert_equal_bits
from _inputs import DTYPES, make_problem
from _published import published
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from excessmtl_ext import ExcessMTL, _extension, reference
from excessmtl_ext import functional as F
from excessmtl_ext.functional import ParamLayout, StepOptions, StepState, init_state

EXAMPLES = int(os.environ.get("EXCESSMTL_PROPERTY_EXAMPLES", "0"))
bounded = settings(
    max_examples=EXAMPLES or 25,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

STRIDES = ("contiguous", "every second", "reversed dimensions", "behind an offset", "expanded")


def laid_out(values: Tensor, stride: str) -> Tensor:
    """The values in another place of memory; all but "expanded" keep them."""
    numel = values.numel()
    if stride == "every second":
        return torch.stack([values, values + 1], dim=1)[:, 0]
    if stride == "reversed dimensions" and numel % 3 == 0:
        return values.view(-1, 3).T.contiguous().T
    if stride == "behind an offset":
        return torch.cat([values.new_ones(1), values])[1:]
    if stride == "expanded" and numel > 0:
        return values[:1].expand(numel)
    return values


@dataclass(frozen=True)
class Case:
    """A few steps: the gradients of each are drawn from a generator with ``seed``."""

    num_tasks: int
    numels: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[str, ...]
    missing: frozenset[tuple[int, int]]  # (task, parameter) without a gradient
    scale: float
    num_steps: int
    seed: int
    options: StepOptions

    def steps(self) -> list[list[Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        empty = torch.empty(0, dtype=self.dtype)
        steps = []
        for _ in range(self.num_steps):
            grads = []
            for task in range(self.num_tasks):
                for index, numel in enumerate(self.numels):
                    values = torch.randn(numel, generator=generator, dtype=torch.float64)
                    values *= self.scale * (1 + task)
                    grad = laid_out(values.to(self.dtype), self.strides[index])
                    grads.append(empty if (task, index) in self.missing else grad)
            steps.append(grads)
        return steps

    def state(self, dtype: torch.dtype) -> StepState:
        return init_state(
            self.num_tasks,
            ParamLayout(self.numels),
            dtype=dtype,
            has_momentum=self.options.gradient_momentum > 0,
            weight_total=self.options.weight_total,
        )

    def run(self) -> StepState:
        state = self.state(torch.float64 if self.dtype == torch.float64 else torch.float32)
        for grads in self.steps():
            F.fused_step_(grads, ParamLayout(self.numels), state, self.options)
        return state


@st.composite
def option_sets(draw: st.DrawFn, num_tasks: int) -> StepOptions:
    relative = draw(st.booleans())
    return StepOptions(
        fisher=draw(st.sampled_from(["sqrt", "linear"])),
        eps=draw(st.sampled_from([1e-7, 1e-3, 1e-30])),
        gradient_momentum=draw(st.sampled_from([0.0, 0.5, 0.98])),
        # A raw risk grows with P, a relative one is near 1.
        robust_step_size=draw(st.sampled_from([0.01, 0.3, 1.0])) * (1.0 if relative else 1e-3),
        num_warmup_steps=draw(st.integers(0, 3)),
        relative=relative,
        min_weight=draw(st.sampled_from([0.0, 0.5, 1.0])) / num_tasks,
        weight_total=draw(st.sampled_from([1.0, float(num_tasks)])),
    )


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)) -> Case:
    num_tasks = draw(st.integers(1, 6))
    numels = tuple(draw(st.lists(st.integers(0, 100), min_size=1, max_size=5)))
    pairs = st.tuples(st.integers(0, num_tasks - 1), st.integers(0, len(numels) - 1))
    return Case(
        num_tasks=num_tasks,
        numels=numels,
        dtype=draw(st.sampled_from(dtypes)),
        strides=tuple(draw(st.sampled_from(STRIDES)) for _ in numels),
        missing=frozenset(draw(st.sets(pairs, max_size=3))),
        scale=draw(st.sampled_from([1.0, 0.01, 30.0])),
        num_steps=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 2**31)),
        options=draw(option_sets(num_tasks)),
    )


def reference_of(case: Case) -> StepState:
    layout, state = ParamLayout(case.numels), case.state(torch.float64)
    for grads in case.steps():
        reference.fused_step_([grad.double() for grad in grads], layout, state, case.options)
    return state


needs_ops = pytest.mark.skipif(
    not _extension.ops_available, reason=f"no compiled ops: {_extension.unavailable_reason}"
)


@needs_ops
@bounded
@given(cases((torch.float64,)))
def test_the_op_equals_the_reference_in_float64(case: Case) -> None:
    for name, left, right in zip(StepState._fields, case.run(), reference_of(case), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: n + m)


@needs_ops
@bounded
@given(cases())
def test_the_op_equals_the_reference_in_every_dtype(case: Case) -> None:
    actual, expected = case.run(), reference_of(case)
    for name in ("num_steps", "num_task_steps", "num_skipped_steps", "found_nonfinite"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    size = case.scale * case.num_tasks * 5
    for name, atol in (("sq_grad_sum", 1e-6 * size**2), ("grad_mean", 1e-6 * size)):
        left, right = getattr(actual, name).double(), getattr(expected, name)
        torch.testing.assert_close(left, right, rtol=1e-5, atol=atol)
    # Float32 squares and the fast root: 3e-6 of a risk, times the step size, over all steps.
    torch.testing.assert_close(actual.task_weights, expected.task_weights, rtol=1e-3, atol=1e-6)


@bounded
@given(cases())
def test_weights_are_positive_and_have_their_sum(case: Case) -> None:
    state, options = case.run(), case.options
    assert bool((state.task_weights > 0).all())
    assert state.task_weights.sum().item() == pytest.approx(options.weight_total, rel=1e-12)
    floor = options.min_weight * options.weight_total
    assert state.task_weights.min().item() >= floor * (1 - 1e-12)
    assert bool(state.sq_grad_sum.isfinite().all())
    assert bool((state.sq_grad_sum >= 0).all())


@bounded
@given(cases(), st.randoms(use_true_random=False))
def test_permuting_tasks_permutes_everything(case: Case, draw: Any) -> None:
    order = list(range(case.num_tasks))
    draw.shuffle(order)
    layout, count = ParamLayout(case.numels), len(case.numels)
    state = case.run()
    permuted = case.state(state.sq_grad_sum.dtype)
    for grads in case.steps():
        rows = [grads[task * count : (task + 1) * count] for task in order]
        F.fused_step_([grad for row in rows for grad in row], layout, permuted, case.options)
    for name in ("sq_grad_sum", "grad_mean", "excess_risk", "baseline_excess_risk"):
        assert torch.equal(getattr(permuted, name), getattr(state, name)[order]), name
    torch.testing.assert_close(permuted.task_weights, state.task_weights[order], rtol=1e-12, atol=0)


@bounded
@given(cases(), st.floats(0, 1))
def test_splitting_and_joining_parameters_changes_nothing_but_rounding(
    case: Case, where: float
) -> None:
    """The first parameter cut in two, and so two parameters joined, read in the other direction."""
    cut = int(where * case.numels[0])
    numels = (cut, case.numels[0] - cut, *case.numels[1:])
    # An empty tensor stands for a missing gradient: no piece may be empty where the whole is not.
    if 0 in numels[:2] and case.numels[0] > 0:
        return
    layout, count = ParamLayout(numels), len(case.numels)
    state = case.run()
    split = replace(case, numels=numels).state(state.sq_grad_sum.dtype)
    for grads in case.steps():
        pieces: list[Tensor] = []
        for task in range(case.num_tasks):
            first, *rest = grads[task * count : (task + 1) * count]
            flat = first.reshape(-1)
            pieces += [flat[:cut], flat[cut:]] if flat.numel() else [flat, flat]
            pieces += rest
        F.fused_step_(pieces, layout, split, case.options)
    exact = case.dtype == torch.float64
    rtol = 1e-10 if exact else 1e-5
    torch.testing.assert_close(split.excess_risk, state.excess_risk, rtol=rtol, atol=1e-30)
    torch.testing.assert_close(split.task_weights, state.task_weights, rtol=1e-4, atol=0)


@bounded
@given(cases((torch.float64, torch.float32)), st.sampled_from([0.125, 2.0, 64.0]))
def test_scaling_all_losses_scales_risks_as_the_equations_say(case: Case, factor: float) -> None:
    """E is of degree 1 in the gradients under the root and of degree 0 without; R = E / B of degree 0, R = E like E."""
    options = case.options._replace(eps=1e-30)
    case = replace(case, options=options)
    layout, plain = ParamLayout(case.numels), case.run()
    scaled = case.state(plain.sq_grad_sum.dtype)
    degree = 1 if options.fisher == "sqrt" else 0
    # So that raw risks of degree 1 move the weights alike.
    step = options.robust_step_size / (factor if degree and not options.relative else 1.0)
    for grads in case.steps():
        F.fused_step_(
            [grad * factor for grad in grads],
            layout,
            scaled,
            options._replace(robust_step_size=step),
        )
    expected = plain.excess_risk * factor**degree
    torch.testing.assert_close(scaled.excess_risk, expected, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(scaled.task_weights, plain.task_weights, rtol=1e-4, atol=0)


@st.composite
def balancer_options(draw: st.DrawFn) -> dict[str, Any]:
    num_tasks = draw(st.integers(1, 5))
    options = draw(option_sets(num_tasks))._asdict()
    total = options.pop("weight_total")
    return {
        **options,
        "num_tasks": num_tasks,
        "weight_scale": "simplex" if total == 1.0 else "num_tasks",
        "head_weighting": draw(st.sampled_from(["none", "task_weights"])),
        "update_every": draw(st.integers(1, 3)),
    }


def train(problem: Any, balancer: ExcessMTL, steps: range, absent: int, how: str) -> None:
    """Task ``absent``, if there is one of that number, is without labels in every second step."""
    optimizer = torch.optim.SGD(problem.parameters(), lr=0.02)
    for step in steps:
        optimizer.zero_grad()
        losses = [
            None if task == absent and step % 2 and balancer.num_tasks > 1 else loss
            for task, loss in enumerate(problem.losses())
        ]
        if how == "streaming":
            present = [task for task, loss in enumerate(losses) if loss is not None]
            for task in present:
                balancer.accumulate(task, losses[task], retain_graph=task != present[-1])
            balancer.finish()
        elif how == "forward":
            balancer(losses).backward()
        else:
            balancer.backward(losses)
        optimizer.step()


@bounded
@given(balancer_options(), st.integers(0, 4), st.sampled_from(["streaming", "forward"]))
def test_streaming_and_the_scalar_equal_plain_steps(
    options: dict[str, Any], absent: int, how: str
) -> None:
    runs = []
    for verb in ("backward", how):
        problem = make_problem(options["num_tasks"], dtype=torch.float64)
        balancer = published(problem.encoder.parameters(), **options)
        train(problem, balancer, range(6), absent, verb)
        runs.append([balancer.task_weights, balancer.excess_risk, *problem.parameters()])
    for plain, other in zip(*runs, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-12)


@bounded
@given(balancer_options(), st.integers(0, 4), st.integers(0, 6))
def test_save_load_continue_equals_continue(
    options: dict[str, Any], absent: int, num_before: int
) -> None:
    problem = make_problem(options["num_tasks"])
    balancer = published(problem.encoder.parameters(), **options)
    train(problem, balancer, range(num_before), absent, "backward")
    file = io.BytesIO()
    torch.save(balancer.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(problem)
    resumed = published(again.encoder.parameters(), **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    steps = range(num_before, num_before + 4)
    train(problem, balancer, steps, absent, "backward")
    train(again, resumed, steps, absent, "backward")
    assert_equal_bits(
        [*resumed.state_tensors().values(), *again.parameters()],
        [*balancer.state_tensors().values(), *problem.parameters()],
    )
