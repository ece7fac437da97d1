"""MultiMNIST from small made-up MNIST files, and from the real ones where EXCESSMTL_DATA names them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from excessmtl_ext.data import MultiTaskData, TensorSplit, load_multimnist
from excessmtl_ext.data.digit_pairs import PairGeometry, overlay

NUM_TRAIN_DIGITS, NUM_TEST_DIGITS = 200, 40


def write_idx(path: Path, values: torch.Tensor) -> None:
    header = bytes((0, 0, 8, values.dim())) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(header + bytes(values.flatten().tolist()))


def write_mnist(raw: Path) -> None:
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", NUM_TRAIN_DIGITS), ("t10k", NUM_TEST_DIGITS)):
        images = torch.randint(256, (count, 28, 28), generator=generator)
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", torch.arange(count) % 10)


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    write_mnist(tmp_path / "mnist" / "MNIST" / "raw")
    return tmp_path


def parts(data: MultiTaskData) -> list[TensorSplit]:
    splits = [data.train, data.validation, data.test, data.clean_train]
    assert all(isinstance(split, TensorSplit) for split in splits)
    return splits  # pyright: ignore[reportReturnType]


def same(first: TensorSplit, second: TensorSplit) -> bool:
    return torch.equal(first.inputs, second.inputs) and all(
        map(torch.equal, first.targets, second.targets)
    )


@pytest.mark.parametrize("layout", ["mnist/MNIST/raw", "MNIST/raw", "raw", "."])
def test_finds_mnist_in_every_usual_layout(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "root"
    write_mnist(root / layout)
    assert len(load_multimnist(root).train) == 180


def test_splits_tasks_and_batches_have_the_promised_shapes(data_root: Path) -> None:
    data = load_multimnist(data_root, noise=0.8)
    assert [len(split) for split in parts(data)] == [180, 20, NUM_TEST_DIGITS, 180]
    assert [(task.name, task.num_outputs, task.is_noisy) for task in data.tasks] == [
        ("top_left", 10, False),
        ("bottom_right", 10, True),
    ]
    inputs, targets = data.train.batch(torch.tensor([3, 1, 1]))
    assert isinstance(inputs, torch.Tensor)
    assert inputs.shape == (3, 1, 28, 28)
    assert inputs.dtype == torch.float32
    assert torch.equal(inputs[1], inputs[2])
    assert [target is not None and target.shape for target in targets] == [(3,), (3,)]


def test_training_inputs_are_standardised(data_root: Path) -> None:
    inputs = load_multimnist(data_root).train.batch(torch.arange(180)).inputs
    assert isinstance(inputs, torch.Tensor)
    assert abs(float(inputs.mean())) < 1e-5
    assert abs(float(inputs.std(correction=0)) - 1) < 1e-5


def test_noise_is_on_the_bottom_right_training_labels_only(data_root: Path) -> None:
    clean, noisy = load_multimnist(data_root), load_multimnist(data_root, noise=0.8)
    assert same(parts(clean)[1], parts(noisy)[1])
    assert same(parts(clean)[2], parts(noisy)[2])
    train, noisy_train = parts(clean)[0], parts(noisy)[0]
    assert torch.equal(train.inputs, noisy_train.inputs)
    assert torch.equal(train.targets[0], noisy_train.targets[0])
    changed = (train.targets[1] != noisy_train.targets[1]).nonzero().flatten()
    corrupted = noisy.corrupted["bottom_right"]
    assert len(corrupted) == 144
    assert set(changed.tolist()) <= set(corrupted.tolist())


def test_clean_train_is_train_without_noise(data_root: Path) -> None:
    train, _, _, clean = parts(load_multimnist(data_root, noise=0.8))
    assert same(clean, parts(load_multimnist(data_root))[0])
    assert clean.inputs is train.inputs


def test_the_seed_decides_everything_but_the_test_set(data_root: Path) -> None:
    first, again, other = (load_multimnist(data_root, noise=0.5, seed=seed) for seed in (0, 0, 1))
    assert all(same(a, b) for a, b in zip(parts(first), parts(again), strict=True))
    assert [same(a, b) for a, b in zip(parts(first), parts(other), strict=True)] == [
        False,
        False,
        True,
        False,
    ]


def test_num_train_takes_fewer_pairs(data_root: Path) -> None:
    data = load_multimnist(data_root, num_train=50, noise=0.8)
    assert len(data.train) == 50
    assert len(data.corrupted["bottom_right"]) == 40
    assert len(data.validation) == 20


@pytest.mark.parametrize("num_train", [0, 181])
def test_num_train_out_of_range_is_an_error(data_root: Path, num_train: int) -> None:
    with pytest.raises(
        ValueError, match=rf"Expected `num_train` in \[1, 180\], but got {num_train}"
    ):
        load_multimnist(data_root, num_train=num_train)


def test_overlay_is_the_canvas_of_sener_and_koltun() -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randint(256, (2, 5, 28, 28), generator=generator, dtype=torch.uint8)
    canvas = torch.zeros(5, 36, 36, dtype=torch.uint8)
    canvas[:, 0:28, 0:28] = left
    canvas[:, 6:34, 6:34] = right
    canvas[:, 6:28, 6:28] = torch.maximum(left[:, 6:28, 6:28], right[:, 0:22, 0:22])
    expected = torch.nn.functional.interpolate(
        canvas.unsqueeze(1).float(), size=(28, 28), mode="nearest-exact"
    )
    actual = overlay(left, right, PairGeometry(offset=6, canvas=36, size=28))
    assert torch.equal(actual, expected.to(torch.uint8))


def test_a_missing_folder_is_an_error_that_says_how_to_download(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"Expected `data_root`.*no such folder.*download=True"
    ):
        load_multimnist(tmp_path / "nowhere")


def test_a_folder_without_mnist_is_an_error_that_lists_it(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(FileNotFoundError, match=r"a folder with holiday.jpg.*download=True"):
        load_multimnist(tmp_path)


def test_a_missing_file_is_an_error_that_names_it(data_root: Path) -> None:
    path = data_root / "mnist/MNIST/raw/t10k-labels-idx1-ubyte"
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"Expected {path}.*train-labels-idx1-ubyte.*download"
    ):
        load_multimnist(data_root)


@pytest.mark.parametrize("kept", [0, 3, 10, 1000, -1])
def test_a_truncated_file_is_an_error_that_names_it(data_root: Path, kept: int) -> None:
    path = data_root / "mnist/MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"Expected {path}.*but got.*download MNIST again"):
        load_multimnist(data_root)


def test_a_file_that_is_not_mnist_is_an_error(data_root: Path) -> None:
    path = data_root / "mnist/MNIST/raw/train-labels-idx1-ubyte"
    path.write_bytes(b"<html>404 not found</html>")
    with pytest.raises(ValueError, match=r"idx header 00 00 08 01.*error page"):
        load_multimnist(data_root)


def test_images_of_another_size_are_an_error_that_names_the_file(data_root: Path) -> None:
    path = data_root / "mnist/MNIST/raw/train-images-idx3-ubyte"
    write_idx(path, torch.zeros(NUM_TRAIN_DIGITS, 32, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"28 x 28 pixels in {path}, but got \[32, 32\]"):
        load_multimnist(data_root)


def test_an_empty_folder_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is: an empty folder\..*download=True"):
        load_multimnist(tmp_path)


def test_labels_that_do_not_belong_to_the_images_are_an_error(data_root: Path) -> None:
    path = data_root / "mnist/MNIST/raw/train-labels-idx1-ubyte"
    write_idx(path, torch.zeros(7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"Expected as many labels.*200, but got 7"):
        load_multimnist(data_root)


@pytest.mark.real_data
def test_real_mnist() -> None:
    root = os.environ.get("EXCESSMTL_DATA")
    if root is None:
        pytest.skip("EXCESSMTL_DATA does not name a folder with MNIST")
    data = load_multimnist(root, noise=0.8)
    assert [len(split) for split in parts(data)] == [54_000, 6_000, 10_000, 54_000]
    assert len(data.corrupted["bottom_right"]) == 43_200
    # Every test digit is once top-left: the label counts are those of the MNIST test set.
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert torch.bincount(parts(data)[2].targets[0]).tolist() == counts
    assert torch.bincount(parts(data)[2].targets[1]).tolist() == counts
