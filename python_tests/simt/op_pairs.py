"""The CUDA ops on CPU tensors beside their reference: the same steps on two states, compared."""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

if (
    "excessmtl_ext" not in sys.modules
):  # as a script: the library under test takes the names of the ops
    os.environ["EXCESSMTL_DISABLE_OPS"] = "1"
from excessmtl_ext import reference as twins
from excessmtl_ext.state import ParamLayout, StepOptions, StepState, padded_numel

CHUNK_NUMEL = 4096
NUMELS = [5000, 7, 0, 33, 1023, 1024, 2500, 1]
OPTIONS: dict[str, Any] = {
    "sqrt_fisher": True,
    "eps": 1e-7,
    "gradient_momentum": 0.0,
    "robust_step_size": 0.3,
    "num_warmup_steps": 1,
    "relative": True,
    "min_weight": 0.0,
    "weight_total": 1.0,
}
MOMENTUM = {"gradient_momentum": 0.9, "sqrt_fisher": False}


class FlatTwins:
    """The twins under the schemas of the ops, so that one call serves both."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        twin = getattr(twins, name)
        names = [a.name for a in getattr(torch.ops.excessmtl_ext, name).default._schema.arguments]

        def call(*args: Any, **keywords: Any) -> None:
            values = {**dict(zip(names, args, strict=False)), **keywords}
            if "param_numels" in values:
                values["layout"] = ParamLayout(values["param_numels"].tolist())
            has_state = values.get("num_steps") is not None or name == "combine_"
            fields = [values.get(field) for field in StepState._fields]
            values["state"] = StepState(*fields) if has_state else None  # type: ignore[arg-type]
            given = {field: values[field] for field in StepOptions._fields if field in values}
            fisher = "sqrt" if values.get("sqrt_fisher") else "linear"
            values["options"] = StepOptions(**{**given, "fisher": fisher})
            wanted = inspect.signature(twin).parameters
            twin(**{key: value for key, value in values.items() if key in wanted})

        return call


reference = FlatTwins()
library: Any = None
"""The compiled shim with the ops, which check_ops.py loads."""


def chunk_map(numels: list[int], chunk_numel: int = CHUNK_NUMEL) -> Tensor:
    ends = torch.tensor([padded_numel(n) for n in numels], dtype=torch.int64).cumsum(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    starts = torch.arange(-(-int(offsets[-1]) // chunk_numel)) * chunk_numel
    head = torch.tensor([chunk_numel, len(starts), len(numels), int(offsets[-1])])
    first_segments = torch.searchsorted(ends, starts, right=True)
    return torch.cat([head, offsets, torch.tensor(numels, dtype=torch.int64), first_segments])


class Pair:
    """The same step state twice: one half for the CUDA ops, the other for the reference."""

    def __init__(self, num_tasks: int, numels: list[int], acc: torch.dtype, **options: Any) -> None:
        self.num_tasks, self.numels = num_tasks, numels
        self.options = OPTIONS | options
        self.param_numels = torch.tensor(numels, dtype=torch.int64)
        self.chunk_map = chunk_map(numels)
        padded = sum(padded_numel(n) for n in numels)
        momentum = self.options["gradient_momentum"] > 0
        vector = {"dtype": torch.float64}
        total = self.options["weight_total"]
        ours = {
            "sq_grad_sum": torch.zeros(num_tasks, padded, dtype=acc),
            "grad_mean": torch.zeros(num_tasks, padded if momentum else 0, dtype=acc),
            "excess_risk": torch.zeros(num_tasks, **vector),
            "relative_excess_risk": torch.zeros(num_tasks, **vector),
            "baseline_excess_risk": torch.zeros(num_tasks, **vector),
            "log_task_weights": torch.full((num_tasks,), -math.log(num_tasks), **vector),
            "task_weights": torch.full((num_tasks,), total / num_tasks, **vector),
            "num_steps": torch.zeros((), dtype=torch.int64),
            "num_task_steps": torch.zeros(num_tasks, dtype=torch.int64),
            "num_skipped_steps": torch.zeros((), dtype=torch.int64),
            "found_nonfinite": torch.zeros(num_tasks, dtype=torch.bool),
            "ticket": torch.zeros(1, dtype=torch.int32),
        }
        self.states = (ours, {name: tensor.clone() for name, tensor in ours.items()})

    def sides(self):
        return zip((torch.ops.excessmtl_ext, reference), self.states, strict=True)

    def grads(self, dtype: torch.dtype | list[torch.dtype], step: int) -> list[Tensor]:
        dtypes = dtype if isinstance(dtype, list) else [dtype]
        return [
            (torch.randn(n) * (1 + 0.5 * ((task * 7 + 3 * step) % 5))).to(
                dtypes[(task + k) % len(dtypes)]
            )
            for task in range(self.num_tasks)
            for k, n in enumerate(self.numels)
        ]

    def step(self, grads: list[Tensor], grad_scale: Tensor | None = None) -> None:
        for ops, state in self.sides():
            ops.fused_step_(
                grads,
                self.param_numels,
                self.chunk_map,
                grad_scale,
                *state.values(),
                **self.options,
            )

    def combine(
        self,
        grads: list[Tensor],
        dtype: torch.dtype,
        *,
        accumulate: bool = False,
        in_place: bool = False,
        grad_scale: Tensor | None = None,
        with_outputs: bool = True,
        with_state: bool = True,
    ) -> None:
        results = []
        for ops, state in self.sides():
            mine = [grad.clone() for grad in grads] if in_place else grads
            outputs = (
                [torch.full((n,), 0.5, dtype=dtype) for n in self.numels] if with_outputs else []
            )
            if in_place:
                outputs = [mine[k] for k in range(len(self.numels))]
            rows = (state["sq_grad_sum"], state["grad_mean"])
            if not with_state:
                rows = (torch.empty(self.num_tasks, 0), torch.empty(self.num_tasks, 0))
            ops.combine_(
                mine, outputs, self.param_numels, self.chunk_map, grad_scale, state["task_weights"],
                state["found_nonfinite"], *rows,
                gradient_momentum=self.options["gradient_momentum"] if with_state else 0.0,
                accumulate=accumulate,
            )  # fmt: skip
            results.append(outputs)
        for ours, theirs in zip(*results, strict=True):
            # Two orders of addition may round a 16-bit result to neighbours; weights are no better than the state.
            tolerance = {
                torch.float64: 1e-11,
                torch.float32: 1e-5,
                torch.float16: 2e-3,
                torch.bfloat16: 1.6e-2,
            }
            rtol = max(tolerance[ours.dtype], tolerance[self.states[0]["sq_grad_sum"].dtype])
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol, equal_nan=True)

    def compare(self) -> None:
        ours, theirs = self.states
        rtol = 1e-11 if ours["sq_grad_sum"].dtype == torch.float64 else 2e-5
        for name, tensor in ours.items():
            torch.testing.assert_close(
                tensor,
                theirs[name],
                rtol=rtol,
                atol=rtol,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def acc_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def step_and_combine_both_ways(
    pair: Pair, grads: list[Tensor], make_outputs: Any, in_place: bool = False, **keywords: Any
) -> int:
    """One op on one half of ``pair``, two ops on the other: equal bits. Returns the launches of the one op."""
    ops = torch.ops.excessmtl_ext
    plan = (pair.param_numels, pair.chunk_map, keywords.pop("grad_scale", None))
    accumulate = keywords.pop("accumulate", False)
    together, apart = pair.states
    results = []
    for _ in pair.states:
        mine = [grad.clone() for grad in grads] if in_place else grads
        results.append((mine, mine[: len(pair.numels)] if in_place else make_outputs()))
    (mine, outputs), (other, expected) = results
    before = library.simt_num_launches()
    ops.fused_step_combine_(
        mine, outputs, *plan, *together.values(), **pair.options, accumulate=accumulate
    )
    launches = library.simt_num_launches() - before
    ops.fused_step_(other, *plan, *apart.values(), **pair.options)
    ops.combine_(
        other, expected, *plan, apart["task_weights"], apart["found_nonfinite"], apart["sq_grad_sum"],
        apart["grad_mean"], gradient_momentum=pair.options["gradient_momentum"], accumulate=accumulate,
    )  # fmt: skip
    for name, tensor in together.items():
        assert torch.equal(tensor, apart[name]), name
    for left, right in zip(outputs, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
    return launches


def outputs_like(pair: Pair, dtype: torch.dtype) -> list[Tensor]:
    return [torch.full((n,), 0.5, dtype=dtype) for n in pair.numels]
