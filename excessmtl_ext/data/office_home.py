"""Office-Home: everyday objects in four styles (Venkateswara et al. 2017). Each style is a task with its own images."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from excessmtl_ext.data.channel_statistics import (
    ChannelStatistics,
    channel_statistics,
    evenly_spaced,
)
from excessmtl_ext.data.folder_search import find_folder, listing
from excessmtl_ext.data.label_noise import corrupt_classes
from excessmtl_ext.data.multitask_data import Batch, MultiTaskData, Task
from excessmtl_ext.data.regular_file import open_regular, read_bounded
from excessmtl_ext.data.seeding import seeded_generator

DOMAINS = ("Art", "Clipart", "Product", "Real World")

# He et al. 2024, Sec. 5.
NOISY_DOMAIN = "Product"

# Of each class of each domain: 60 % train, 20 % validation, 20 % test.
VALIDATION_SHARE = 0.2
TEST_SHARE = 0.2

# The test images do not depend on the seed of a run: results of different seeds are about the same test set.
TEST_SPLIT_SEED = 0

DEFAULT_IMAGE_SIZE = 224
MAX_IMAGE_SIZE = 4_096

# Of an image that is decoded: 100 MB as RGB. A few kilobytes of PNG can promise a hundred times as many.
MAX_PIXELS = 1 << 25

# A list of all images of a domain has 300 KB.
MAX_LIST_BYTES = 1 << 26

# Of the number of a class in a split list.
MAX_LABEL_DIGITS = 9

_CPU = torch.device("cpu")
_SUFFIXES = {".jpg", ".jpeg", ".png"}
_FORMATS = ("JPEG", "PNG")
# As Pillow names them: what converts to RGB of 8 bits without loss of range.
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
_LAYOUTS = ("office_home", "OfficeHomeDataset_10072016", "OfficeHome", ".")
_DOWNLOAD = "Download Office-Home from https://www.hemanthdv.org/officeHomeDataset.html and unpack it there."


@dataclass(frozen=True)
class LabelledImages:
    """Images of one domain.

    Attributes:
        paths: Their files.
        labels: Their classes, int64 [N].
    """

    paths: tuple[Path, ...]
    labels: Tensor


@dataclass(frozen=True)
class DomainSplit:
    """Images of several domains that are read from their files when they are asked for.

    Attributes:
        domains: One set of images per task.
        statistics: Standardise the images.
        image_size: Height and width that images are resized to.
        device: Where batches lie.
    """

    domains: tuple[LabelledImages, ...]
    statistics: ChannelStatistics
    image_size: int
    device: torch.device = _CPU

    def __len__(self) -> int:
        """Returns the number of images of the largest domain."""
        return max(len(domain.paths) for domain in self.domains)

    def batch(self, indices: Tensor, *, epoch: int | None = None) -> Batch:
        """Returns one image of each domain for each index, and its class; nothing is augmented.

        A domain with n images gives number ``index % n``: in an epoch over the indices, smaller domains start again
        from their first image, so that every batch has images of every task.
        """
        return self._batch([indices % len(domain.paths) for domain in self.domains])

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Iterates over every image of every domain once, in order.

        Where a domain has run out, its inputs are empty and its target is None.
        """
        for start in range(0, len(self), batch_size):
            yield self._batch(
                [
                    torch.arange(
                        min(start, len(domain.paths)), min(start + batch_size, len(domain.paths))
                    )
                    for domain in self.domains
                ]
            )

    def to(self, device: torch.device) -> "DomainSplit":
        """Returns this split with batches on ``device``; the files stay where they are."""
        return replace(self, device=device)

    def _batch(self, indices: list[Tensor]) -> Batch:
        """Reads the images with these numbers, one list of numbers per domain."""
        inputs: list[Tensor] = []
        targets: list[Tensor | None] = []
        for domain, numbers in zip(self.domains, indices, strict=True):
            images = torch.empty(len(numbers), 3, self.image_size, self.image_size)
            for row, number in enumerate(numbers.tolist()):
                images[row] = read_image(domain.paths[number], self.image_size)
            inputs.append(self.statistics.standardise(images))
            targets.append(domain.labels[numbers] if len(numbers) else None)
        return Batch(inputs, targets).to(self.device)


