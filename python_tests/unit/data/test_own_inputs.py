"""Splits whose tasks have samples of their own."""

from __future__ import annotations

import pytest
import torch

from excessmtl_ext.data import OwnInputsSplit


def make_split() -> OwnInputsSplit:
    tokens = torch.tensor([[3, 4, 0, 0], [5, 0, 0, 0], [6, 7, 8, 9]], dtype=torch.int32)
    return OwnInputsSplit(
        (tokens, torch.arange(10.0).view(5, 2)), (torch.arange(3.0), torch.arange(5.0))
    )


def test_smaller_tasks_start_again_and_tokens_lose_their_padding() -> None:
    split = make_split()
    assert len(split) == 5
    inputs, targets = split.batch(torch.tensor([0, 1, 4]))
    assert inputs[0].tolist() == [[3, 4], [5, 0], [5, 0]]
    assert inputs[1].tolist() == [[0, 1], [2, 3], [8, 9]]
    assert [target.tolist() for target in targets] == [[0, 1, 1], [0, 1, 4]]


def test_an_evaluation_sees_every_sample_once() -> None:
    seen: list[list[float]] = [[], []]
    for inputs, targets in make_split().batches(2):
        for index, target in enumerate(targets):
            assert len(inputs[index]) >= 1
            if target is not None:
                assert len(inputs[index]) == len(target)
                seen[index] += target.tolist()
    assert seen == [[0, 1, 2], [0, 1, 2, 3, 4]]


def test_inputs_and_targets_of_a_task_have_the_same_length() -> None:
    with pytest.raises(ValueError, match=r"as many `targets` as `inputs` .* but got \[\(2, 3\)\]"):
        OwnInputsSplit((torch.zeros(2, 1),), (torch.zeros(3),))
    with pytest.raises(ValueError, match=r"at least one, but got \[\(0, 0\)\]"):
        OwnInputsSplit((torch.zeros(0, 1),), (torch.zeros(0),))


def test_a_copy_on_a_device_gives_the_same_batches() -> None:
    split = make_split()
    moved = split.to(torch.device("cpu"))
    for mine, theirs in zip(split.batches(2), moved.batches(2), strict=True):
        assert all(map(torch.equal, mine.inputs, theirs.inputs))
