"""NYUv2 from small made-up frames, and from real ones where EXCESSMTL_DATA names them."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _datasets import make_nyuv2_frame, write_nyuv2
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from excessmtl_ext.data import Batch, Split
from excessmtl_ext.data.nyuv2 import Frame, FrameSplit, augment, load_nyuv2, read_frame

HEIGHT, WIDTH = 12, 16
NUM_TRAIN, NUM_TEST = 20, 3


def make_frame(number: int) -> dict[str, np.ndarray]:
    return make_nyuv2_frame(number, HEIGHT, WIDTH)


def write_frames(root: Path) -> Path:
    return write_nyuv2(root, num_train=NUM_TRAIN, num_test=NUM_TEST, height=HEIGHT, width=WIDTH)


@pytest.fixture(scope="module")
def frames_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that no test changes."""
    return write_frames(tmp_path_factory.mktemp("frames"))


@pytest.fixture
def own_root(tmp_path: Path) -> Path:
    """A data set that a test may damage."""
    return write_frames(tmp_path)


def frames(split: Split) -> FrameSplit:
    assert isinstance(split, FrameSplit)
    return split


def everything(
    split: Split, epoch: int | None = None, indices: list[int] | None = None
) -> list[Tensor]:
    """Returns inputs and targets of all samples of a split, or of some."""
    inputs, targets = split.batch(torch.tensor(indices or range(len(split))), epoch=epoch)
    assert isinstance(inputs, Tensor)
    return [inputs, *(target for target in targets if target is not None)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_tasks_and_splits_have_the_promised_shapes(frames_root: Path) -> None:
    data = load_nyuv2(frames_root, noise=0.5)
    assert [(task.name, task.num_outputs, task.kind, task.is_noisy) for task in data.tasks] == [
        ("segmentation", 13, "segmentation", True),
        ("depth", 1, "depth", False),
        ("normals", 3, "normals", False),
    ]
    assert [len(part) for part in (data.train, data.validation, data.test)] == [18, 2, NUM_TEST]
    inputs, segmentation, depth, normals = everything(data.test)
    assert inputs.shape == normals.shape == (NUM_TEST, 3, HEIGHT, WIDTH)
    assert segmentation.shape == (NUM_TEST, HEIGHT, WIDTH)
    assert depth.shape == (NUM_TEST, 1, HEIGHT, WIDTH)
    assert [each.dtype for each in (inputs, segmentation, depth, normals)] == [
        torch.float32,
        torch.int64,
        torch.float32,
        torch.float32,
    ]


def test_frames_are_read_as_they_lie_in_the_files(frames_root: Path) -> None:
    frame, arrays = read_frame(frames_root / "nyuv2/val", 2), make_frame(102)
    assert torch.equal(frame.image, torch.from_numpy(arrays["image"]).permute(2, 0, 1))
    assert torch.equal(frame.segmentation, torch.from_numpy(arrays["label"]).long())
    assert torch.equal(frame.depth[0], torch.from_numpy(arrays["depth"][..., 0]))
    assert torch.equal(frame.normals, torch.from_numpy(arrays["normal"]).permute(2, 0, 1))


def test_training_and_validation_frames_make_up_the_training_folder(frames_root: Path) -> None:
    data = load_nyuv2(frames_root)
    train, validation = frames(data.train), frames(data.validation)
    assert sorted(train.numbers + validation.numbers) == list(range(NUM_TRAIN))
    other = load_nyuv2(frames_root, seed=1)
    assert frames(other.validation).numbers != validation.numbers
    assert frames(other.test).numbers == frames(data.test).numbers == (0, 1, 2)


def test_training_images_are_standardised(frames_root: Path) -> None:
    inputs = everything(load_nyuv2(frames_root).train)[0]
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(3))


def test_noise_is_on_the_segmentation_of_the_chosen_training_frames(frames_root: Path) -> None:
    data = load_nyuv2(frames_root, noise=0.5)
    chosen = data.corrupted["segmentation"].tolist()
    assert len(chosen) == 9
    noisy, clean = everything(data.train), everything(data.clean_train)
    assert same([noisy[0], *noisy[2:]], [clean[0], *clean[2:]])
    differs = (noisy[1] != clean[1]).flatten(1).any(1).nonzero().flatten().tolist()
    assert differs == chosen
    # Every labelled pixel of a chosen frame is drawn anew: one in 13 keeps its label.
    labelled = clean[1][chosen] != -1
    changed = (noisy[1] != clean[1])[chosen][labelled].double().mean()
    assert abs(float(changed) - 12 / 13) < 5 * (12 / 169 / int(labelled.sum())) ** 0.5
    assert torch.equal(noisy[1] == -1, clean[1] == -1)
    assert same(everything(data.test), everything(load_nyuv2(frames_root).test))
    assert same(everything(data.validation), everything(load_nyuv2(frames_root).validation))