def load_office_home(
    data_root: str | Path,
    *,
    noise: float = 0.0,
    seed: int = 0,
    num_train: int | None = None,
    image_size: int = DEFAULT_IMAGE_SIZE,
    split_lists: str | Path | None = None,
) -> MultiTaskData:
    """Prepares Office-Home in the layout ``Domain/Class/*.jpg``.

    Four tasks, ``art``, ``clipart``, ``product`` and ``real_world``, of as many classes as there are folders (65).
    Each task has its own images, see `DomainSplit`. Of each class of each domain 60 % train, 20 % validate and 20 %
    test; the test images are the same for every seed. Images are resized to a square, not augmented, and standardised
    with statistics of 64 training images. Only the training labels of ``product`` carry noise.

    Images are read when they are needed and checked then; this function checks which files there are.

    Args:
        data_root: Folder with ``Art``, ``Clipart``, ``Product`` and ``Real World`` (or ``Real_World``), or the folder
            above it.
        noise: Share of the training labels of ``product`` that is replaced, see `corrupt_classes`.
        seed: Decides training and validation images and the noise.
        num_train: Number of training images of each domain, or all of those that have fewer; all when None.
        image_size: Height and width that images are resized to.
        split_lists: Folder with split lists to use instead, ``Art_train.txt``, ``Art_val.txt``, ``Art_test.txt``,
            ..., ``Real_World_test.txt``: one ``Domain/Class/Image.jpg LABEL`` on each line.

    Raises:
        FileNotFoundError: a folder, a list or an image that a list names is missing; says which, and where to
            download the images.
        ValueError: a list is not what its name says, a domain has no images to train or test on, or ``num_train`` or
            ``image_size`` is out of range.
        ModuleNotFoundError: Pillow is not installed.
    """
    _import_pillow()
    if image_size < 1:
        raise ValueError(f"Expected `image_size` of at least 1, but got {image_size}.")
    if image_size > MAX_IMAGE_SIZE:
        raise ValueError(
            f"Expected `image_size` of at most {MAX_IMAGE_SIZE:,}, but got {image_size}."
        )
    root = find_folder(
        Path(data_root),
        _LAYOUTS,
        marker="Art",
        holds="Office-Home",
        example="Art/Alarm_Clock/00001.jpg",
        download=_DOWNLOAD,
    )
    folders = {domain: _find_domain(root, domain) for domain in DOMAINS}
    classes = _find_classes(folders)
    if split_lists is None:
        parts = {
            domain: _generate_lists(domain, folders[domain], classes, seed) for domain in DOMAINS
        }
    else:
        parts = {
            domain: _read_lists(Path(split_lists), domain, folders[domain], classes)
            for domain in DOMAINS
        }
    largest = max(len(part["train"].paths) for part in parts.values())
    num_train = largest if num_train is None else num_train
    if not 1 <= num_train <= largest:
        raise ValueError(f"Expected `num_train` in [1, {largest}], but got {num_train}.")
    train = [_subset(parts[domain]["train"], num_train, seed, domain) for domain in DOMAINS]

    paths = [path for images in train for path in images.paths]
    statistics = channel_statistics(
        read_image(paths[position], image_size) for position in evenly_spaced(len(paths))
    )

    def split(domains: list[LabelledImages]) -> DomainSplit:
        return DomainSplit(tuple(domains), statistics, image_size)

    noisy_position = DOMAINS.index(NOISY_DOMAIN)
    noisy = corrupt_classes(
        train[noisy_position].labels, num_classes=len(classes), fraction=noise, seed=seed
    )
    noisy_train = list(train)
    noisy_train[noisy_position] = replace(train[noisy_position], labels=noisy.labels)
    tasks = tuple(
        Task(_task_name(domain), len(classes), is_noisy=domain == NOISY_DOMAIN)
        for domain in DOMAINS
    )
    return MultiTaskData(
        tasks=tasks,
        train=split(noisy_train),
        validation=split([parts[domain]["val"] for domain in DOMAINS]),
        test=split([parts[domain]["test"] for domain in DOMAINS]),
        clean_train=split(train),
        corrupted={_task_name(NOISY_DOMAIN): noisy.corrupted},
    )


