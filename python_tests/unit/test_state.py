"""How parameters lie in the flat state, and what is there before the first step."""

from __future__ import annotations

import ast
import copy
import math
import pickle
from pathlib import Path

import pytest
import torch

import excessmtl_ext
from excessmtl_ext.state import ParamLayout, StepOptions, init_state, padded_numel, segments


def test_every_parameter_begins_at_a_multiple_of_32() -> None:
    assert [padded_numel(numel) for numel in (0, 1, 32, 33)] == [0, 32, 32, 64]
    layout = ParamLayout([5, 0, 33])
    assert (layout.num_params, layout.padded_numel) == (38, 96)
    flat = torch.arange(96)
    views = layout.views(flat)
    assert [view.tolist() for view in views] == [list(range(5)), [], list(range(32, 65))]
    views[0][0] = -1
    assert flat[0] == -1
    assert [part.shape for part in segments(torch.zeros(2, 96), layout.param_numels)] == [
        (2, 5),
        (2, 0),
        (2, 33),
    ]


def test_a_layout_is_its_sizes() -> None:
    layout = ParamLayout([5, 33])
    assert layout == ParamLayout((5, 33)) != ParamLayout([33, 5])
    assert hash(layout) == hash(ParamLayout([5, 33]))
    for again in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert again == layout
        assert again.chunk_map(torch.device("cpu")).numel() == 0
    with pytest.raises(ValueError, match=r"Expected `numels` >= 0"):
        ParamLayout([-1])


def test_a_chunk_map_finds_the_first_parameter_of_each_chunk() -> None:
    # Padded sizes 32, 64 and 32: 128 in all, four chunks of 32, the second and third in parameter 1.
    head = [32, 4, 3, 128]
    expected = [*head, 0, 32, 96, 128, 5, 40, 1, 0, 1, 1, 2]
    assert ParamLayout([5, 40, 1]).build_chunk_map(32).tolist() == expected


def test_a_risk_without_a_baseline_is_a_mean_for_the_linear_fisher_only() -> None:
    layout = ParamLayout([3, 5])
    assert StepOptions(fisher="linear").raw_risk_scale(layout) == 1 / 8
    assert StepOptions(fisher="sqrt").raw_risk_scale(layout) == 1.0
    assert StepOptions(fisher="linear").raw_risk_scale(ParamLayout([])) == 1.0


def test_the_state_begins_with_uniform_weights_and_zero_sums() -> None:
    state = init_state(4, ParamLayout([5]), has_momentum=True, weight_total=4.0)
    assert state.sq_grad_sum.shape == state.grad_mean.shape == (4, 32)
    assert state.task_weights.tolist() == [1.0] * 4
    assert state.log_task_weights.tolist() == [-math.log(4)] * 4
    assert not any(
        tensor.any()
        for name, tensor in state._asdict().items()
        if name not in ("task_weights", "log_task_weights")
    )
    assert init_state(4, ParamLayout([5])).grad_mean.shape == (4, 0)
    with pytest.raises(ValueError, match=r"Expected `num_tasks` between 1 and 512, but got 513"):
        init_state(513, ParamLayout([]))


def test_an_option_of_a_step_is_spelled_in_few_files() -> None:
    package = Path(excessmtl_ext.__file__).parent
    names = {
        file.relative_to(package).as_posix(): spelled_in(ast.parse(file.read_text()))
        for folder in (".", "engines", "passes", "distributed")
        for file in (package / folder).glob("*.py")
    }
    assert {file for file, spelled in names.items() if "relative" in spelled} == {
        "state.py",
        "excess_mtl.py",
        "excess_mtl_options.py",
        "excess_mtl_rule.py",
        "excess_mtl_state.py",  # a saved state depends on it
        "reference.py",  # the equation
    }


def spelled_in(tree: ast.AST) -> set[str]:
    """Every identifier and every string of a file."""
    found: set[str] = set()
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "value"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                found.add(name)
    return found
