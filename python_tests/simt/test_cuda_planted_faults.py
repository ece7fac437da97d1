"""Plants one-line faults into copies of the CUDA kernels, and shows that the host runs of test_cuda_simt.py catch each.

A fault that survives is a hole in those tests. Faults that only memory ordering can show run under ThreadSanitizer.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from simt import build

pytestmark = pytest.mark.slow


CPU_SECONDS = 300
"""Of a program without a fault: seconds. One that uses so much, on however busy a machine, does not end."""


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    line: str
    """Found exactly once in the file."""
    planted: str
    threads: bool = False
    """Seen by one OS thread per CUDA thread under ThreadSanitizer, not by the fibers."""
    bfloat16_state: bool = False
    """Shows in bfloat16 state alone, which is left out otherwise: a third of the time."""


FAULTS = [
    # block_sum.cuh
    Fault(
        "no barrier before the warp sums are overwritten",
        "block_sum.cuh",
        "  __syncthreads();  // another warp may still read warp_values of the call before\n",
        "",
    ),
    Fault(
        "no barrier before the warp sums are read",
        "block_sum.cuh",
        "    warp_values[threadIdx.x / kWarpSize] = value;\n  }\n  __syncthreads();\n",
        "    warp_values[threadIdx.x / kWarpSize] = value;\n  }\n",
    ),
    Fault(
        "shuffle over half a warp",
        "block_sum.cuh",
        "int distance = kWarpSize / 2; distance > 0",
        "int distance = kWarpSize / 4; distance > 0",
    ),
    Fault(
        "shuffle from the wrong lane",
        "block_sum.cuh",
        "__shfl_xor_sync(kFullWarp, value, distance)",
        "__shfl_xor_sync(kFullWarp, value, distance == 4 ? 2 : distance)",
    ),
    Fault(
        "shuffle names half of the lanes",
        "block_sum.cuh",
        "kFullWarp = 0xffffffffU",
        "kFullWarp = 0x0000ffffU",
    ),
    Fault(
        "last warp left out of the block sum",
        "block_sum.cuh",
        "for (int warp = 0; warp < kWarps; ++warp)",
        "for (int warp = 0; warp < kWarps - 1; ++warp)",
    ),
    Fault(
        "wrong lane writes the warp sum",
        "block_sum.cuh",
        "  value = warp_reduce<Operation>(value);\n",
        "  if (threadIdx.x % kWarpSize != 31) value = warp_reduce<Operation>(value);\n",
    ),
    # find_nonfinite.cuh
    Fault(
        "the last elements not looked at",
        "find_nonfinite.cuh",
        "at = done + index; at < numel; at += kStride",
        "at = done + index; at < numel && done == 0; at += kStride",
    ),
    Fault(
        "vectors past the batches not looked at",
        "find_nonfinite.cuh",
        "    for (; at < num_vectors; at += kStride) {",
        "    for (; at < 0; at += kStride) {",
    ),
    Fault(
        "a vector past the end looked at",
        "find_nonfinite.cuh",
        "at + (kBatch - 1) * kStride < num_vectors",
        "at + (kBatch - 2) * kStride < num_vectors",
    ),
    Fault(
        "one thread's verdict stands for the block's",
        "find_nonfinite.cuh",
        "if (__syncthreads_or(found) != 0 && threadIdx.x == 0)",
        "if (found && threadIdx.x == 0)",
    ),
    Fault(
        "flag of the wrong task",
        "find_nonfinite.cuh",
        "atomicOr(args.found_nonfinite + task, 1U)",
        "atomicOr(args.found_nonfinite, 1U)",
    ),
    Fault(
        "flag set without an atomic",
        "find_nonfinite.cuh",
        "atomicOr(args.found_nonfinite + task, 1U)",
        "args.found_nonfinite[task] |= 1U",
        threads=True,
    ),
    Fault(
        "a block looks at the flag of its own task alone",
        "find_nonfinite.cuh",
        "found |= __ldcg(args.found_nonfinite + task) != 0;",
        "found |= task == static_cast<int>(blockIdx.y) && __ldcg(args.found_nonfinite + task) != 0;",
    ),
    Fault(
        "flags past the first 256 not looked at",
        "find_nonfinite.cuh",
        "task < args.num_tasks; task += kThreads) {\n    // From L2",
        "task < args.num_tasks && task < kThreads; task += kThreads) {\n    // From L2",
    ),
    Fault(
        "square looked at with the loss scale",
        "../excess_risk_math.h",
        "  const acc_t grad = scaled_grad * inverse_scale;\n  return grad * grad",
        "  const acc_t grad = scaled_grad;\n  return grad * grad",
    ),
    Fault(
        "state written although the step does not count",
        "fused_step.cuh",
        "  const bool is_finite = !any_nonfinite(args);\n  if (is_finite) {",
        "  const bool is_finite = !any_nonfinite(args);\n  {",
    ),
    # fused_step.cuh: the ticket
    Fault(
        "ticket does not wrap",
        "fused_step.cuh",
        "atomicInc(ticket, last);",
        "atomicInc(ticket, 0xffffffffU);",
    ),
    Fault(
        "the last block but one finishes",
        "fused_step.cuh",
        "shared_verdict = ticket_number == last;",
        "shared_verdict = ticket_number + 1 == last;",
    ),
    Fault(
        "grid counted without its tasks",
        "fused_step.cuh",
        "gridDim.x * gridDim.y - 1",
        "gridDim.x - 1",
    ),
    Fault(
        "no barrier after the verdict",
        "fused_step.cuh",
        "    shared_verdict = ticket_number == last;\n  }\n  __syncthreads();\n",
        "    shared_verdict = ticket_number == last;\n  }\n",
    ),
    Fault(
        "no fence before the ticket",
        "fused_step.cuh",
        "    __threadfence();\n    // Wraps to 0",
        "    // Wraps to 0",
        threads=True,
    ),
    Fault(
        "no fence after the ticket",
        "fused_step.cuh",
        "that lets the block read on.\n    __threadfence();\n",
        "that lets the block read on.\n",
        threads=True,
    ),
    Fault(
        "ticket counted without an atomic",
        "fused_step.cuh",
        "atomicInc(ticket, last);",
        "*ticket; *ticket = *ticket == last ? 0 : *ticket + 1;",
        threads=True,
    ),
    # fused_step.cuh: the sums
    Fault(
        "partials read through the read-only path",
        "fused_step.cuh",
        "sum += __ldcg(row + chunk);",
        "sum += __ldg(row + chunk);",
    ),
    Fault(
        "partial of one chunk not written",
        "fused_step.cuh",
        "    if (threadIdx.x == 0) {\n      __stcg(args.partials",
        "    if (threadIdx.x == 1 && chunk != 1) {\n      __stcg(args.partials",
    ),
    Fault(
        "no barrier after the sums of the partials",
        "fused_step.cuh",
        "      part_sums[item] = sum;\n    }\n  }\n  __syncthreads();\n",
        "      part_sums[item] = sum;\n    }\n  }\n",
    ),
    Fault(
        "chunks past the first round left out",
        "fused_step.cuh",
        "chunk < num_chunks;\n         chunk += parts * kWarpSize",
        "chunk < num_chunks && chunk < 64;\n         chunk += parts * kWarpSize",
    ),
    Fault(
        "wrong stride from task to task",
        "fused_step.cuh",
        "const int64_t row = task * args.row_stride;",
        "const int64_t row = task * (args.row_stride - 32);",
    ),
    Fault(
        "gradients of the wrong task",
        "fused_step.cuh",
        "task * args.chunks.num_tensors;",
        "task * (args.chunks.num_tensors - 1);",
    ),
    # fused_step.cuh: the slices
    Fault(
        "tail left out",
        "fused_step.cuh",
        "  for (int at = done + index; at < numel; at += kStride) {\n    acc_t sum = State::widen",
        "  for (int at = done + index; at < numel && done == 0; at += kStride) {\n    acc_t sum = State::widen",
    ),
    Fault(
        "vector loop one vector too long",
        "fused_step.cuh",
        "    const int num_vectors = numel / kWidth;\n    int at = index;",
        "    const int num_vectors = (numel + kWidth - 1) / kWidth;\n    int at = index;",
    ),
    Fault(
        "batch of loads runs past the end",
        "fused_step.cuh",
        "at + (kBatch - 1) * kStride < num_vectors",
        "at + (kBatch - 2) * kStride < num_vectors",
    ),
    Fault(
        "alignment test inverted",
        "element_access.cuh",
        "% sizeof(vector_t) == 0;",
        "% sizeof(vector_t) != 0;",
    ),
    Fault(
        "alignment tested for 8 bytes of 16",
        "element_access.cuh",
        "% sizeof(vector_t) == 0;",
        "% (sizeof(vector_t) / 4) == 0;",
    ),
    Fault(
        "gradient written into the wrong lane of the vector",
        "element_access.cuh",
        "make_float4(in[0], in[1], in[2], in[3])",
        "make_float4(in[0], in[1], in[3], in[2])",
    ),
    # param_chunks.cuh
    Fault(
        "last segment of a chunk left out",
        "param_chunks.cuh",
        "if (offset >= end)",
        "if (offset + 32 >= end)",
    ),
    Fault(
        "short slices of one warp left out",
        "param_chunks.cuh",
        "segment % kWarps == warp",
        "segment % (kWarps + 1) == warp",
    ),
    Fault(
        "long slices walked by one warp's stride",
        "param_chunks.cuh",
        "visit(slice, Workers<kThreads>{static_cast<int>(threadIdx.x)});",
        "visit(slice, Workers<kThreads>{lane});",
    ),
    # task_updates.cuh
    Fault(
        "flag of an absent task survives",
        "task_updates.cuh",
        "      state.found_nonfinite[task] = false;\n",
        "",
    ),
    Fault(
        "a thread decides on its own task alone",
        "task_updates.cuh",
        "if (__syncthreads_or(found) != 0)",
        "if (found)",
    ),
    Fault(
        "tasks past the first 256 left out",
        "task_updates.cuh",
        "    state.task_weights[task] =\n        scaled",
        "    if (task < kThreads) state.task_weights[task] =\n        scaled",
    ),
    Fault(
        "absent tasks lose their mass",
        "task_updates.cuh",
        "(moved(task) - log_total) + log_mass;",
        "moved(task) - log_total;",
    ),
    Fault(
        "step counted before every thread has read the count",
        "task_updates.cuh",
        "  const int64_t num_steps = *state.num_steps;\n  if (num_steps >= options.num_warmup_steps) {\n",
        "  if (threadIdx.x == 0) *state.num_steps += 1;\n"
        "  const int64_t num_steps = *state.num_steps - (threadIdx.x == 0);\n"
        "  if (num_steps >= options.num_warmup_steps) {\n",
    ),
    # ../excess_risk_math.h
    Fault(
        "baseline overwritten in every step",
        "../excess_risk_math.h",
        "} else if (baseline == 0.0) {",
        "} else {",
    ),
    # ../stochastic_rounding.h and state_access.cuh
    Fault(
        "one element's random bits serve its whole vector",
        "fused_step.cuh",
        "words[k] = State::word_at(rounding, at + k);",
        "words[k] = State::word_at(rounding, at);",
        bfloat16_state=True,
    ),
    Fault(
        "cut off instead of rounded stochastically",
        "../stochastic_rounding.h",
        "magnitude < 0x7f7f0000U ? float_bits + random_16_bits : float_bits;",
        "float_bits;",
        bfloat16_state=True,
    ),
    Fault(
        "rounded to nearest instead of stochastically",
        "state_access.cuh",
        "return half == RandomHalf::kSqGradSum ? word & 0xffffU : word >> 16;",
        "return 0x8000U;",
        bfloat16_state=True,
    ),
    Fault(
        "S and m draw the same bits",
        "state_access.cuh",
        "return half == RandomHalf::kSqGradSum ? word & 0xffffU : word >> 16;",
        "return word & 0xffffU;",
        bfloat16_state=True,
    ),
    Fault(
        "every step draws the same bits",
        "state_access.cuh",
        "__ldcg(source.num_steps), source.first_task",
        "0, source.first_task",
        bfloat16_state=True,
    ),
    Fault(
        "every task draws the same bits",
        "state_access.cuh",
        "source.first_task + row);",
        "source.first_task);",
        bfloat16_state=True,
    ),
    Fault(
        "every slice draws the bits of the first",
        "fused_step.cuh",
        "slice_rounding(key, slice.position), options);",
        "slice_rounding(key, 0), options);",
        bfloat16_state=True,
    ),
    Fault(
        "the tail draws the bits of the slice's start",
        "fused_step.cuh",
        "const uint32_t word = State::word_at(rounding, at);",
        "const uint32_t word = State::word_at(rounding, at - done);",
        bfloat16_state=True,
    ),
    Fault(
        "one word of the key left out",
        "../stochastic_rounding.h",
        "  word ^= key.high;\n",
        "",
        bfloat16_state=True,
    ),
    # combine.cuh
    Fault(
        "gradients read through the read-only path although outputs may be gradients",
        "combine.cuh",
        "loaded[k] = __ldcg(grad_vectors",
        "loaded[k] = __ldg(grad_vectors",
    ),
    Fault(
        "weights not waited for",
        "combine.cuh",
        "const bool counts = __syncthreads_or(found) == 0;",
        "const bool counts = !found;",
    ),
    Fault(
        "alignment of the output not looked at",
        "combine.cuh",
        "bool is_aligned = is_aligned_for<vector_t>(output);",
        "bool is_aligned = true;",
    ),
    Fault(
        "accumulate forgotten in the tail",
        "combine.cuh",
        "    if (accumulate) {\n      sum += GradVector",
        "    if (accumulate && done == 0) {\n      sum += GradVector",
    ),
    # fused_step_combine.cuh and its launch
    Fault(
        "no grid barrier after the flags",
        "fused_step_combine.cuh",
        "  cooperative_groups::this_grid().sync();\n  run_step",
        "  run_step",
    ),
    Fault(
        "no grid barrier before the sum",
        "fused_step_combine.cuh",
        "  cooperative_groups::this_grid().sync();\n  const int64_t block",
        "  const int64_t block",
    ),
    Fault(
        "no grid barrier before the sum, as a race",
        "fused_step_combine.cuh",
        "  cooperative_groups::this_grid().sync();\n  const int64_t block",
        "  const int64_t block",
        threads=True,
    ),
    Fault(
        "blocks of absent tasks do not wait at the grid barrier",
        "fused_step_combine.cuh",
        "  cooperative_groups::this_grid().sync();\n  const int64_t block",
        "  if (args.step.present.contains(blockIdx.y)) cooperative_groups::this_grid().sync();\n"
        "  const int64_t block",
    ),
    Fault(
        "second phase: chunks of the other tasks' blocks left out",
        "fused_step_combine.cuh",
        "int64_t{blockIdx.y} * gridDim.x + blockIdx.x;",
        "blockIdx.x;",
    ),
    Fault(
        "second phase: chunks taken by several blocks",
        "fused_step_combine.cuh",
        "int64_t{gridDim.x} * gridDim.y;",
        "gridDim.x;",
    ),
    Fault(
        "the step reads through the read-only path what the sum overwrites",
        "fused_step_combine.cuh",
        "kMomentum, true>(args.step",
        "kMomentum, false>(args.step",
    ),
    Fault(
        "the search reads through the read-only path what the sum overwrites",
        "fused_step_combine.cuh",
        "<grad_t, acc_t, true>(args.step",
        "<grad_t, acc_t, false>(args.step",
    ),
    Fault(
        "launch of both phases not cooperative",
        "launch.cuh",
        "attribute.val.cooperative = 1;",
        "attribute.val.cooperative = 0;",
    ),
    Fault(
        "more blocks in a cooperative launch than are resident",
        "launch_config.cuh",
        "resident / num_tasks < num_chunks ? resident / num_tasks : num_chunks;",
        "resident < num_chunks ? resident : num_chunks;",
    ),
    # pointer_table.cuh, fold.cuh, launch.cuh
    Fault(
        "last block of the pointer table writes too much",
        "pointer_table.cuh",
        "if (index < count)",
        "if (index <= count)",
    ),
    Fault(
        "second piece of the pointer table goes to the start",
        "launch.cuh",
        "in_device_memory + first);",
        "in_device_memory);",
    ),
    Fault(
        "sum not rescaled where the task has no gradient",
        "fold.cuh",
        " * add : sum);",
        " * add : __ldcg(running_sum + at));",
    ),
]


def caught_by(fault: Fault, directory: Path) -> str:
    """What the planted fault made the test program say, or "" where it passed."""
    csrc = directory / "csrc"
    shutil.copytree(build.CSRC, csrc, ignore=shutil.ignore_patterns("cpu"))
    source = csrc / "cuda" / fault.file
    text = source.read_text()
    assert text.count(fault.line) == 1, (
        f"{fault.name}: the line to change is not there exactly once"
    )
    source.write_text(text.replace(fault.line, fault.planted))
    program = directory / "kernel_cases"
    build.compile_cases(
        program,
        csrc,
        threads=fault.threads,
        only_float32=True,
        bfloat16_state=fault.bfloat16_state,
    )
    try:
        result = subprocess.run(
            [
                "sh",
                "-c",
                f'ulimit -t {CPU_SECONDS}; exec "$0" "$1"',
                program,
                "1" if fault.threads else "2",
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=1200,  # threads that all sleep use no processor time; without a fault this never decides
        )
    except subprocess.TimeoutExpired:
        return "does not end"
    if result.returncode == -signal.SIGXCPU:
        return "does not end"
    if result.returncode == 0:
        return ""
    report = [line for line in (result.stderr + result.stdout).splitlines() if line.strip("= ")]
    return report[0] if report else f"exit status {result.returncode}"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_caught(fault: Fault, tmp_path: Path) -> None:
    build.compiler()
    verdict = caught_by(fault, tmp_path)
    print(verdict)
    assert verdict != "", f"nothing noticed: {fault.name}"