def read_image(path: Path, image_size: int) -> Tensor:
    """Reads an image file as float32 [3, image_size, image_size] in [0, 1]; its sides are scaled separately.

    Raises:
        ValueError: the file is no image, or is truncated.
    """
    image_module = _import_pillow()
    size = (image_size, image_size)
    try:
        # No other format, whatever the name says: some have decoders that start programs.
        with open_regular(path) as file, image_module.open(file, formats=_FORMATS) as image:
            if image.mode not in _MODES:
                # Such as 16 bits a pixel, which Pillow would cut at 255: all white.
                raise ValueError(f"its pixels are of mode {image.mode!r}, and not of 8 bits")
            # Lets the JPEG decoder shrink large photographs, to no less than this size.
            image.draft("RGB", size)
            if math.prod(image.size) > MAX_PIXELS:
                width, height = image.size
                raise ValueError(f"it has {width:,} x {height:,} pixels, more than {MAX_PIXELS:,}")
            resized = image.convert("RGB").resize(size, image_module.Resampling.BILINEAR)
    except FileNotFoundError:
        raise
    except Exception as error:  # of a damaged file Pillow raises whatever its parser trips over
        raise ValueError(
            f"Expected {path} to be a JPEG or PNG image, but reading it failed: {error}. Unpack the download again."
        ) from error
    pixels = torch.from_numpy(np.array(resized))
    return pixels.permute(2, 0, 1).float().div_(255)


def _import_pillow() -> ModuleType:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Office-Home comes as JPEG files, which Pillow reads: pip install ".[train]" in a clone.',
            name=error.name,
        ) from error
    return Image


def _task_name(domain: str) -> str:
    return domain.lower().replace(" ", "_")


def _find_domain(root: Path, domain: str) -> Path:
    """Returns the folder of a domain; the last one is spelled with a blank, an underscore or neither."""
    candidates = [root / domain.replace(" ", blank) for blank in (" ", "_", "")]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(
        f"Expected {candidates[0]}, but {root} is: {listing(root)}. {_DOWNLOAD}"
    )


def _find_classes(folders: Mapping[str, Path]) -> dict[str, int]:
    """Returns the number of each class, in the order of the names, after checking that all domains have the same."""
    names = {
        domain: {entry.name for entry in folder.iterdir() if entry.is_dir()}
        for domain, folder in folders.items()
    }
    all_names = sorted(set.union(*names.values()))
    for domain, found in names.items():
        missing = sorted(set(all_names) - found)
        if missing or not found:
            raise FileNotFoundError(
                f"Expected the same class folders in every domain, but {folders[domain]} lacks "
                f"{', '.join(missing[:8]) or 'all'}. {_DOWNLOAD}"
            )
    return {name: number for number, name in enumerate(all_names)}