def test_more_noise_keeps_the_corruption_of_less(frames_root: Path) -> None:
    less, more = (load_nyuv2(frames_root, noise=noise) for noise in (0.3, 0.7))
    chosen = less.corrupted["segmentation"]
    assert set(chosen.tolist()) < set(more.corrupted["segmentation"].tolist())
    assert torch.equal(everything(less.train)[1][chosen], everything(more.train)[1][chosen])


def test_a_sample_is_the_same_in_any_order_and_any_batch(frames_root: Path) -> None:
    data = load_nyuv2(frames_root, noise=0.5)
    whole = everything(data.train, epoch=4)
    for index in (17, 3, 3):
        again = load_nyuv2(frames_root, noise=0.5)
        alone = everything(again.train, epoch=4, indices=[index])
        assert same(alone, [each[index : index + 1] for each in whole])


def test_augmentation_is_new_in_each_epoch_and_off_without_one(frames_root: Path) -> None:
    data = load_nyuv2(frames_root)
    first, again, other = (everything(data.train, epoch=epoch) for epoch in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)
    assert not same(first, everything(data.train))
    assert same(everything(data.train), everything(load_nyuv2(frames_root).train))
    assert same(everything(data.validation), everything(data.validation, epoch=0))
    assert same(first, everything(data.clean_train, epoch=0))


class Batches(Dataset[Batch]):
    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Batch:
        return self.split.batch(torch.tensor([index, 10 + index]), epoch=2)


def test_worker_processes_read_the_same_samples(frames_root: Path) -> None:
    data = load_nyuv2(frames_root, noise=0.5)
    loader = DataLoader(
        Batches(pickle.loads(pickle.dumps(data.train))), batch_size=None, num_workers=2
    )
    for index, (inputs, targets) in enumerate(loader):
        expected_inputs, expected = Batches(data.train)[index]
        assert torch.equal(inputs, torch.as_tensor(expected_inputs))
        assert same(targets, [target for target in expected if target is not None])


def test_batches_read_every_frame_once_in_order(frames_root: Path) -> None:
    data = load_nyuv2(frames_root)
    batches = list(data.train.batches(7))
    assert [len(batch.inputs) for batch in batches] == [7, 7, 4]
    inputs = torch.cat([torch.as_tensor(batch.inputs) for batch in batches])
    assert torch.equal(inputs, everything(data.train)[0])


def test_batches_follow_the_device_of_the_split(frames_root: Path, device: torch.device) -> None:
    inputs, targets = load_nyuv2(frames_root).test.to(device).batch(torch.arange(1))
    assert isinstance(inputs, Tensor)
    assert {inputs.device.type, *(t.device.type for t in targets if t is not None)} == {device.type}


def ramp_frame() -> Frame:
    """A frame whose every pixel says where it is: columns in the image, rows in the depth, both in the classes."""
    rows = torch.arange(HEIGHT).view(-1, 1).expand(HEIGHT, WIDTH)
    columns = torch.arange(WIDTH).expand(HEIGHT, WIDTH)
    return Frame(
        image=columns.float().expand(3, -1, -1).clone(),
        segmentation=(rows * WIDTH + columns).clone(),
        depth=(1.0 + rows).unsqueeze(0),
        normals=torch.tensor([0.6, 0.0, 0.8]).view(3, 1, 1).expand(3, HEIGHT, WIDTH).clone(),
    )


