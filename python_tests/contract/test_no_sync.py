"""A step never asks a tensor for its value: on a GPU that waits for all work, and ends the capture of a CUDA graph.

Shown by construction, without a GPU: every op of a step is looked at. test_cuda_device.py captures a step on one.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from _inputs import make_problem
from _published import published
from _ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import excessmtl_ext
from excessmtl_ext import ExcessMTL, GroupDRO

# What item(), float(), bool() and indexing by a mask come down to, and what has a size that depends on values.
READING_OPS = {
    "_local_scalar_dense",
    "equal",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "_unique2",
}


class NoReading(TorchDispatchMode):
    """Raises where the host reads a value, but for ``num_allowed`` times."""

    def __init__(self, num_allowed: int = 0) -> None:
        super().__init__()
        self.num_allowed = num_allowed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in READING_OPS:
            self.num_allowed -= 1
        if self.num_allowed < 0:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


ordinary_tolist = Tensor.tolist


def list_of_sizes(tensor: Tensor) -> Any:
    """Sizes of parameters lie on the CPU, in int64; anything else would have to be fetched."""
    assert tensor.dtype == torch.int64, "tolist waits for the device"
    return ordinary_tolist(tensor)


def backward(balancer: ExcessMTL, losses: list[Tensor]) -> None:
    balancer.backward(losses, grad_scale=torch.tensor(8.0))


def forward(balancer: ExcessMTL, losses: list[Tensor]) -> None:
    balancer(losses).backward()


def stream(balancer: ExcessMTL, losses: list[Tensor]) -> None:
    for task, loss in enumerate(losses):
        balancer.accumulate(task, loss, retain_graph=task < len(losses) - 1)
    balancer.finish()


def update(balancer: ExcessMTL, losses: list[Tensor]) -> None:
    numel = sum(parameter.numel() for parameter in balancer.shared_parameters or ())
    balancer.update_weights(torch.ones(len(losses), numel))


OPTIONS: dict[str, dict[str, Any]] = {
    "official": {},
    "recommended": {"gradient_momentum": 0.98, "fisher": "linear"},
    "every_second": {"update_every": 2, "min_weight": 0.01, "head_weighting": "task_weights"},
}


@pytest.mark.parametrize("verb", [backward, forward, stream, update], ids=lambda v: v.__name__)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step_reads_no_value(
    options: dict[str, Any], verb: Callable[[ExcessMTL, list[Tensor]], None]
) -> None:
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3, **options)
    for _ in range(4):
        problem.zero_grad()
        losses = problem.losses()
        # On the CPU, and only there, .backward() looks whether the scale it starts with is 1.
        num_allowed = 1 if verb is forward else 0
        with NoReading(num_allowed), mock.patch.object(Tensor, "tolist", list_of_sizes):
            verb(balancer, losses)
    assert balancer.num_steps.item() == 4 // options.get("update_every", 1)  # counted in a tensor
    assert "num_steps" in dict(balancer.state_tensors().items())


def test_losses_that_are_handed_over_are_not_read() -> None:
    balancer = GroupDRO(num_tasks=3, robust_step_size=1.0)
    losses = make_problem().losses()
    with NoReading(), mock.patch.object(Tensor, "__float__", side_effect=AssertionError):
        balancer.update_weights(losses=losses)
    assert torch.equal(balancer.task_weights.argmax(), torch.stack(losses).argmax())


def test_raising_on_a_nonfinite_gradient_does_read() -> None:
    """As documented; and so a step that reads is seen."""
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3, nonfinite="raise")
    losses = problem.losses()
    with pytest.raises(AssertionError, match="waits for the device"), NoReading():
        balancer.backward(losses)


def step_of_ranks(rank: int, num_ranks: int, kind: str) -> int:
    problem = make_problem()
    model = torch.nn.ModuleList([problem.encoder, problem.heads])
    options: dict[str, Any] = {"process_group": dist.group.WORLD, "model": model}
    if kind == "risks":
        options["reduce"] = "risks"
    if kind == "fsdp":
        fully_shard(problem.encoder, mesh=init_device_mesh("cpu", (num_ranks,)))
        options = {"model": model}
    if kind == "ddp":
        encoder = DistributedDataParallel(problem.encoder)
        problem.encoder, options = encoder, {"model": encoder}  # type: ignore[assignment]
    balancer = published(problem.encoder.parameters(), num_tasks=3, **options)
    for _ in range(3):
        problem.zero_grad()
        losses = problem.losses()
        with NoReading():
            balancer.backward(losses, num_samples=4 + rank)
    return int(balancer.num_steps)


@pytest.mark.parametrize("kind", ["grads", "risks", "ddp", "fsdp"])
def test_a_step_of_ranks_reads_no_value_of_the_device(kind: str) -> None:
    """Two exchanges are read, on the CPU where the group has a backend for it: they are no tensors of the device."""
    assert run_ranks(2, step_of_ranks, kind) == [3, 3]


def test_no_number_of_the_host_is_copied_to_the_device_in_a_step_of_ranks() -> None:
    """torch.tensor(number, device=...) waits for the copy; the exchanges have tensors of their own."""
    ALLOWED = ("agreement.py", "joint_reach.py")  # where the ranks agree, and before the first step
    folder = Path(excessmtl_ext.__file__).parent / "distributed"
    files = [path for path in sorted(folder.glob("*.py")) if path.name not in ALLOWED]
    assert len(files) > 5
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.tensor":
                devices = [
                    ast.unparse(each.value) for each in node.keywords if each.arg == "device"
                ]
                assert devices in ([], ["'cpu'"]), path.name
