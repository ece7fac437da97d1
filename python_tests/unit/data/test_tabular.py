"""Rows to data sets: splits by groups, standardised columns, noise on the flagged tasks alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from excessmtl_ext.data import MultiTaskData, Task, TensorSplit, noise_share
from excessmtl_ext.data.tabular import INPUT_LIMIT, Table, make_tabular_data, split_rows

NUM_ROWS = 1000


def make_table(**changes: Any) -> Table:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(NUM_ROWS, 3, generator=generator, dtype=torch.float64) * 5 + 100
    inputs[:, 2] = 7.0
    inputs[0, 0] = 1e9
    return Table(
        **{
            "name": "made-up",
            "inputs": inputs,
            "tasks": (
                Task("value", 1, "regression", is_noisy=True),
                Task("class", 4, is_noisy=True),
                Task("clean", 1, "regression"),
            ),
            "targets": (
                inputs[:, 1] * 3,
                torch.randint(4, (NUM_ROWS,), generator=generator),
                inputs[:, 1] - 50,
            ),
            **changes,
        }
    )


def made(**options: Any) -> MultiTaskData:
    return make_tabular_data(make_table(), **{"noise": 0.4, **options})


def tensors(split: object) -> TensorSplit:
    assert isinstance(split, TensorSplit)
    return split


def same(first: object, second: object) -> bool:
    one, other = tensors(first), tensors(second)
    return torch.equal(one.inputs, other.inputs) and all(
        map(torch.equal, one.targets, other.targets)
    )


def test_every_row_is_in_one_part_and_the_test_rows_are_those_of_every_seed() -> None:
    first, other = split_rows(1000, "a", 0), split_rows(1000, "a", 1)
    assert [len(part) for part in first] == [700, 100, 200]
    assert torch.cat(first).sort().values.tolist() == list(range(1000))
    assert set(first[2].tolist()) == set(other[2].tolist())
    assert set(first[1].tolist()) != set(other[1].tolist())
    assert set(split_rows(1000, "b", 0)[2].tolist()) != set(first[2].tolist())


def test_groups_stay_together_and_are_not_taken_in_order() -> None:
    groups = torch.arange(1000) % 50 + 7
    parts = split_rows(1000, "a", 0, groups)
    owners = [set(groups[part].tolist()) for part in parts]
    assert [len(owner) for owner in owners] == [35, 5, 10]
    assert not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])
    assert owners[2] != set(range(7, 17))


def test_inputs_and_values_are_standardised_by_the_clean_training_rows() -> None:
    data = made()
    train = tensors(data.clean_train)
    for column in (train.inputs[:, 1], train.targets[0], train.targets[2]):
        assert float(column.mean()) == pytest.approx(0, abs=1e-4)
        assert float(column.std(correction=0)) == pytest.approx(1, abs=1e-4)
    # A column that never changes is 0; a value that is far off is cut.
    parts = [tensors(part).inputs for part in (data.train, data.validation, data.test)]
    assert not torch.cat(parts)[:, 2].any()
    assert float(torch.cat(parts).abs().max()) == INPUT_LIMIT
    # Tasks that are multiples of one column agree in all parts.
    test = tensors(data.test)
    torch.testing.assert_close(test.targets[0], test.targets[2])


def test_noise_is_on_the_flagged_tasks_of_training_and_observed_validation_alone() -> None:
    data = made()
    train, clean = tensors(data.train), tensors(data.clean_train)
    assert torch.equal(train.inputs, clean.inputs)
    assert torch.equal(train.targets[2], clean.targets[2])
    for task in (0, 1):
        assert not torch.equal(train.targets[task], clean.targets[task])
    assert {name: len(rows) for name, rows in data.corrupted.items()} == {
        "value": 280,
        "class": 280,
    }
    changed = (train.targets[0] != clean.targets[0]).nonzero().squeeze(1)
    assert torch.equal(changed, data.corrupted["value"])
    observed, validation = tensors(data.observed_validation), tensors(data.validation)
    assert int((observed.targets[0] != validation.targets[0]).sum()) == 40
    assert torch.equal(observed.targets[2], validation.targets[2])
    quiet = made(noise=0.0)
    assert same(quiet.train, quiet.clean_train)
    assert same(quiet.observed_validation, quiet.validation)
    assert same(quiet.validation, data.validation)
    assert same(quiet.test, data.test)


def test_noise_shares_are_those_of_the_labels() -> None:
    shares = made().noise_shares
    # Of 40 % replaced labels a quarter is right by chance; 40 % carry the variance of the values.
    assert shares["class"] == pytest.approx(0.3, abs=0.04)
    assert shares["value"] == pytest.approx(0.4 / 1.4, abs=0.04)
    assert shares.keys() == {"value", "class"}


def test_noise_share_by_hand() -> None:
    assert noise_share(torch.tensor([1, 2, 3, 0]), torch.tensor([1, 2, 0, 1])) == 0.5
    clean = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    assert noise_share(clean + torch.tensor([1.0, 1.0, -1.0, -1.0]), clean) == 0.5
    assert noise_share(clean, clean) == 0.0
    assert noise_share(torch.ones(3), torch.ones(3)) == 0.0


@pytest.mark.parametrize("kind", ["pair_flip", "heteroscedastic"])
def test_a_kind_of_noise_goes_to_the_tasks_it_fits(kind: str) -> None:
    plain, other = made(), made(noise_kind=kind)
    fits = 1 if kind == "pair_flip" else 0
    for task in (0, 1):
        is_same = torch.equal(
            tensors(plain.train).targets[task], tensors(other.train).targets[task]
        )
        assert is_same == (task != fits)


def test_a_kind_of_noise_that_fits_no_task_is_an_error() -> None:
    table = make_table(tasks=(Task("a", 1, "regression", is_noisy=True), *make_table().tasks[1:]))
    with pytest.raises(ValueError, match=r"one of symmetric, .* for made-up, .* but got 'cauchy'"):
        make_tabular_data(table, noise=0.1, noise_kind="cauchy")
    values = make_table(
        tasks=(Task("a", 1, "regression", is_noisy=True),), targets=make_table().targets[:1]
    )
    with pytest.raises(
        ValueError, match=r"one of gaussian, heavy_tailed, heteroscedastic for made-up"
    ):
        make_tabular_data(values, noise=0.1, noise_kind="pair_flip")


def test_num_train_takes_fewer_rows_and_is_checked() -> None:
    fewer = made(num_train=50)
    assert len(fewer.train) == 50
    assert len(fewer.test) == 200
    for wrong in (0, 701):
        with pytest.raises(ValueError, match=rf"`num_train` in \[1, 700\], but got {wrong}"):
            made(num_train=wrong)


def test_noise_outside_its_range_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Expected `fraction` in \[0, 1\], but got 1\.5"):
        made(noise=1.5)