def test_augmentation_crops_all_targets_alike_and_divides_depth_by_the_scale() -> None:
    seen: set[tuple[float, bool]] = set()
    frame = ramp_frame()
    for draw in range(60):
        result = augment(frame, torch.Generator().manual_seed(draw))
        rows, columns = result.segmentation // WIDTH, result.segmentation % WIDTH
        is_mirrored = bool(columns[0, 0] > columns[0, -1])
        scale = float(((1.0 + rows) / result.depth[0])[0, 0])
        seen.add((round(scale, 3), is_mirrored))
        # The same crop for all: depth says the row that the class says, within half a pixel the image the column.
        torch.testing.assert_close(result.depth[0] * scale, 1.0 + rows)
        assert (result.image[0] - columns).abs().max() <= 0.5
        # A crop of 1 / scale of the frame.
        assert abs(int(columns.max() - columns.min()) + 1 - WIDTH / scale) < 1
        assert abs(int(rows.max() - rows.min()) + 1 - HEIGHT / scale) < 1
        sign = -1 if is_mirrored else 1
        expected = torch.tensor([sign * 0.6, 0.0, 0.8]).view(3, 1, 1).expand_as(result.normals)
        assert torch.equal(result.normals, expected)
    assert seen == {(scale, mirrored) for scale in (1.0, 1.2, 1.5) for mirrored in (False, True)}
    assert same(list(vars(frame).values()), list(vars(ramp_frame()).values()))


def test_missing_labels_stay_missing_in_an_augmented_frame() -> None:
    frame = ramp_frame()
    holes = torch.rand(HEIGHT, WIDTH) < 0.3
    frame = replace(
        frame,
        segmentation=torch.where(holes, -1, 5),
        depth=torch.where(holes, 0.0, frame.depth),
        normals=torch.where(holes, 0.0, frame.normals),
    )
    for draw in range(10):
        result = augment(frame, torch.Generator().manual_seed(draw))
        holes = result.segmentation == -1
        assert set(result.segmentation.unique().tolist()) == {-1, 5}
        assert torch.equal(result.depth[0] == 0, holes)
        assert torch.equal((result.normals == 0).all(0), holes)
        lengths = result.normals[:, ~holes].norm(dim=0)
        torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_size_resizes_images_and_picks_labels(frames_root: Path) -> None:
    data = load_nyuv2(frames_root, size=(6, 8))
    inputs, segmentation, depth, normals = everything(data.train, epoch=0)
    assert inputs.shape[-2:] == segmentation.shape[-2:] == depth.shape[-2:] == (6, 8)
    assert set(segmentation.unique().tolist()) <= set(range(-1, 13))
    lengths = normals.norm(dim=1)
    valid = lengths > 0
    torch.testing.assert_close(lengths[valid], torch.ones(int(valid.sum())))
    with pytest.raises(ValueError, match=r"Expected `size` to be a height and a width.*\(0, 8\)"):
        load_nyuv2(frames_root, size=(0, 8))


@pytest.mark.parametrize("num_train", [0, 19])
def test_num_train_out_of_range_is_an_error(frames_root: Path, num_train: int) -> None:
    assert len(load_nyuv2(frames_root, num_train=5).train) == 5
    with pytest.raises(
        ValueError, match=rf"Expected `num_train` in \[1, 18\], but got {num_train}"
    ):
        load_nyuv2(frames_root, num_train=num_train)


def test_a_missing_folder_is_an_error_that_says_where_to_download(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"hold NYUv2.*no such folder.*lorenmt/mtan"):
        load_nyuv2(tmp_path / "nowhere")


def test_a_missing_frame_is_an_error_that_names_it(own_root: Path) -> None:
    path = own_root / "nyuv2/val/depth/1.npy"
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"Expected {path}, which other folders"):
        load_nyuv2(own_root)


def test_a_missing_kind_is_an_error_that_names_it(own_root: Path) -> None:
    (own_root / "nyuv2/train/normal").rename(own_root / "nyuv2/train/normals")
    with pytest.raises(FileNotFoundError, match=r"train/normal/0.npy.*a folder with depth, image"):
        load_nyuv2(own_root)


def test_one_training_frame_cannot_be_split(tmp_path: Path) -> None:
    write_nyuv2(tmp_path, num_train=1, num_test=1, height=HEIGHT, width=WIDTH)
    with pytest.raises(
        ValueError, match=r"at least 2 frames in .*, to train and to validate on, but got 1"
    ):
        load_nyuv2(tmp_path)


def test_a_frame_that_goes_missing_during_training_is_an_error_that_names_it(
    own_root: Path,
) -> None:
    data = load_nyuv2(own_root)
    path = own_root / "nyuv2/val/depth/1.npy"
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"Expected {path}, but it is missing"):
        everything(data.test)


