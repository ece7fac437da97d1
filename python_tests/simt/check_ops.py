"""Calls the CUDA ops on CPU tensors, over simt.h, and compares them with the reference. Run by test_cuda_simt.py.

usage: check_ops.py LIBRARY [CHECK...]

Prints one JSON object: the name of every check that was asked for, all by default, and "" or what went wrong. A process
of its own, since the library takes the names that the installed ops have.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a program too
from simt import op_pairs
from simt.op_pairs import (
    DTYPES,
    MOMENTUM,
    NUMELS,
    Pair,
    acc_of,
    outputs_like,
    reference,
    step_and_combine_both_ways,
)


def check_every_dtype_and_fisher() -> None:
    for dtype in DTYPES:
        for options in (
            {},
            MOMENTUM,
            {"gradient_momentum": 0.5},
            {"sqrt_fisher": False, "relative": False},
        ):
            pair = Pair(3, NUMELS, acc_of(dtype), **options)
            for step in range(3):
                grads = pair.grads(dtype, step)
                pair.step(grads)
                pair.compare()
                pair.combine(grads, dtype, accumulate=step == 1)


def check_task_counts() -> None:
    for num_tasks in (1, 2, 7, 64, 512):
        pair = Pair(num_tasks, [40, 3], torch.float32, min_weight=0.1 / num_tasks, weight_total=3.0)
        for step in range(3):
            grads = pair.grads(torch.float32, step)
            pair.step(grads)
            pair.combine(grads, torch.float32)
        pair.compare()


def check_mixed_dtypes_take_the_widest() -> None:
    for dtypes, acc in (
        ([torch.bfloat16, torch.float32], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float64, torch.float32, torch.float16], torch.float64),
        ([torch.float32], torch.float64),
    ):
        pair = Pair(3, NUMELS, acc, **MOMENTUM)
        for step in range(3):
            grads = pair.grads(dtypes, step)
            pair.step(grads)
            for output in DTYPES:
                pair.combine(grads, output, accumulate=True)
        pair.compare()


def check_strided_and_unaligned_gradients() -> None:
    pair = Pair(3, NUMELS, torch.float32)
    for step in range(2):
        grads = pair.grads(torch.float32, step)
        strided = [torch.stack([grad, grad], dim=1)[:, 0] for grad in grads]
        shifted = [
            torch.cat([grad.new_zeros(k % 4), grad])[k % 4 :] for k, grad in enumerate(grads)
        ]
        for variant in (strided, shifted):
            pair.step(variant)
            pair.combine(variant, torch.float32)
    pair.compare()


def check_absent_tensors_and_tasks() -> None:
    for options in ({}, MOMENTUM):
        pair = Pair(4, NUMELS, torch.float32, **options)
        for step in range(4):
            grads = pair.grads(torch.float32, step)
            for k in range(len(grads)):
                if k // len(NUMELS) == step or k % 5 == 2:
                    grads[k] = torch.empty(0)
            pair.step(grads)
            pair.compare()
            pair.combine(grads, torch.float32, accumulate=step % 2 == 0)


def check_no_task_at_all_launches_nothing() -> None:
    for numels in (NUMELS, [0], []):
        pair = Pair(2, numels, torch.float32)
        pair.states[0]["found_nonfinite"].fill_(True)
        pair.states[1]["found_nonfinite"].fill_(True)
        before = op_pairs.library.simt_num_launches()
        pair.step([torch.empty(0)] * (2 * len(numels)))
        assert op_pairs.library.simt_num_launches() == before
        pair.compare()
        pair.combine([torch.empty(0)] * (2 * len(numels)), torch.float32)


def check_nonfinite_steps_change_nothing() -> None:
    for dtype in DTYPES:
        for options in ({}, MOMENTUM):
            for bad in (math.inf, math.nan, 1e25 if dtype == torch.float32 else -math.inf):
                pair = Pair(3, NUMELS, acc_of(dtype), **options)
                for step in range(4):
                    grads = pair.grads(dtype, step)
                    before = {name: tensor.clone() for name, tensor in pair.states[0].items()}
                    if step == 2:
                        grads[len(NUMELS)][17::31] = bad
                    pair.step(grads)
                    pair.compare()
                    pair.combine(grads, dtype, in_place=step % 2 == 0)
                    pair.compare()
                    for name in set(before) - {"found_nonfinite", "num_skipped_steps"}:
                        assert step != 2 or torch.equal(pair.states[0][name], before[name]), name
                assert int(pair.states[0]["num_skipped_steps"]) == 1


def check_no_outputs_and_outputs_without_state() -> None:
    pair = Pair(2, NUMELS, torch.float32, **MOMENTUM)
    grads = pair.grads(torch.float32, 0)
    grads[0][3] = float("inf")
    pair.step(grads)
    pair.combine(grads, torch.float32, with_outputs=False)
    pair.compare()
    pair = Pair(2, NUMELS, torch.float32)
    pair.combine(pair.grads(torch.bfloat16, 0), torch.bfloat16, with_state=False)


def check_rows_are_not_written_where_another_rank_is_at_fault() -> None:
    for faulty in range(4):  # none is task 3
        pair, flags = Pair(3, NUMELS, torch.float32), torch.arange(3) == faulty
        grads, sums = pair.grads(torch.float32, 0), torch.zeros(3, dtype=torch.float64)
        for ops, state in pair.sides():
            ops.accumulate_excess_risk_(
                grads, pair.param_numels, pair.chunk_map, None, state["sq_grad_sum"], state["grad_mean"], sums,
                state["ticket"], sqrt_fisher=True, eps=1e-7, gradient_momentum=0.0, known_nonfinite=flags,
            )  # fmt: skip
            assert bool(state["sq_grad_sum"].any()) == (faulty == 3)
            assert torch.equal(sums.isnan(), flags)
        pair.compare()


def check_grad_scale() -> None:
    for scale in (torch.tensor([1024.0]), torch.tensor(3.0, dtype=torch.float64)):
        pair = Pair(2, NUMELS, torch.float32, **MOMENTUM)
        for step in range(3):
            grads = [grad * scale.float() for grad in pair.grads(torch.float32, step)]
            if step == 1:
                grads[0][5] = float("inf")
            pair.step(grads, scale)
            pair.compare()
            pair.combine(grads, torch.float32, grad_scale=scale)
            pair.compare()


def check_pointer_tables_of_every_size() -> None:
    # 448 and 4,031 pointers fit into the two sizes of arguments; combine_ carries the outputs too.
    for num_tensors in (223, 224, 225, 447, 448, 449, 2015, 2016, 2600):
        pair = Pair(2, [1 + k % 5 for k in range(num_tensors)], torch.float32)
        for step in range(2):
            grads = pair.grads(torch.float32, step)
            pair.step(grads)
            pair.combine(grads, torch.float32)
        pair.compare()


def check_outputs_left_out() -> None:
    pair = Pair(2, NUMELS, torch.float32)
    for step in range(3):
        grads = pair.grads(torch.float32, step)
        if step == 2:
            grads[0][0] = float("nan")
        pair.step(grads)
        results = []
        for ops, state in pair.sides():
            outputs = [torch.zeros(n if k % 2 else 0) for k, n in enumerate(NUMELS)]
            ops.combine_(
                grads, outputs, pair.param_numels, pair.chunk_map, None, state["task_weights"],
                state["found_nonfinite"], state["sq_grad_sum"], state["grad_mean"],
                gradient_momentum=0.0, accumulate=False,
            )  # fmt: skip
            results.append(outputs)
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
        pair.compare()


def check_two_launches_per_step_and_one_for_combine() -> None:
    pair = Pair(7, NUMELS, torch.float32)
    ops, state = torch.ops.excessmtl_ext, pair.states[0]
    grads = pair.grads(torch.float32, 0)
    before = op_pairs.library.simt_num_launches()
    ops.fused_step_(grads, pair.param_numels, pair.chunk_map, None, *state.values(), **pair.options)
    assert op_pairs.library.simt_num_launches() == before + 2
    pair.combine(grads, torch.float32)
    assert op_pairs.library.simt_num_launches() == before + 3


def check_parts_equal_the_fused_step() -> None:
    for options in ({}, MOMENTUM):
        pair = Pair(5, NUMELS, torch.float32, **options)
        fused, parts = pair.states
        keywords = pair.options
        for step in range(4):
            grads = pair.grads(torch.float32, step)
            if step == 2:
                grads[0][0] = float("inf")
            if step == 1:
                grads[: len(NUMELS)] = [torch.empty(0)] * len(NUMELS)
            tasks = [task for task in range(5) if step != 1 or task != 0]
            ops = torch.ops.excessmtl_ext
            common = (grads, pair.param_numels, pair.chunk_map, None)
            ops.fused_step_(*common, *fused.values(), **keywords)
            sums = torch.full((5,), -1.0, dtype=torch.float64)
            elements = {
                name: keywords[name] for name in ("sqrt_fisher", "eps", "gradient_momentum")
            }
            ops.accumulate_excess_risk_(
                *common, parts["sq_grad_sum"], parts["grad_mean"], sums, parts["ticket"], **elements
            )
            assert step != 1 or float(sums[0]) == -1.0
            parts["found_nonfinite"].zero_()
            ops.update_task_risks_(
                sums, tasks, *(parts[name] for name in list(parts)[2:5]), parts["num_steps"],
                parts["num_task_steps"], parts["found_nonfinite"],
                raw_risk_scale=1.0 if keywords["sqrt_fisher"] else 1.0 / sum(NUMELS),
                **{name: keywords[name] for name in ("gradient_momentum", "num_warmup_steps", "relative")},
            )  # fmt: skip
            ops.update_task_weights_(
                tasks, parts["relative_excess_risk"], parts["log_task_weights"], parts["task_weights"],
                parts["num_steps"], parts["num_skipped_steps"], parts["found_nonfinite"],
                **{n: keywords[n] for n in ("robust_step_size", "num_warmup_steps", "min_weight", "weight_total")},
            )  # fmt: skip
            for name, tensor in fused.items():
                assert torch.equal(tensor, parts[name]), name


def check_one_cooperative_launch_equals_the_two_ops() -> None:
    for dtype in DTYPES:
        for options in ({}, MOMENTUM, {"gradient_momentum": 0.5}, {"sqrt_fisher": False}):
            pair = Pair(3, NUMELS, acc_of(dtype), **options)
            for step in range(5):
                grads = pair.grads(dtype, step)
                if step == 2:
                    grads[len(NUMELS)][17::31] = float("inf")
                if step == 3:
                    grads[: len(NUMELS)] = [torch.empty(0, dtype=dtype)] * len(NUMELS)
                launches = step_and_combine_both_ways(
                    pair,
                    grads,
                    lambda pair=pair, dtype=dtype: outputs_like(pair, dtype),
                    in_place=step in (0, 2),
                    accumulate=step == 1,
                )
                assert launches == 1, (dtype, options, step, launches)
            assert int(pair.states[0]["num_skipped_steps"]) == 1


def check_one_cooperative_launch_equals_the_reference() -> None:
    scale = torch.tensor([8.0])
    for options in ({}, MOMENTUM):
        pair = Pair(3, NUMELS, torch.float32, **options)
        for step in range(4):
            grads = [grad * 8.0 for grad in pair.grads(torch.float32, step)]
            if step == 2:
                grads[5][1] = float("nan")
            results = []
            for ops, state in pair.sides():
                outputs = outputs_like(pair, torch.float32)
                ops.fused_step_combine_(
                    grads, outputs, pair.param_numels, pair.chunk_map, scale, *state.values(),
                    **pair.options, accumulate=step == 1,
                )  # fmt: skip
                results.append(outputs)
            pair.compare()
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4, equal_nan=True)


def check_one_cooperative_launch_for_mixed_strided_and_unaligned_gradients() -> None:
    pair = Pair(3, NUMELS, torch.float32)
    for step, variant in enumerate(("mixed", "strided", "shifted")):
        grads = pair.grads(torch.float32, step)
        if variant == "mixed":
            grads = pair.grads([torch.bfloat16, torch.float32], step)
        elif variant == "strided":
            grads = [torch.stack([grad, grad], dim=1)[:, 0] for grad in grads]
        else:
            grads = [
                torch.cat([grad.new_zeros(k % 4), grad])[k % 4 :] for k, grad in enumerate(grads)
            ]
        outputs = outputs_like(pair, torch.float32)
        outputs[0], outputs[3] = torch.empty(0), torch.cat([torch.zeros(1), outputs[3]])[1:]
        copies = lambda outputs=outputs: [output.clone() for output in outputs]  # noqa: E731
        assert step_and_combine_both_ways(pair, grads, copies) == 1, variant


def check_three_launches_where_one_does_not_fit_or_does_not_help() -> None:
    # T * P of float32: 114 KiB. Of L2 they may take half.
    grad_bytes = 3 * sum(NUMELS) * 4

    def launches(
        numels: list[int] = NUMELS,
        num_tasks: int = 3,
        output_dtype: torch.dtype = torch.float32,
        blocks_per_sm: int = 4,
        l2_bytes: int = 32 << 20,
        launches_cooperatively: bool = True,
    ) -> int:
        op_pairs.library.simt_configure(1, 4, 0.002, 2)
        op_pairs.library.simt_configure_device(blocks_per_sm, l2_bytes, launches_cooperatively)
        pair = Pair(num_tasks, numels, torch.float32, **MOMENTUM)
        counts = set()
        for step in range(3):
            grads = pair.grads(torch.float32, step)
            if step == 1:
                grads[0][0] = float("nan")
            counts.add(
                step_and_combine_both_ways(pair, grads, lambda: outputs_like(pair, output_dtype))
            )
        assert len(counts) == 1, counts
        return counts.pop()

    assert launches() == 1
    assert launches(l2_bytes=2 * grad_bytes) == 1
    assert launches(l2_bytes=2 * grad_bytes - 2) == 3
    assert launches(launches_cooperatively=False) == 3
    assert launches(output_dtype=torch.bfloat16) == 3
    assert launches(output_dtype=torch.float64) == 3
    assert launches(num_tasks=8) == 1  # one block each: 2 SMs hold 8
    assert launches(num_tasks=9) == 3
    assert launches(num_tasks=3, blocks_per_sm=1) == 3
    # 448 pointers travel with a cooperative launch, gradients and outputs.
    assert launches(numels=[3] * 112) == 1
    assert launches(numels=[3] * 113) == 3


def check_one_op_without_outputs_or_without_tasks() -> None:
    pair = Pair(2, NUMELS, torch.float32, **MOMENTUM)
    for step in range(3):
        grads = pair.grads(torch.float32, step)
        if step == 1:
            grads[0][3] = float("inf")
        assert step_and_combine_both_ways(pair, grads, list) == 1
    for state in pair.states:
        state["found_nonfinite"].fill_(True)
    nothing = [torch.empty(0)] * (2 * len(NUMELS))
    launches = step_and_combine_both_ways(pair, nothing, lambda: outputs_like(pair, torch.float32))
    assert launches == 1  # combine_ alone, which writes zeros
    for numels in ([0], []):
        pair = Pair(2, numels, torch.float32)
        nothing = [torch.empty(0)] * (2 * len(numels))
        launches = step_and_combine_both_ways(
            pair, nothing, lambda pair=pair: outputs_like(pair, torch.float32)
        )
        assert launches == 0


def check_streaming_fold() -> None:
    for dtype in DTYPES:
        acc = acc_of(dtype)
        pair = Pair(4, NUMELS, acc)
        grads = pair.grads(dtype, 0)
        padded = pair.states[0]["sq_grad_sum"].shape[1]
        ends = []
        for ops in (torch.ops.excessmtl_ext, reference):
            total = torch.zeros(padded, dtype=acc)
            log_max = torch.full((), -math.inf, dtype=torch.float64)
            for task, log_weight in enumerate((-1.0, 3.0, 2.0, 700.0)):
                row = grads[task * len(NUMELS) : (task + 1) * len(NUMELS)]
                row = [
                    torch.empty(0) if (k + task) % 3 == 0 else grad for k, grad in enumerate(row)
                ]
                weight = torch.tensor(log_weight, dtype=torch.float64)
                ops.fold_(row, pair.param_numels, pair.chunk_map, weight, total, log_max)
                ends += [total.clone(), log_max.clone()]
        for ours, theirs in zip(ends[: len(ends) // 2], ends[len(ends) // 2 :], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def bfloat16_state_of(momentum: bool) -> Pair:
    """Options of few digits: float32 arithmetic rounds at most once, so every stored bit can be compared."""
    options = {"gradient_momentum": 0.5} if momentum else {"sqrt_fisher": False}
    return Pair(3, NUMELS, torch.bfloat16, **options, rounding_seed=17)


def check_bfloat16_state_is_rounded_as_in_the_reference() -> None:
    """Also a skipped step, outputs of every type, and float16 gradients, which are widened."""
    for momentum in (False, True):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            pair = bfloat16_state_of(momentum)
            for step in range(4):
                grads = [g.bfloat16().to(dtype) for g in pair.grads(torch.float32, step)]
                if step == 1:
                    grads[:5] = [torch.empty(0)] * 5
                if step == 2:
                    grads[len(NUMELS)][17::31] = float("inf")
                plan = (pair.param_numels, pair.chunk_map, None)
                for ops, state in pair.sides():
                    outputs = outputs_like(pair, DTYPES[step])
                    ops.fused_step_combine_(
                        grads, outputs, *plan, *state.values(), **pair.options, accumulate=True
                    )
                ours, theirs = pair.states
                for name in ("sq_grad_sum", "grad_mean", "num_steps", "num_skipped_steps"):
                    assert torch.equal(ours[name], theirs[name]), (name, dtype, step)
                torch.testing.assert_close(
                    ours["task_weights"], theirs["task_weights"], rtol=1e-5, atol=1e-9
                )
            assert int(pair.states[0]["num_skipped_steps"]) == 1


def check_rows_of_bfloat16_state_know_their_task() -> None:
    pair = bfloat16_state_of(True)
    fused, parts = pair.states
    ops = torch.ops.excessmtl_ext
    plan = (pair.param_numels, pair.chunk_map, None)
    for step in range(2):
        grads = pair.grads(torch.float32, step)
        sums = torch.zeros(3, dtype=torch.float64)
        for task in range(3):
            row = slice(task, task + 1)
            own = grads[task * len(NUMELS) : (task + 1) * len(NUMELS)]
            source = {
                "num_steps": fused["num_steps"].clone(),
                "num_skipped_steps": fused["num_skipped_steps"].clone(),
                "rounding_seed": 17,
                "first_task": task,
            }
            ops.accumulate_excess_risk_(
                own, *plan, parts["sq_grad_sum"][row], parts["grad_mean"][row], sums[row], parts["ticket"],
                sqrt_fisher=True, eps=1e-7, gradient_momentum=0.5, **source,
            )  # fmt: skip
        ops.fused_step_(grads, *plan, *fused.values(), **pair.options)
        assert torch.equal(parts["sq_grad_sum"], fused["sq_grad_sum"])
        assert torch.equal(parts["grad_mean"], fused["grad_mean"])
    try:
        ops.accumulate_excess_risk_(
            grads, *plan, parts["sq_grad_sum"], parts["grad_mean"], torch.zeros(3, dtype=torch.float64),
            parts["ticket"], sqrt_fisher=True, eps=1e-7, gradient_momentum=0.5,
        )  # fmt: skip
    except RuntimeError as error:
        assert "Expected `num_steps`" in str(error)
    else:
        raise AssertionError("rows without their step were accepted")


def check_equal_bits_under_every_schedule() -> None:
    first = None
    for seed, sms in ((1, 1), (2, 3), (3, 16), (4, 100)):
        op_pairs.library.simt_configure(seed, 1 + 3 * seed, 0.01, sms)
        torch.manual_seed(5)
        pair = Pair(3, NUMELS, torch.float32, **MOMENTUM)
        for step in range(3):
            pair.step(pair.grads(torch.float32, step))
        bits = [tensor.clone() for tensor in pair.states[0].values()]
        outputs = outputs_like(pair, torch.float32)
        one = torch.ops.excessmtl_ext.fused_step_combine_
        for step in range(2):
            grads = pair.grads(torch.float32, step)
            launches = op_pairs.library.simt_num_launches()
            one(
                grads, outputs, pair.param_numels, pair.chunk_map, None, *pair.states[0].values(),
                **pair.options, accumulate=True,
            )  # fmt: skip
            assert op_pairs.library.simt_num_launches() == launches + 1
        bits += [*pair.states[0].values(), *outputs]
        first = first or bits
        assert all(torch.equal(a, b) for a, b in zip(first, bits, strict=True))


def check_bad_arguments_change_nothing() -> None:
    pair = Pair(2, NUMELS, torch.float32)
    ours = pair.states[0]
    before = {name: tensor.clone() for name, tensor in ours.items()}
    grads = pair.grads(torch.float32, 0)

    def step(
        message: str,
        changed_grads: list[Tensor] = grads,
        plan: Tensor | None = None,
        **changed: Any,
    ) -> None:
        state = ours | {name: value for name, value in changed.items() if name in ours}
        options = pair.options | {
            name: value for name, value in changed.items() if name in pair.options
        }
        plan = pair.chunk_map if plan is None else plan
        try:
            torch.ops.excessmtl_ext.fused_step_(
                changed_grads,
                pair.param_numels,
                plan,
                changed.get("grad_scale"),
                *state.values(),
                **options,
            )
        except RuntimeError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"no error about {message}")
        for name, tensor in before.items():
            assert torch.equal(ours[name], tensor), name

    def step_and_combine(message: str, outputs: list[Tensor], **changed: Any) -> None:
        state = ours | {name: value for name, value in changed.items() if name in ours}
        plan = (pair.param_numels, changed.get("plan", pair.chunk_map), None)
        try:
            torch.ops.excessmtl_ext.fused_step_combine_(
                changed.get("grads", grads), outputs, *plan, *state.values(), **pair.options, accumulate=False
            )  # fmt: skip
        except RuntimeError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"no error about {message}")
        for name, tensor in before.items():
            assert torch.equal(ours[name], tensor), name
        assert all(bool((output == 0.5).all()) for output in outputs)

    halves = outputs_like(pair, torch.float32)
    step_and_combine("`outputs`", halves[:-1])
    step_and_combine("`outputs` 0", [halves[0][:-1], *halves[1:]])
    step_and_combine("`outputs` 0", [torch.full((10_000,), 0.5)[::2], *halves[1:]])
    step_and_combine("`task_grads`", halves, grads=grads[:-1])
    step_and_combine("`ticket`", halves, ticket=torch.zeros(2, dtype=torch.int32))
    step_and_combine("`chunk_map`", halves, plan=pair.chunk_map[:-9])
    padded = ours["sq_grad_sum"].shape[1]
    step("`task_grads`", grads[:-1])
    step("`task_grads`", [grads[0][:-1], *grads[1:]])
    step("`task_grads`", [grads[0].int(), *grads[1:]])
    step("float64 gradients", [grads[0].double(), *grads[1:]])
    step("`chunk_map`", plan=pair.chunk_map[:-9])
    step("`chunk_map`", plan=torch.empty(0, dtype=torch.int64))
    step("`sq_grad_sum`", sq_grad_sum=torch.zeros(2, padded - 32))
    step("`sq_grad_sum`", sq_grad_sum=torch.zeros(2 * padded + 1)[1:].view(2, padded))
    step("`grad_mean`", gradient_momentum=0.5)
    step("`ticket`", ticket=torch.zeros(2, dtype=torch.int32))
    step("`excess_risk`", excess_risk=torch.zeros(2))
    step("`found_nonfinite`", found_nonfinite=torch.zeros(3, dtype=torch.bool))
    step("`grad_scale`", grad_scale=torch.ones(2))
    step("`eps`", eps=0.0)
    step("`min_weight`", min_weight=0.6)


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}
# A library that is compiled with -DONLY_FLOAT32 passes the others.
NEED_OTHER_DTYPES = {
    "check_every_dtype_and_fisher",
    "check_mixed_dtypes_take_the_widest",
    "check_nonfinite_steps_change_nothing",
    "check_one_cooperative_launch_equals_the_two_ops",
    "check_bfloat16_state_is_rounded_as_in_the_reference",
    "check_rows_of_bfloat16_state_know_their_task",
}


def main() -> None:
    torch.ops.load_library(sys.argv[1])
    op_pairs.library = ctypes.CDLL(sys.argv[1])
    op_pairs.library.simt_configure.argtypes = [
        ctypes.c_uint64,
        ctypes.c_uint,
        ctypes.c_double,
        ctypes.c_uint,
    ]
    op_pairs.library.simt_configure_device.argtypes = [ctypes.c_uint, ctypes.c_uint, ctypes.c_bool]
    op_pairs.library.simt_num_launches.restype = ctypes.c_uint64
    results = {}
    for name in sys.argv[2:] or CHECKS:
        op_pairs.library.simt_configure(1, 4, 0.002, 2)
        torch.manual_seed(0)
        try:
            CHECKS[name]()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
