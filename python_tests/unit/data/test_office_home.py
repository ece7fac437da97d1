"""Office-Home from small made-up JPEGs, and from the real ones where EXCESSMTL_DATA names them."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _datasets import OFFICE_HOME_CLASSES as CLASSES
from _datasets import OFFICE_HOME_IMAGES as NUM_IMAGES
from _datasets import office_home_colour as colour_of
from _datasets import write_office_home
from PIL import Image
from torch import Tensor

from excessmtl_ext.data import MultiTaskData, Split
from excessmtl_ext.data.office_home import DomainSplit, load_office_home, read_image


@pytest.fixture(scope="module")
def images_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that no test changes."""
    root = tmp_path_factory.mktemp("images")
    write_office_home(root / "office_home")
    return root


@pytest.fixture
def own_root(tmp_path: Path) -> Path:
    """A data set that a test may damage."""
    return write_office_home(tmp_path)


def load(root: Path, **options: Any) -> MultiTaskData:
    return load_office_home(root, image_size=8, **options)


def domains(split: Split) -> DomainSplit:
    assert isinstance(split, DomainSplit)
    return split


def files(split: Split) -> list[set[Path]]:
    return [set(domain.paths) for domain in domains(split).domains]


def test_tasks_and_splits_have_the_promised_shapes(images_root: Path) -> None:
    data = load(images_root, noise=0.5)
    assert [(task.name, task.num_outputs, task.kind, task.is_noisy) for task in data.tasks] == [
        ("art", 3, "classification", False),
        ("clipart", 3, "classification", False),
        ("product", 3, "classification", True),
        ("real_world", 3, "classification", False),
    ]
    # The largest domain.
    assert [len(part) for part in (data.train, data.validation, data.test)] == [54, 18, 18]
    inputs, targets = data.train.batch(torch.tensor([0, 50]))
    assert isinstance(inputs, list)
    assert [each.shape for each in inputs] == [(2, 3, 8, 8)] * 4
    assert [target is not None and target.shape for target in targets] == [(2,)] * 4


@pytest.mark.parametrize("layout", ["office_home", "OfficeHomeDataset_10072016", "."])
@pytest.mark.parametrize("last", ["Real World", "Real_World", "RealWorld"])
def test_finds_every_usual_layout(
    images_root: Path, tmp_path: Path, layout: str, last: str
) -> None:
    root = write_office_home(tmp_path / layout)
    (root / "Real World").rename(root / last)
    data = load(tmp_path)
    assert len(data.train) == 54
    # The spelling of a folder does not decide which images test.
    expected, actual = (
        {(path.parent.name, path.name) for path in domains(each.test).domains[3].paths}
        for each in (load(images_root), data)
    )
    assert actual == expected


def test_images_and_labels_belong_together(images_root: Path) -> None:
    split = domains(load(images_root).train)
    inputs, targets = split.batch(torch.arange(len(split)))
    for position, (domain_name, images, labels) in enumerate(
        zip(NUM_IMAGES, inputs, targets, strict=True)
    ):
        paths = split.domains[position].paths
        colours = images * split.statistics.std + split.statistics.mean
        for index in range(len(split)):
            # A smaller domain starts again from its first image.
            path = paths[index % len(paths)]
            assert labels is not None
            assert CLASSES[int(labels[index])] == path.parent.name
            expected = torch.tensor(colour_of(domain_name, path.parent.name, int(path.stem)))
            difference = colours[index] * 255 - expected.view(3, 1, 1)
            assert difference.abs().max() < 6  # JPEG


def test_each_class_of_each_domain_is_split_60_20_20(images_root: Path) -> None:
    data = load(images_root)
    for position, count in enumerate(NUM_IMAGES.values()):
        parts = [
            domains(part).domains[position] for part in (data.train, data.validation, data.test)
        ]
        assert [torch.bincount(part.labels).tolist() for part in parts] == [
            [count - 2 * round(0.2 * count)] * 3,
            [round(0.2 * count)] * 3,
            [round(0.2 * count)] * 3,
        ]
        paths = [path for part in parts for path in part.paths]
        assert len(set(paths)) == len(paths) == 3 * count


def test_the_seed_decides_everything_but_the_test_images(images_root: Path) -> None:
    first, again, other = (load(images_root, seed=seed) for seed in (0, 0, 1))
    assert files(first.train) == files(again.train) != files(other.train)
    assert files(first.validation) == files(again.validation) != files(other.validation)
    assert files(first.test) == files(again.test) == files(other.test)