def test_a_strange_name_is_an_error(own_root: Path) -> None:
    np.save(own_root / "nyuv2/train/label/average.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"files named by number.*but got average.npy"):
        load_nyuv2(own_root)


@pytest.mark.parametrize(
    ("kind", "array", "message"),
    [
        (
            "image",
            np.zeros((3, HEIGHT, WIDTH), np.float32),
            r"shape \[H, W, 3\].*but got \[3, 12, 16\]",
        ),
        (
            "depth",
            np.zeros((HEIGHT, WIDTH), np.float32),
            r"\[H, W, 1\] with H, W = 12, 16.*\[12, 16\]",
        ),
        ("normal", np.zeros((WIDTH, HEIGHT, 3), np.float32), r"\[H, W, 3\].*but got \[16, 12, 3\]"),
        (
            "label",
            np.full((HEIGHT, WIDTH), 39.0),
            r"classes from 0 to 12.*from 39 to 39.*40 classes",
        ),
        ("label", np.full((HEIGHT, WIDTH), 0.5), r"classes from 0 to 12"),
        ("depth", np.full((HEIGHT, WIDTH, 1), "x"), r"to hold numbers, but got <U1"),
    ],
)
def test_an_array_of_another_shape_or_content_is_an_error(
    own_root: Path, kind: str, array: np.ndarray, message: str
) -> None:
    path = own_root / f"nyuv2/val/{kind}/1.npy"
    np.save(path, array)
    with pytest.raises(
        ValueError, match=f"Expected {path}.*{message}" if kind != "image" else message
    ):
        load_nyuv2(own_root).test.batch(torch.tensor([1]))


def test_a_truncated_file_is_an_error_that_names_it(own_root: Path) -> None:
    path = own_root / "nyuv2/val/image/0.npy"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(
        ValueError, match=rf"Expected {path} to be an array of numbers.*500 bytes failed"
    ):
        load_nyuv2(own_root).test.batch(torch.tensor([0]))


MARKS: list[str] = []


def leave_mark(mark: str) -> None:
    MARKS.append(mark)


class Bomb:
    """Unpickling it leaves a mark."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (leave_mark, ("unpickled",))


def test_a_pickled_array_is_refused_and_not_unpickled(own_root: Path) -> None:
    path = own_root / "nyuv2/val/label/0.npy"
    np.save(path, np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=rf"Expected {path} to be an array of numbers"):
        load_nyuv2(own_root).test.batch(torch.tensor([0]))
    assert MARKS == []
    np.load(path, allow_pickle=True)
    assert MARKS == ["unpickled"]


@pytest.mark.real_data
def test_real_nyuv2() -> None:
    root = os.environ.get("EXCESSMTL_DATA")
    if root is None:
        pytest.skip("EXCESSMTL_DATA does not name a folder with NYUv2")
    data = load_nyuv2(root, noise=0.4)
    inputs, segmentation, depth, normals = everything(data.train, epoch=0, indices=[0, 1, 2, 3])
    assert inputs.shape == normals.shape == (4, 3, 288, 384)
    assert set(segmentation.unique().tolist()) <= set(range(-1, 13))
    assert float(depth.min()) >= 0
    assert 0.3 < float(depth[depth > 0].median()) < 10
    lengths = normals.norm(dim=1)
    assert ((lengths - 1).abs() < 0.02)[lengths > 0].double().mean() > 0.99
    assert len(data.corrupted["segmentation"]) == round(0.4 * len(data.train))


@pytest.mark.real_data
def test_real_normals_have_their_horizontal_component_first() -> None:
    root = os.environ.get("EXCESSMTL_DATA")
    if root is None:
        pytest.skip("EXCESSMTL_DATA does not name a folder with NYUv2")
    # What mirroring relies on: a wall that recedes to the right says so in the component whose sign is changed.
    split = frames(load_nyuv2(root).clean_train)
    for number in split.numbers[:3]:
        frame = read_frame(split.folder, number)
        slope = frame.depth[0, :, 8:] - frame.depth[0, :, :-8]
        normals = frame.normals[:, :, 4:-4]
        smooth = (slope.abs() < 0.3) & (normals != 0).any(0)
        joint = torch.corrcoef(torch.cat([slope[None], normals])[:, smooth])[0, 1:].abs()
        assert float(joint[0]) > 0.5
        assert int(joint.argmax()) == 0
