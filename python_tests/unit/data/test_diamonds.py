"""The diamonds from a small made-up table, and the real one where the cache has it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from _datasets import diamonds_csv, write_diamonds

from excessmtl_ext.data import TensorSplit, load_diamonds
from excessmtl_ext.data.diamonds import FILES
from excessmtl_ext.data.package_files import cache_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_diamonds(tmp_path / "data")


def tensors(split: object) -> TensorSplit:
    assert isinstance(split, TensorSplit)
    return split


def test_tasks_and_splits_have_the_promised_shapes(root: Path) -> None:
    data = load_diamonds(root, noise=0.5)
    assert [(task.name, task.num_outputs, task.kind, task.is_noisy) for task in data.tasks] == [
        ("price", 1, "regression", False),
        ("cut", 5, "classification", True),
        ("color", 7, "classification", False),
        ("clarity", 8, "classification", False),
    ]
    assert [len(part) for part in (data.train, data.validation, data.test)] == [42, 6, 12]
    train = tensors(data.train)
    assert train.inputs.shape == (42, 6)
    assert [target.dtype for target in train.targets] == [torch.float32, *[torch.int64] * 3]
    assert set(data.corrupted) == {"cut"}
    # By default no label stays right by chance.
    assert data.noise_shares["cut"] == 0.5


def test_grades_are_numbered_from_worst_to_best_and_prices_are_logarithms(tmp_path: Path) -> None:
    header = diamonds_csv().splitlines()[0]
    rows = [
        f'{0.5 + i / 10},"Fair","D","IF",60,55,{round(math.exp(5 + i / 10) * 100)},4,4,3'
        for i in range(19)
    ]
    rows.append('9,"Ideal","J","I1",60,55,1000,4,4,3')
    data = load_diamonds(write_diamonds(tmp_path, "\n".join([header, *rows])))
    everything = [tensors(part) for part in (data.train, data.validation, data.test)]
    for task, (usual, other) in enumerate([(0, 4), (6, 0), (7, 0)], start=1):
        found = torch.cat([part.targets[task] for part in everything])
        assert sorted(found.bincount(minlength=8).tolist())[-2:] == [1, 19]
        assert int(found.bincount().argmax()) == usual
        assert other in found.tolist()
    inputs = torch.cat([part.inputs[:, 0] for part in everything])
    prices = torch.cat([part.targets[0] for part in everything])
    line = inputs < inputs.max()  # without the other stone the price is exponential in the weight
    ratio = torch.corrcoef(torch.stack([inputs[line], prices[line]]))[0, 1]
    assert float(ratio) == pytest.approx(1, abs=1e-4)


def test_stones_with_equal_measurements_are_in_one_part(tmp_path: Path) -> None:
    header, *rows = diamonds_csv().splitlines()
    data = load_diamonds(write_diamonds(tmp_path, "\n".join([header, *rows, *rows])))
    parts = [
        {tuple(row.tolist()) for row in tensors(part).inputs}
        for part in (data.train, data.validation, data.test)
    ]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"Very Good"', '"Excellent"', r"line 4 of .*diamonds\.csv .* but got: cut = 'Excellent'"),
        ("carat", "weight", r"line 2 of .* but got: 'carat'"),
        (",300,", ",x,", None),
        ('"Fair"', '"Fair', r"of .*diamonds\.csv to be a diamond"),
    ],
)
def test_a_damaged_table_is_named_with_the_line(
    tmp_path: Path, old: str, new: str, message: str | None
) -> None:
    content = diamonds_csv()
    if message is None:
        lines = content.splitlines()
        lines[3] = lines[3].replace(lines[3].split(",")[6], "nan", 1)
        content, message = "\n".join(lines), r"line 4 of .* but got: price = nan"
    else:
        content = content.replace(old, new, 1)
    with pytest.raises(ValueError, match=message):
        load_diamonds(write_diamonds(tmp_path, content))


def test_too_few_rows_and_too_large_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"from 10 to 1,000,000 rows in .*diamonds\.csv, but got 3"
    ):
        load_diamonds(write_diamonds(tmp_path / "few", diamonds_csv(3)))
    large = write_diamonds(tmp_path / "large")
    with (large / "diamonds.csv").open("ab") as file:
        file.truncate(FILES.max_bytes + 1)
    with pytest.raises(ValueError, match=r"at most 10,000,000 bytes, but it has 10,000,001"):
        load_diamonds(large)


@pytest.mark.skipif(
    not (cache_folder() / FILES.folder).is_dir(), reason="the cache has no diamonds"
)
def test_the_real_table_is_complete() -> None:
    data = load_diamonds()
    assert sum(len(part) for part in (data.train, data.validation, data.test)) == 53_940
