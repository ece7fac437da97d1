"""The layout of shared parameters, and the plan that a CUDA launch reads; the ops themselves: test_fused_step.py."""

from __future__ import annotations

import pytest
import torch

from excessmtl_ext.state import CUDA_CHUNK_NUMEL, ParamLayout, padded_numel

LAYOUTS = [
    [5000, 7, 0, 33, 1023, 1024, 2500, 1],
    [0, 0, 3 * CUDA_CHUNK_NUMEL],  # chunks that begin and end with one parameter
    [CUDA_CHUNK_NUMEL, 0, 1],
    [1] * 300,  # many parameters in one chunk
]


@pytest.mark.parametrize("numels", LAYOUTS, ids=lambda numels: str(numels[:4]))
def test_every_chunk_of_a_launch_begins_in_the_parameter_that_the_plan_names(
    numels: list[int],
) -> None:
    layout = ParamLayout(numels)
    plan = layout.build_chunk_map(CUDA_CHUNK_NUMEL)
    head, offsets, sizes, first = plan.split(
        [4, len(numels) + 1, len(numels), len(plan) - 5 - 2 * len(numels)]
    )
    owner = [index for index, numel in enumerate(numels) for _ in range(padded_numel(numel))]
    assert first.tolist() == owner[::CUDA_CHUNK_NUMEL]
    assert head.tolist() == [CUDA_CHUNK_NUMEL, len(first), len(numels), len(owner)]
    assert offsets.tolist() == [sum(o < index for o in owner) for index in range(len(numels) + 1)]
    assert sizes.tolist() == numels


def test_a_layout_without_parameters_has_no_chunk() -> None:
    head = ParamLayout([]).build_chunk_map(CUDA_CHUNK_NUMEL).tolist()
    assert head == [CUDA_CHUNK_NUMEL, 0, 0, 0, 0]


def test_layouts_of_equal_sizes_are_one_key() -> None:
    found = {ParamLayout([2, 3]): "first"}
    assert found[ParamLayout((2, 3))] == "first"
    assert ParamLayout([3, 2]) not in found
    assert ParamLayout([2, 3]) != [2, 3]
    assert eval(repr(ParamLayout([2, 3])), {"ParamLayout": ParamLayout}) == ParamLayout([2, 3])


def test_a_negative_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Expected `numels` >= 0, but got \(2, -1\)"):
        ParamLayout([2, -1])


def test_the_plan_is_made_once_and_left_out_where_nothing_is_launched() -> None:
    layout, cpu = ParamLayout([2, 3]), torch.device("cpu")
    assert layout.chunk_map(cpu).numel() == 0
    assert layout.chunk_map(cpu) is layout.chunk_map(cpu)
