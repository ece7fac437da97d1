"""Calls every op with arguments that are wrong in one to three ways. Run by test_op_boundary.py and the sanitizers.

usage: _hostile_arguments.py [--library LIBRARY] [--examples N] [--seed N]

A process of its own, since a crash is what it looks for: the call that is under way stands in the
last line of stderr. Exit status 0: every call raised an exception, and none had written anything.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NUM_TASKS, NUMELS, PADDED = 3, [40, 0, 9, 40], 64 + 32 + 64
CHUNK_NUMEL = 64

Arguments = dict[str, Any]


def chunk_map() -> Tensor:
    """The map of a CUDA launch for NUMELS, as functional.ParamLayout builds it."""
    ends = [64, 64, 96, 160]
    starts = range(0, PADDED, CHUNK_NUMEL)
    first = [next(k for k, end in enumerate(ends) if end > start) for start in starts]
    return torch.tensor([CHUNK_NUMEL, len(starts), len(NUMELS), PADDED, 0, *ends, *NUMELS, *first])


def sound_arguments(rng: random.Random) -> Arguments:
    """Whatever any op takes, by its name in the schemas; momentum on or off."""
    momentum, state = rng.choice([0.0, 0.9]), rng.choice([torch.float32, torch.bfloat16])
    vector = torch.float64
    return {
        "task_grads": [torch.randn(n) for _ in range(NUM_TASKS) for n in NUMELS],
        "outputs": [torch.randn(n) for n in NUMELS],
        "param_numels": torch.tensor(NUMELS),
        "chunk_map": chunk_map(),
        "grad_scale": torch.tensor(2.0),
        "sq_grad_sum": torch.rand(NUM_TASKS, PADDED).to(state),
        "grad_mean": torch.rand(NUM_TASKS, PADDED if momentum else 0).to(state),
        "excess_risk_sum": torch.rand(NUM_TASKS, dtype=vector),
        "excess_risk": torch.rand(NUM_TASKS, dtype=vector),
        "relative_excess_risk": torch.rand(NUM_TASKS, dtype=vector),
        "baseline_excess_risk": torch.rand(NUM_TASKS, dtype=vector),
        "log_task_weights": torch.full((NUM_TASKS,), -math.log(NUM_TASKS), dtype=vector),
        "task_weights": torch.full((NUM_TASKS,), 1 / NUM_TASKS, dtype=vector),
        "num_steps": torch.tensor(3),
        "num_task_steps": torch.full((NUM_TASKS,), 3),
        "num_skipped_steps": torch.tensor(0),
        "found_nonfinite": torch.zeros(NUM_TASKS, dtype=torch.bool),
        "known_nonfinite": torch.zeros(NUM_TASKS, dtype=torch.bool),
        "ticket": torch.zeros(1, dtype=torch.int32),
        "log_weight": torch.tensor(-1.0, dtype=vector),
        "running_sum": torch.rand(PADDED),
        "running_log_max": torch.tensor(-2.0, dtype=vector),
        "tasks": [0, 2],
        "sqrt_fisher": rng.random() < 0.5,
        "eps": 1e-7,
        "gradient_momentum": momentum,
        "robust_step_size": 0.1,
        "num_warmup_steps": 1,
        "relative": True,
        "min_weight": 0.0,
        "weight_total": 1.0,
        "raw_risk_scale": 1.0,
        "accumulate": rng.random() < 0.5,
        "rounding_seed": rng.choice([0, -1, 2**63 - 1]),
        "first_task": 0,
        "square_sums": torch.rand(NUM_TASKS, len(NUMELS), dtype=vector),
        "risk_share": torch.rand(NUM_TASKS, dtype=vector),
        "risk_share_sum": torch.rand(NUM_TASKS, dtype=vector),
        "num_gradient_steps": torch.full((NUM_TASKS,), 3),
        "momentum_mass": torch.rand(NUM_TASKS, dtype=vector),
        "momentum_sq_mass": torch.rand(NUM_TASKS, dtype=vector),
        "tensor_mean_square": torch.rand(NUM_TASKS, len(NUMELS), dtype=vector),
        "num_tensor_steps": torch.full((NUM_TASKS, len(NUMELS)), 3),
        "tensor_weights": torch.rand(NUM_TASKS, len(NUMELS), dtype=vector),
        "log_priorities": torch.full((NUM_TASKS,), -math.log(NUM_TASKS), dtype=vector),
        "weight_floors": torch.zeros(NUM_TASKS, dtype=vector),
        "max_log_ratio": rng.choice([None, 0.7]),
        "per_tensor": rng.random() < 0.5,
        "moves_weights": rng.random() < 0.5,
    }


NOT_NUMBERS = [math.nan, math.inf, -math.inf]
HOSTILE_VALUES: dict[str, list[Any]] = {
    "tasks": [[-1], [NUM_TASKS], [0, 0], [2**62], [0, 1, 2, 1], [-(2**63)]],
    "eps": [-1e-7, 0.0, 1e-39, *NOT_NUMBERS],
    "gradient_momentum": [-0.1, 1.0, 1e300, *NOT_NUMBERS],
    "robust_step_size": [-1.0, 0.0, *NOT_NUMBERS],
    "num_warmup_steps": [-1, -(2**63)],
    "min_weight": [-0.1, 0.5, 1e300, *NOT_NUMBERS],
    "weight_total": [-1.0, 0.0, *NOT_NUMBERS],
    "first_task": [-1, 512, 2**63 - 1],
    "raw_risk_scale": [-1.0, 0.0, *NOT_NUMBERS],
    "max_log_ratio": [-1.0, *NOT_NUMBERS],
}
HOSTILE_NUMELS: list[list[int]] = [
    [],
    [40, 0, 9],
    [*NUMELS, 1],
    [40, 0, 9, -40],
    [2**62, 0, 9, 40],
    [2**48] * 4,
    [-(2**63), 0, 9, 40],
    [9, 0, 40, 40],
]


def shrunk(tensor: Tensor, rng: random.Random) -> Tensor:
    """Sizes that the storage no longer has."""
    copy = tensor.clone()
    bytes_needed = copy.numel() * copy.element_size()
    copy.untyped_storage().resize_(rng.choice([0, bytes_needed // 2, bytes_needed - 1]))
    return copy


def strided_and_shrunk(tensor: Tensor, rng: random.Random) -> Tensor:
    copy = torch.stack([tensor, tensor], dim=-1)[..., 0]
    copy.untyped_storage().resize_(rng.choice([0, tensor.element_size()]))
    return copy


def with_type(*dtypes: torch.dtype) -> Callable[[Tensor, random.Random], Tensor]:
    return lambda tensor, rng: tensor.to(rng.choice([d for d in dtypes if d != tensor.dtype]))


def quantized(tensor: Tensor, rng: random.Random) -> Tensor:
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


WRONG_IN_ANY_TENSOR: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "complex, bool or 8 bits": with_type(torch.complex64, torch.int8, torch.float8_e4m3fn),
    "conjugate view": lambda tensor, rng: tensor.to(torch.complex64).conj(),
    "meta": lambda tensor, rng: tensor.to("meta"),
    "sparse": lambda tensor, rng: tensor.to_sparse(),
    "quantized": quantized,
    "nested": lambda tensor, rng: torch.nested.nested_tensor([tensor.reshape(-1)] * 2),
    "no tensor": lambda tensor, rng: rng.choice([3, "tensor", object()]),
    "storage too small": shrunk,
    "one element more": lambda tensor, rng: torch.cat([tensor.reshape(-1), tensor.reshape(-1)[:1]]),
    "huge": lambda tensor, rng: tensor.reshape(-1)[:1].expand(2 ** rng.choice([31, 40, 60])),
}
WRONG_IN_STATE: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "other type": with_type(torch.float16, torch.int32, torch.complex128),
    "no tasks": lambda tensor, rng: tensor[:0] if tensor.dim() else tensor.new_empty(0),
    "513 tasks": lambda tensor, rng: tensor.new_zeros(513, *tensor.shape[1:]),
}
WRONG_WHERE_STRIDED: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "strided": lambda tensor, rng: torch.stack([tensor, tensor], dim=-1)[..., 0],
    "expanded": lambda tensor, rng: tensor.reshape(-1)[:1].expand(tensor.shape),
    "one element less": lambda tensor, rng: tensor.reshape(-1)[1:].clone(),
}


class Call:
    """One op, its arguments, and what is wrong with them."""

    def __init__(self, op: Any, arguments: Arguments) -> None:
        self.op = op
        self.schema = [(a.name, a) for a in op._schema.arguments]
        self.arguments = {name: arguments[name] for name, _ in self.schema}
        if "running_sum" in self.arguments:  # fold_ takes the gradients of one task
            self.arguments["task_grads"] = arguments["task_grads"][: len(NUMELS)]
        self.written = {
            name for name, a in self.schema if a.alias_info is not None and a.alias_info.is_write
        }
        self.faults: list[str] = []
        self.spoilt: set[tuple[str, int | None]] = set()

    def tensors(self, names: set[str] | None = None) -> list[tuple[str, int | None, Tensor]]:
        """Every tensor with elements: the argument, its place in a list, itself."""
        found = []
        for name, value in self.arguments.items():
            if names is None or name in names:
                entries = enumerate(value) if isinstance(value, list) else [(None, value)]
                found += [
                    (name, k, t) for k, t in entries if isinstance(t, Tensor) and t.numel() > 0
                ]
        return found

    def put(self, name: str, index: int | None, value: Any, fault: str) -> None:
        if index is None:
            self.arguments[name] = value
        else:
            self.arguments[name] = [*self.arguments[name]]
            self.arguments[name][index] = value
        self.spoilt.add((name, index))
        self.faults.append(f"{name}{'' if index is None else f'[{index}]'}: {fault}")

    def run(self) -> None:
        keywords = {name: self.arguments[name] for name, a in self.schema if a.kwarg_only}
        self.op(*[self.arguments[n] for n, a in self.schema if not a.kwarg_only], **keywords)


def spoil_a_value(call: Call, rng: random.Random) -> None:
    names = [name for name in HOSTILE_VALUES if name in call.arguments]
    if names:
        name = rng.choice(names)
        value = rng.choice(HOSTILE_VALUES[name])
        call.put(name, None, value, f"{value}")


def spoil_the_sizes(call: Call, rng: random.Random) -> None:
    if "param_numels" in call.arguments:
        # An op without gradients cannot know that other sizes of as many parameters are not meant.
        hostile = HOSTILE_NUMELS if "task_grads" in call.arguments else HOSTILE_NUMELS[:5]
        numels = rng.choice(hostile)
        call.put("param_numels", None, torch.tensor(numels, dtype=torch.int64), f"{numels}")


def spoil_a_list(call: Call, rng: random.Random) -> None:
    lists = [name for name in ("task_grads", "outputs") if call.arguments.get(name)]
    if lists:
        name = rng.choice(lists)
        length = rng.choice([k for k in range(1, 14) if k != len(call.arguments[name])])
        value = [call.arguments[name][k % len(call.arguments[name])] for k in range(length)]
        call.put(name, None, value, f"{length} tensors")


def spoil_a_tensor(call: Call, rng: random.Random) -> None:
    tensors = [entry for entry in call.tensors() if entry[0] != "chunk_map"]
    if not tensors:
        return
    name, index, tensor = rng.choice(tensors)
    ways = dict(WRONG_IN_ANY_TENSOR)
    if name in ("task_grads", "outputs"):
        ways["strided, storage too small"] = strided_and_shrunk
    else:
        ways |= WRONG_IN_STATE
    if name != "task_grads" and tensor.numel() > 1:
        ways |= WRONG_WHERE_STRIDED
    way = rng.choice(list(ways))
    call.put(name, index, ways[way](tensor, rng), way)


def spoil_by_sharing(call: Call, rng: random.Random) -> None:
    """Lays one argument where the op writes another."""
    target = rng.choice(call.tensors(call.written))
    others = [
        entry
        for entry in call.tensors()
        if entry[2] is not target[2]
        and entry[0] not in ("param_numels", "chunk_map")
        # That outputs[l] is a gradient of parameter l is allowed.
        and not ({entry[0], target[0]} == {"task_grads", "outputs"}
                 and (entry[1] or 0) % len(NUMELS) == (target[1] or 0) % len(NUMELS))
        and entry[2].element_size() * entry[2].numel() <= target[2].element_size() * target[2].numel()
    ]  # fmt: skip
    if others:
        name, index, tensor = rng.choice(others)
        shared = torch.empty(0, dtype=tensor.dtype)
        shared.set_(target[2].untyped_storage(), 0, tensor.shape)
        call.put(name, index, shared, f"in the memory of {target[0]}")


SPOILERS = [spoil_a_tensor, spoil_a_tensor, spoil_by_sharing, spoil_a_value, spoil_the_sizes, spoil_a_list]  # fmt: skip


def hostile_call(op: Any, rng: random.Random) -> Call:
    call = Call(op, sound_arguments(rng))
    for _ in range(rng.randint(1, 3)):
        spoil = rng.choice(SPOILERS)
        sound = not call.faults
        if sound or spoil in (
            spoil_a_value,
            spoil_the_sizes,
        ):  # tensors are spoilt once: no fault heals another
            spoil(call, rng)
    return call if call.faults else hostile_call(op, rng)


def check(call: Call) -> str:
    """Empty, or what went wrong."""
    sound = [
        (name, tensor, tensor.clone())
        for name, index, tensor in call.tensors(call.written)
        if not {(name, index), (name, None)} & call.spoilt
    ]
    try:
        call.run()
    except Exception:
        changed = [name for name, tensor, before in sound if not torch.equal(tensor, before)]
        return f"wrote {changed} before it raised" if changed else ""
    return "no exception"


OPS = [
    "fused_step_", "fused_step_combine_", "accumulate_excess_risk_", "update_task_risks_",
    "update_task_weights_", "commit_step_", "combine_", "fold_",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--library", help="the ops as a shared library; else those of the installed package"
    )
    parser.add_argument("--examples", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.library:
        torch.ops.load_library(args.library)
    else:
        import excessmtl_ext.functional  # noqa: F401
    warnings.simplefilter(
        "ignore"
    )  # quantized, nested and sparse tensors announce that they are new or old
    for example in range(args.examples):
        rng = random.Random(f"{args.seed} {example}")
        torch.manual_seed(example)
        name = OPS[example % len(OPS)]
        call = hostile_call(getattr(torch.ops.excessmtl_ext, name).default, rng)
        print(f"example {example}, {name}, {'; '.join(call.faults)}", file=sys.stderr, flush=True)
        said = check(call)
        if said:
            print(f"{name}: {said}. {'; '.join(call.faults)}")
            return 1
    print(f"{args.examples} calls, {args.examples} exceptions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
