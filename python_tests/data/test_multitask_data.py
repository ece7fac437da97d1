"""Splits refuse targets that do not belong to their inputs; streams of one seed are independent."""

from __future__ import annotations

import pytest
import torch

from excessmtl_ext.data import TensorSplit
from excessmtl_ext.data.seeding import seeded_generator


def test_targets_of_another_length_are_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"Expected every entry of `targets` to have 3 samples.*\[3, 2\]"
    ):
        TensorSplit(
            torch.zeros(3, 1, dtype=torch.uint8), (torch.zeros(3), torch.zeros(2)), 0.0, 1.0
        )


def test_batches_follow_the_device_of_the_split(device: torch.device) -> None:
    split = TensorSplit(
        torch.tensor([[0], [4]], dtype=torch.uint8), (torch.tensor([7, 8]),), 2.0, 4.0
    )
    inputs, targets = split.to(device).batch(torch.tensor([1, 0]))
    assert inputs.device.type == targets[0].device.type == device.type
    assert inputs.flatten().tolist() == [0.5, -0.5]
    assert targets[0].tolist() == [8, 7]


def test_a_stream_depends_on_seed_and_purpose_only() -> None:
    def draw(seed: int, *purpose: str | int) -> int:
        return int(torch.randint(2**62, (), generator=seeded_generator(seed, *purpose)))

    assert draw(0, "pairs") == draw(0, "pairs")
    assert len({draw(0, "pairs"), draw(1, "pairs"), draw(0, "noise"), draw(0, "pairs", 1)}) == 4