def _generate_lists(
    domain: str, folder: Path, classes: Mapping[str, int], seed: int
) -> dict[str, LabelledImages]:
    """Splits each class of a domain at random: first the test images, by a fixed seed, then the others by ``seed``."""
    parts: dict[str, list[tuple[Path, int]]] = {"train": [], "val": [], "test": []}
    for name, number in classes.items():
        paths = sorted(
            path for path in (folder / name).iterdir() if path.suffix.lower() in _SUFFIXES
        )
        purpose = ("split", "office_home", domain, name)
        num_test, num_validation = (
            round(share * len(paths)) for share in (TEST_SHARE, VALIDATION_SHARE)
        )
        order = torch.randperm(
            len(paths), generator=seeded_generator(TEST_SPLIT_SEED, *purpose, "test")
        ).tolist()
        test, rest = order[:num_test], order[num_test:]
        again = torch.randperm(len(rest), generator=seeded_generator(seed, *purpose)).tolist()
        shuffled = [rest[position] for position in again]
        chosen = {
            "test": test,
            "val": shuffled[:num_validation],
            "train": shuffled[num_validation:],
        }
        for part, positions in chosen.items():
            parts[part] += [(paths[position], number) for position in sorted(positions)]
    return {part: _labelled_images(folder, part, images) for part, images in parts.items()}


def _read_lists(
    lists: Path, domain: str, folder: Path, classes: Mapping[str, int]
) -> dict[str, LabelledImages]:
    """Reads the three lists of a domain. Classes are numbered by name; the numbers in the lists are only checked."""
    name_of_label: dict[int, str] = {}
    part_of_path: dict[Path, str] = {}
    result: dict[str, LabelledImages] = {}
    for part in ("train", "val", "test"):
        file = lists / f"{domain.replace(' ', '_')}_{part}.txt"
        if not file.is_file():
            raise FileNotFoundError(
                f"Expected {file}, but {lists} is: {listing(lists)}. Pass split_lists=None to split by the seed."
            )
        images: list[tuple[Path, int]] = []
        for line_number, line in enumerate(_read_lines(file), start=1):
            if not line.strip():
                continue
            location, _, label = line.strip().rpartition(" ")
            pieces = location.split("/")
            is_label = label.isdecimal() and len(label) <= MAX_LABEL_DIGITS
            if len(pieces) != 3 or not is_label or pieces[1] not in classes:
                raise ValueError(
                    f"Expected line {line_number} of {file} to be `Domain/Class/Image.jpg LABEL` with a class of "
                    f"{folder}, but got {line!r}."
                )
            name, path = pieces[1], folder / pieces[1] / pieces[2]
            if name_of_label.setdefault(int(label), name) != name:
                raise ValueError(
                    f"Expected one label for each class, but line {line_number} of {file} gives {label} to {name}, "
                    f"and another gave it to {name_of_label[int(label)]}."
                )
            if path in part_of_path:
                raise ValueError(
                    f"Expected every image in one list once, but line {line_number} of {file} names {location}, which "
                    f"is in {part_of_path[path]} already."
                )
            if not path.is_file():
                raise FileNotFoundError(
                    f"Expected {path}, which line {line_number} of {file} names, but it is missing. {_DOWNLOAD}"
                )
            part_of_path[path] = file.name
            images.append((path, classes[name]))
        result[part] = _labelled_images(folder, part, images)
    return result


def _read_lines(file: Path) -> list[str]:
    try:
        return read_bounded(file, MAX_LIST_BYTES, "a split list").decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected {file} to be text, but it is not UTF-8: {error}.") from error


def _labelled_images(folder: Path, part: str, images: list[tuple[Path, int]]) -> LabelledImages:
    if not images:
        raise ValueError(
            f"Expected images in {folder} for the {part} split, but got none: a split by the seed needs 3 images in "
            f"some class. {_DOWNLOAD}"
        )
    labels = torch.tensor([label for _, label in images], dtype=torch.int64)
    return LabelledImages(tuple(path for path, _ in images), labels)


def _subset(images: LabelledImages, num_images: int, seed: int, domain: str) -> LabelledImages:
    """Returns ``num_images`` of the images at random, or all where there are fewer."""
    if num_images >= len(images.paths):
        return images
    generator = seeded_generator(seed, "subset", "office_home", domain)
    chosen = torch.randperm(len(images.paths), generator=generator)[:num_images].sort().values
    return LabelledImages(
        tuple(images.paths[position] for position in chosen.tolist()), images.labels[chosen]
    )