def test_batches_read_every_image_of_every_domain_once(images_root: Path) -> None:
    split = domains(load(images_root).train)
    labels: list[list[int]] = [[], [], [], []]
    sizes: list[list[int]] = []
    for inputs, targets in split.batches(20):
        assert isinstance(inputs, list)
        sizes.append([len(each) for each in inputs])
        for seen, images, target in zip(labels, inputs, targets, strict=True):
            assert (target is None) == (len(images) == 0)
            seen += [] if target is None else target.tolist()
    # Of 18, 36, 27 and 54 images.
    assert sizes == [[18, 20, 20, 20], [0, 16, 7, 20], [0, 0, 0, 14]]
    assert labels == [domain.labels.tolist() for domain in split.domains]


def test_noise_is_on_the_training_labels_of_product_only(images_root: Path) -> None:
    clean, noisy = load(images_root), load(images_root, noise=0.6)
    assert files(clean.train) == files(noisy.train)
    for position in range(4):
        before, after = (
            domains(split).domains[position].labels for split in (clean.train, noisy.train)
        )
        assert torch.equal(before, domains(noisy.clean_train).domains[position].labels)
        changed = set((before != after).nonzero().flatten().tolist())
        if position != 2:
            assert not changed
            continue
        assert len(noisy.corrupted["product"]) == round(0.6 * len(before))
        assert changed
        assert changed <= set(noisy.corrupted["product"].tolist())
    for part in ("validation", "test"):
        first, second = (domains(getattr(data, part)).domains for data in (clean, noisy))
        assert all(torch.equal(a.labels, b.labels) for a, b in zip(first, second, strict=True))


def test_num_train_takes_fewer_images_of_each_domain(images_root: Path) -> None:
    data = load(images_root, num_train=20, noise=0.5)
    assert [len(paths) for paths in files(data.train)] == [18, 20, 20, 20]
    assert len(data.train) == 20
    assert len(data.corrupted["product"]) == 10
    assert len(data.test) == 18
    for wrong in (0, 55):
        with pytest.raises(
            ValueError, match=rf"Expected `num_train` in \[1, 54\], but got {wrong}"
        ):
            load(images_root, num_train=wrong)


def test_a_pickled_split_reads_the_same_images(images_root: Path) -> None:
    split = load(images_root, noise=0.5).train
    again = pickle.loads(pickle.dumps(split))
    indices = torch.tensor([5, 53, 0])
    first, second = split.batch(indices), again.batch(indices, epoch=3)
    assert all(map(torch.equal, first.inputs, second.inputs))
    assert all(
        torch.equal(one, other)
        for one, other in zip(first.targets, second.targets, strict=True)
        if one is not None and other is not None
    )


def test_batches_follow_the_device_of_the_split(images_root: Path, device: torch.device) -> None:
    inputs, targets = load(images_root).test.to(device).batch(torch.arange(2))
    assert {each.device.type for each in (*inputs, *targets) if each is not None} == {device.type}


