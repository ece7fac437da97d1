"""Splits refuse targets that do not belong to their inputs; streams of one seed are independent."""

from __future__ import annotations

import pytest
import torch

from excessmtl_ext.data import Batch, MultiTaskData, Task, TensorSplit
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
    assert isinstance(inputs, torch.Tensor)
    (target,) = targets
    assert target is not None
    assert inputs.device.type == target.device.type == device.type
    assert inputs.flatten().tolist() == [0.5, -0.5]
    assert target.tolist() == [8, 7]


def test_batches_read_every_sample_once_in_order() -> None:
    inputs = torch.arange(7.0).view(7, 1)
    split = TensorSplit(inputs, (torch.arange(7),))
    batches = list(split.batches(3))
    assert [len(batch.inputs) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([torch.as_tensor(batch.inputs) for batch in batches]), inputs)
    targets = [target for batch in batches for target in batch.targets if target is not None]
    assert torch.cat(targets).tolist() == list(range(7))


def test_standardising_a_batch_leaves_float_inputs_alone() -> None:
    inputs = torch.tensor([[1.0], [3.0]])
    split = TensorSplit(inputs, (torch.zeros(2),), 2.0, 0.5)
    first, again = (split.batch(torch.arange(2)).inputs for _ in range(2))
    assert torch.equal(torch.as_tensor(first), torch.tensor([[-2.0], [2.0]]))
    assert torch.equal(torch.as_tensor(first), torch.as_tensor(again))
    assert inputs.flatten().tolist() == [1.0, 3.0]


def test_a_batch_moves_with_a_list_of_inputs_and_missing_targets(device: torch.device) -> None:
    batch = Batch([torch.zeros(2), torch.ones(1)], [None, torch.ones(1)]).to(device)
    assert [each.device.type for each in batch.inputs] == [device.type] * 2
    assert batch.targets[0] is None
    assert batch.targets[1] is not None
    assert batch.targets[1].device.type == device.type


def test_a_stream_depends_on_seed_and_purpose_only() -> None:
    def draw(seed: int, *purpose: str | int) -> int:
        return int(torch.randint(2**62, (), generator=seeded_generator(seed, *purpose)))

    assert draw(0, "pairs") == draw(0, "pairs")
    assert len({draw(0, "pairs"), draw(1, "pairs"), draw(0, "noise"), draw(0, "pairs", 1)}) == 4


@pytest.mark.parametrize("name", ["", "a\nb", "a\0", "step", "mean"])
def test_a_name_that_no_table_can_hold_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="Expected `name` of printable characters"):
        Task(name, 2)


def test_two_tasks_of_one_name_are_an_error() -> None:
    split = TensorSplit(torch.zeros(1, 2), (torch.zeros(1), torch.zeros(1)))
    tasks = (Task("a", 2), Task("a", 2))
    with pytest.raises(ValueError, match=r"a name of its own each, but got \['a', 'a'\]"):
        MultiTaskData(tasks, split, split, split, split)
