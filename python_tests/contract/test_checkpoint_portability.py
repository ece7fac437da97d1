"""A balancer's checkpoint loads beside a model of another dtype, onto another device, and only if it is whole."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from _inputs import Problem, make_problem
from _published import published

from excessmtl_ext import ExcessMTL
from excessmtl_ext.extra_state import STATE_VERSION
from excessmtl_ext.training.run.record import write_atomically

OPTIONS: dict[str, Any] = {"robust_step_size": 0.3, "gradient_momentum": 0.9}


def problem_in(dtype: torch.dtype) -> Problem:
    """The same problem, its numbers rounded to ``dtype``."""
    problem = make_problem()
    problem.encoder.to(dtype)
    problem.heads.to(dtype)
    problem.inputs, problem.targets = problem.inputs.to(dtype), problem.targets.to(dtype)
    return problem


def train(problem: Problem, balancer: ExcessMTL, num_steps: int) -> None:
    for _ in range(num_steps):
        problem.zero_grad()
        balancer.backward(problem.losses())


def saved_after(num_steps: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    problem = problem_in(dtype)
    balancer = published(problem.encoder.parameters(), num_tasks=3, **OPTIONS)
    train(problem, balancer, num_steps)
    file = io.BytesIO()
    torch.save({"model": problem.encoder.state_dict(), "balancer": balancer.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("has_begun", [False, True], ids=["fresh", "after_a_step"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_float32_checkpoint_goes_on_beside_a_model_of_another_dtype(
    dtype: torch.dtype, has_begun: bool
) -> None:
    checkpoint, expected = saved_after(3), saved_after(4)["balancer"]
    problem = problem_in(dtype)
    problem.encoder.load_state_dict(checkpoint["model"])
    balancer = published(problem.encoder.parameters(), num_tasks=3, **OPTIONS)
    train(problem, balancer, int(has_begun))
    balancer.load_state_dict(checkpoint["balancer"])
    for name in ("task_weights", "baseline_excess_risk", "num_steps"):
        assert torch.equal(getattr(balancer, name), checkpoint["balancer"][name]), name
    torch.testing.assert_close(
        balancer.sq_grad_sum, checkpoint["balancer"]["sq_grad_sum"], check_dtype=False
    )
    train(problem, balancer, 1)
    tolerance = 1e-5 if dtype == torch.float64 else 0.02  # that of the gradients
    torch.testing.assert_close(
        balancer.task_weights, expected["task_weights"], rtol=tolerance, atol=tolerance
    )


def test_a_checkpoint_of_a_float64_model_goes_on_beside_float32() -> None:
    checkpoint = saved_after(3, torch.float64)
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3, **OPTIONS)
    balancer.load_state_dict(checkpoint["balancer"])
    train(problem, balancer, 1)
    assert torch.isfinite(balancer.task_weights).all()
    assert balancer.num_steps.item() == 4


def test_a_checkpoint_may_be_looked_at_without_its_data_and_loaded_onto_the_balancers_device(
    tmp_path: Path,
) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(saved_after(3), path)
    shapes = torch.load(path, map_location="meta", weights_only=True)["balancer"]
    assert shapes["sq_grad_sum"].device.type == "meta"
    assert (
        shapes["_extra_state"].shape
        == torch.load(path, weights_only=True)["balancer"]["_extra_state"].shape
    )
    loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3, **OPTIONS)
    balancer.load_state_dict(loaded["balancer"])
    train(problem, balancer, 1)
    assert torch.equal(balancer.task_weights, saved_after(4)["balancer"]["task_weights"])


def test_a_checkpoint_saved_on_another_device_is_moved() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    checkpoint = saved_after(3)["balancer"]
    problem = make_problem()
    problem.encoder.cuda()
    problem.heads.cuda()
    problem.inputs, problem.targets = problem.inputs.cuda(), problem.targets.cuda()
    balancer = published(problem.encoder.parameters(), num_tasks=3, **OPTIONS)
    balancer.load_state_dict(checkpoint)
    assert balancer.sq_grad_sum.is_cuda
    train(problem, balancer, 1)


def test_a_newer_version_is_refused_and_changes_nothing() -> None:
    checkpoint = saved_after(3)["balancer"]
    checkpoint["_extra_state"][0] = STATE_VERSION + 1
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3, **OPTIONS)
    with pytest.raises(RuntimeError, match=r"but got version.*Install the newer excessmtl_ext"):
        balancer.load_state_dict(checkpoint)
    assert balancer.num_steps.item() == 0


def test_a_write_that_is_cut_off_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(saved_after(1), path)
    before = path.read_bytes()

    def write_half(file: Any) -> None:
        file.write(before[: len(before) // 2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write_half)
    assert path.read_bytes() == before
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises((RuntimeError, OSError)):  # and half a file is not taken for a whole one
        torch.load(path, weights_only=True)