def test_training_images_are_standardised(images_root: Path) -> None:
    split = domains(load(images_root).train)
    inputs = [
        images for domain_inputs, _ in split.batches(100) for images in domain_inputs if len(images)
    ]
    pixels = torch.cat(inputs).movedim(1, 0).flatten(1)
    # Statistics of 64 of the 135 images.
    assert pixels.mean(1).abs().max() < 0.2
    assert (pixels.std(1) - 1).abs().max() < 0.1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_any_mode_become_three_channels(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.jpg" if mode in ("L", "CMYK") else "image.png")
    Image.new("RGB", (300, 200), (200, 200, 200)).convert(mode).save(path)
    pixels = read_image(path, 16)
    assert pixels.shape == (3, 16, 16)
    torch.testing.assert_close(pixels, torch.full((3, 16, 16), 200 / 255), atol=0.02, rtol=0)


def write_lists(folder: Path) -> None:
    """Lists with the labels of another order, in which one image of each class tests and one validates."""
    folder.mkdir()
    for domain, count in NUM_IMAGES.items():
        lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
        for label, class_name in enumerate(reversed(CLASSES)):
            for number in range(count):
                part = {0: "test", 1: "val"}.get(number, "train")
                name = domain.replace(" ", "_")
                lines[part].append(f"{name}/{class_name}/{number:05}.jpg {label}\n")
        for part, content in lines.items():
            (folder / f"{domain.replace(' ', '_')}_{part}.txt").write_text("".join(content))


@pytest.mark.parametrize("end", ["", "\n  \n"], ids=["as written", "with empty lines"])
def test_split_lists_are_followed(images_root: Path, tmp_path: Path, end: str) -> None:
    write_lists(tmp_path / "lists")
    with (tmp_path / "lists" / "Art_test.txt").open("a") as file:
        file.write(end)
    data = load(images_root, split_lists=tmp_path / "lists")
    for position, count in enumerate(NUM_IMAGES.values()):
        for part, numbers in (("test", {0}), ("validation", {1}), ("train", set(range(2, count)))):
            domain = domains(getattr(data, part)).domains[position]
            assert {int(path.stem) for path in domain.paths} == numbers
            # Numbered by name, as without lists.
            assert [CLASSES[label] for label in domain.labels.tolist()] == [
                path.parent.name for path in domain.paths
            ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Art/Bed/00001.jpg", r"line 4 of .*Art_test.txt to be `Domain/Class/Image.jpg LABEL`"),
        ("Art/Sofa/00001.jpg 7", r"with a class of .*but got 'Art/Sofa/00001.jpg 7'"),
        ("Art/Bed/00003.jpg 2", r"one label for each class.*gives 2 to Bed.*to Alarm_Clock"),
        ("Art/Bed/00001.jpg 0", r"names Art/Bed/00001.jpg, which is in Art_val.txt already"),
    ],
)
def test_a_wrong_list_is_an_error_that_names_the_line(
    images_root: Path, tmp_path: Path, line: str, message: str
) -> None:
    lists = tmp_path / "lists"
    write_lists(lists)
    with (lists / "Art_test.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        load(images_root, split_lists=lists)


def test_a_missing_list_or_listed_image_is_an_error(images_root: Path, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    write_lists(lists)
    with (lists / "Art_test.txt").open("a") as file:
        file.write("Art/Bed/00099.jpg 0\n")
    with pytest.raises(FileNotFoundError, match=r"Art/Bed/00099.jpg, which line 4 of .*is missing"):
        load(images_root, split_lists=lists)
    (lists / "Art_val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"Art_val.txt, but .*Pass split_lists=None"):
        load(images_root, split_lists=lists)


def test_a_missing_folder_is_an_error_that_says_where_to_download(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"hold Office-Home.*no such folder.*hemanthdv.org"):
        load(tmp_path / "nowhere")


def test_a_missing_domain_or_class_is_an_error_that_names_it(own_root: Path) -> None:
    (own_root / "Clipart" / "Bed").rename(own_root / "Bed")
    with pytest.raises(FileNotFoundError, match=r"same class folders.*Clipart lacks Bed"):
        load(own_root)
    (own_root / "Real World").rename(own_root / "Photos")
    with pytest.raises(FileNotFoundError, match=r"Expected .*Real World, but .*Photos.*Download"):
        load(own_root)


def test_a_domain_without_images_is_an_error(own_root: Path) -> None:
    for path in (own_root / "Art").glob("*/*.jpg"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"Expected images in .*Art for the train split, but got none"
    ):
        load(own_root)


def test_a_damaged_image_is_an_error_that_names_it(own_root: Path) -> None:
    data = load(own_root)
    path = domains(data.test).domains[0].paths[0]
    for content in (path.read_bytes()[:300], b"<html>404 not found</html>"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"Expected {path} to be a JPEG or PNG image.*Unpack"):
            data.test.batch(torch.tensor([0]))


def test_image_size_below_one_is_an_error(images_root: Path) -> None:
    with pytest.raises(ValueError, match="Expected `image_size` of at least 1, but got 0"):
        load_office_home(images_root, image_size=0)


def test_without_pillow_the_error_says_what_to_install(
    images_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "\.\[train\]" in a clone'):
        load(images_root)


@pytest.mark.real_data
def test_real_office_home() -> None:
    root = os.environ.get("EXCESSMTL_DATA")
    if root is None or not (Path(root) / "office_home").is_dir():
        pytest.skip("EXCESSMTL_DATA does not name a folder with office_home")
    data = load_office_home(root, noise=0.8)
    assert [task.num_outputs for task in data.tasks] == [65] * 4
    total = sum(
        len(paths) for part in (data.train, data.validation, data.test) for paths in files(part)
    )
    assert total == 15_588
    inputs, _ = data.train.batch(torch.arange(2))
    assert [each.shape for each in inputs if isinstance(each, Tensor)] == [(2, 3, 224, 224)] * 4
