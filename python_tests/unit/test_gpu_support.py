"""GPUs that the compiled ops do not run on take the reference; the launch is a stub."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from excessmtl_ext import functional, gpu_support
from excessmtl_ext import op_calls as ops

GPU = torch.device("cuda", 0)
LAYOUT = functional.ParamLayout([40])


@pytest.fixture(autouse=True)
def an_unknown_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_support, "_RUNS_ON", {})
    monkeypatch.setattr(ops, "COMPILED_FOR", frozenset(["cpu", "cuda"]))


def let_launches(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[torch.device]:
    launched: list[torch.device] = []

    def launch(device: torch.device) -> None:
        launched.append(device)
        if error is not None:
            raise error

    monkeypatch.setattr(gpu_support, "_launch_smallest", launch)
    return launched


def step_on_gpu(weights: Tensor) -> Tensor:
    """A weighted sum as if on a GPU; its tensors are on the CPU, where the reference takes them too."""
    output = torch.zeros(40)
    given: dict[str, Any] = {
        "task_grads": [torch.ones(40), torch.full((40,), 3.0)],
        "outputs": [output],
        "layout": LAYOUT,
        "task_weights": weights,
        "found_nonfinite": torch.zeros(2, dtype=torch.bool),
        "accumulate": False,
    }
    functional._call(functional.reference.weighted_sum_, GPU, given, name="combine_")
    return output


@pytest.mark.parametrize(
    "error",
    [
        "fold_ failed: no kernel image is available for execution on the device.",
        "cudaGetDevice failed: CUDA driver version is insufficient for CUDA runtime version.",
        "combine_ failed: the provided PTX was compiled with an unsupported toolchain..",
    ],
)
def test_a_gpu_without_code_takes_the_reference_with_one_warning(
    error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = let_launches(monkeypatch, RuntimeError(error))
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    with pytest.warns(
        RuntimeWarning, match="do not run on cuda:0 .*reference, which is slower"
    ) as told:
        for _ in range(3):
            assert torch.equal(step_on_gpu(weights), torch.full((40,), 2.5))
    assert len(told) == 1
    assert launched == [GPU]


def test_another_error_of_the_launch_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    let_launches(monkeypatch, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu_support.runs_on(GPU)
    assert not gpu_support._RUNS_ON


def test_a_gpu_that_runs_the_smallest_op_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = let_launches(monkeypatch, None)
    assert gpu_support.runs_on(GPU)
    assert gpu_support.runs_on(GPU)
    assert launched == [GPU]


@pytest.mark.skipif(functional.cpu_capability() == "reference", reason="no ops are compiled here")
def test_the_smallest_op_runs_where_it_is_compiled() -> None:
    gpu_support._launch_smallest(torch.device("cpu"))
