"""SARCOS from small made-up .mat files, and from the real ones where EXCESSMTL_DATA names them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from _datasets import make_sarcos_rows as make_rows
from _datasets import write_sarcos
from scipy.io import savemat

from excessmtl_ext.data import MultiTaskData, TensorSplit
from excessmtl_ext.data.sarcos import load_sarcos

NUM_TRAIN_ROWS, NUM_TEST_ROWS = 200, 40


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    write_sarcos(tmp_path / "sarcos", make_rows(NUM_TRAIN_ROWS, 0), make_rows(NUM_TEST_ROWS, 1))
    return tmp_path


@pytest.fixture
def leaky_root(tmp_path: Path) -> Path:
    train, test = make_rows(NUM_TRAIN_ROWS, 0), make_rows(NUM_TEST_ROWS, 1)
    # 30 of the test rows, one of them twice; another shares all but its last torque.
    train[:30], train[30] = test[:30], test[0]
    train[31, :27] = test[35, :27]
    write_sarcos(tmp_path, train, test)
    return tmp_path


def tensors(split: object) -> TensorSplit:
    assert isinstance(split, TensorSplit)
    return split


def same(first: object, second: object) -> bool:
    one, other = tensors(first), tensors(second)
    return torch.equal(one.inputs, other.inputs) and all(
        map(torch.equal, one.targets, other.targets)
    )


def test_tasks_and_splits_have_the_promised_shapes(data_root: Path) -> None:
    data = load_sarcos(data_root, noise=0.8)
    assert [(task.name, task.num_outputs, task.kind, task.is_noisy) for task in data.tasks] == [
        (f"torque_{joint}", 1, "regression", joint <= 2) for joint in range(1, 8)
    ]
    assert [len(part) for part in (data.train, data.validation, data.test, data.clean_train)] == [
        180,
        20,
        NUM_TEST_ROWS,
        180,
    ]
    inputs, targets = data.train.batch(torch.tensor([3, 1, 1]))
    assert isinstance(inputs, torch.Tensor)
    assert (inputs.shape, inputs.dtype) == ((3, 21), torch.float32)
    assert [target is not None and target.shape for target in targets] == [(3,)] * 7


@pytest.mark.parametrize("layout", ["sarcos", "."])
def test_finds_both_layouts(tmp_path: Path, layout: str) -> None:
    write_sarcos(tmp_path / layout, make_rows(20, 0), make_rows(5, 1))
    assert len(load_sarcos(tmp_path).test) == 5


def test_inputs_and_clean_targets_are_standardised_with_training_statistics(
    data_root: Path,
) -> None:
    data = load_sarcos(data_root, noise=1.0)
    clean = tensors(data.clean_train)
    for column in (*clean.inputs.T, *clean.targets):
        assert abs(float(column.mean())) < 1e-5
        assert float(column.std(correction=0)) == pytest.approx(1, abs=1e-5)
    # The test rows are shifted and scaled by those statistics, not by their own: differences keep their ratios.
    rows = torch.from_numpy(make_rows(NUM_TEST_ROWS, 1))
    test = tensors(data.test)
    scale = (test.inputs[1] - test.inputs[0]) / (rows[1, :21] - rows[0, :21])
    torch.testing.assert_close(
        test.inputs[2] - test.inputs[0],
        ((rows[2, :21] - rows[0, :21]) * scale).float(),
        rtol=1e-4,
        atol=1e-4,
    )
    assert abs(float(test.inputs.mean(0).abs().max())) > 0.01


def test_training_and_validation_rows_make_up_the_file(data_root: Path) -> None:
    data = load_sarcos(data_root)
    train, validation = tensors(data.clean_train), tensors(data.validation)
    # Standardising keeps the order of a column's values.
    joined = torch.cat([train.inputs[:, 0], validation.inputs[:, 0]])
    column = torch.from_numpy(make_rows(NUM_TRAIN_ROWS, 0)[:, 0])
    expected = (column - column.mean()) / column.std(correction=0)
    actual = (joined - joined.mean()) / joined.std(correction=0)
    torch.testing.assert_close(actual.sort().values, expected.sort().values.float())


def test_noise_is_on_the_first_two_training_torques_only(data_root: Path) -> None:
    clean, noisy = load_sarcos(data_root), load_sarcos(data_root, noise=0.4)
    assert same(clean.validation, noisy.validation)
    assert same(clean.test, noisy.test)
    assert same(clean.train, noisy.clean_train)
    assert set(noisy.corrupted) == {"torque_1", "torque_2"}
    train, noisy_train = tensors(noisy.clean_train), tensors(noisy.train)
    assert noisy_train.inputs is train.inputs
    for joint, (target, noisy_target) in enumerate(
        zip(train.targets, noisy_train.targets, strict=True), start=1
    ):
        changed = (target != noisy_target).nonzero().flatten().tolist()
        expected = noisy.corrupted[f"torque_{joint}"].tolist() if joint <= 2 else []
        assert changed == expected
        assert len(changed) == (72 if joint <= 2 else 0)
    assert not torch.equal(noisy.corrupted["torque_1"], noisy.corrupted["torque_2"])


def test_the_seed_decides_everything_but_the_test_rows(data_root: Path) -> None:
    first, again, other = (load_sarcos(data_root, noise=0.5, seed=seed) for seed in (0, 0, 1))
    for part in ("train", "validation", "test", "clean_train"):
        assert same(getattr(first, part), getattr(again, part))
    assert not same(first.validation, other.validation)
    assert len(first.test) == len(other.test) == NUM_TEST_ROWS


def test_num_train_takes_fewer_rows(data_root: Path) -> None:
    data = load_sarcos(data_root, noise=0.5, num_train=50)
    assert len(data.train) == len(data.clean_train) == 50
    assert len(data.corrupted["torque_1"]) == 25
    assert len(data.validation) == 20
    for wrong in (0, 181):
        with pytest.raises(
            ValueError, match=rf"Expected `num_train` in \[1, 180\], but got {wrong}"
        ):
            load_sarcos(data_root, num_train=wrong)


def test_test_rows_in_the_training_file_are_warned_of_once(leaky_root: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_sarcos(leaky_root)
    assert [warning.category for warning in caught] == [UserWarning]
    assert str(caught[0].message).startswith(
        "30 of the 40 SARCOS test rows are in the training file"
    )
    assert len(data.train) + len(data.validation) == NUM_TRAIN_ROWS


def test_disjoint_drops_the_training_rows_that_test(leaky_root: Path) -> None:
    # 30 rows and the repeated one; without a warning.
    data = load_sarcos(leaky_root, disjoint=True)
    assert len(data.train) + len(data.validation) == NUM_TRAIN_ROWS - 31
    assert len(data.test) == NUM_TEST_ROWS


def test_a_column_that_never_changes_is_not_nan(tmp_path: Path) -> None:
    rows = make_rows(20, 0)
    rows[:, 4] = 7.0
    write_sarcos(tmp_path, rows, make_rows(5, 1))
    train = tensors(load_sarcos(tmp_path).train)
    assert train.inputs[:, 4].abs().max() == 0


def test_a_missing_folder_is_an_error_that_says_where_to_download(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"hold SARCOS.*no such folder.*gaussianprocess.org"
    ):
        load_sarcos(tmp_path / "nowhere")


def test_a_missing_file_is_an_error_that_names_it(data_root: Path) -> None:
    path = data_root / "sarcos/sarcos_inv_test.mat"
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"Expected {path}.*sarcos_inv.mat.*Download"):
        load_sarcos(data_root)


@pytest.mark.parametrize("content", [b"", b"<html>404 not found</html>", None])
def test_a_damaged_file_is_an_error_that_names_it(data_root: Path, content: bytes | None) -> None:
    path = data_root / "sarcos/sarcos_inv.mat"
    path.write_bytes(path.read_bytes()[:3000] if content is None else content)
    with pytest.raises(
        ValueError, match=rf"Expected {path} to be a MATLAB 5 file.*download it again"
    ):
        load_sarcos(data_root)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"other": np.zeros((20, 28))}, r"hold the variable 'sarcos_inv', but got other"),
        (
            {"sarcos_inv": np.zeros((20, 27))},
            r"floating point \[N, 28\], but got float64 \[20, 27\]",
        ),
        ({"sarcos_inv": np.zeros((20, 28), dtype=np.int32)}, r"but got int32 \[20, 28\]"),
        ({"sarcos_inv": np.full((20, 28), np.nan)}, r"Expected finite numbers.*20 of its rows"),
        ({"sarcos_inv": np.zeros((4, 28))}, r"Expected at least 10 rows.*but got 4"),
    ],
)
def test_a_file_with_other_content_is_an_error(
    data_root: Path, variables: dict[str, np.ndarray], message: str
) -> None:
    savemat(data_root / "sarcos/sarcos_inv.mat", variables)
    with pytest.raises(ValueError, match=message):
        load_sarcos(data_root)


@pytest.mark.real_data
def test_real_sarcos() -> None:
    root = os.environ.get("EXCESSMTL_DATA")
    if root is None:
        pytest.skip("EXCESSMTL_DATA does not name a folder with SARCOS")
    data: MultiTaskData = load_sarcos(root, noise=0.8, disjoint=True)
    assert len(data.test) == 4_449
    num_train = len(data.train)
    assert len(data.corrupted["torque_1"]) == round(0.8 * num_train)
    # The torques are largely linear in the inputs: columns read in another order would not be.
    train, test = tensors(data.clean_train), tensors(data.test)
    targets = torch.stack(train.targets, dim=1)
    solution = torch.linalg.lstsq(train.inputs.double(), targets.double()).solution
    errors = test.inputs.double() @ solution - torch.stack(test.targets, dim=1)
    nmse = errors.square().mean(0) / torch.stack(test.targets).var(1, correction=0)
    assert float(nmse.max()) < 0.35
