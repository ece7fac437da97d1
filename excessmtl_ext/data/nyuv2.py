"""NYUv2: segmentation, depth and normals of indoor scenes (Silberman et al. 2012), as Liu et al. 2019 lay it out."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from excessmtl_ext.data.channel_statistics import (
    ChannelStatistics,
    channel_statistics,
    evenly_spaced,
)
from excessmtl_ext.data.folder_search import find_folder, listing
from excessmtl_ext.data.label_noise import choose_corrupted, corrupt_pixels
from excessmtl_ext.data.multitask_data import IGNORED_CLASS, Batch, MultiTaskData, Task
from excessmtl_ext.data.regular_file import open_regular
from excessmtl_ext.data.seeding import seeded_generator

NUM_CLASSES = 13
TASKS = (
    Task("segmentation", NUM_CLASSES, "segmentation", is_noisy=True),
    Task("depth", 1, "depth"),
    Task("normals", 3, "normals"),
)

VALIDATION_SHARE = 0.1

# Of a frame, 150 times those of the public files: 200 MB as float32 image.
MAX_PIXELS = 4_096 * 4_096

# Liu et al. 2019: a crop of 1 / scale of height and width, enlarged to full size.
CROP_SCALES = (1.0, 1.2, 1.5)

# Folder -> channels of its arrays; 0 stands for [H, W] without channels.
_CHANNELS = {"image": 3, "label": 0, "depth": 1, "normal": 3}
_LAYOUTS = ("nyuv2", ".")
_NUMBER = re.compile(r"0|[1-9][0-9]*")
_CPU = torch.device("cpu")
_DOWNLOAD = (
    "Download the preprocessed NYUv2 (288 x 384 pixels, 13 classes, .npy files) that "
    "https://github.com/lorenmt/mtan links to, and unpack it there."
)


@dataclass(frozen=True)
class Frame:
    """One frame: image [3, H, W], segmentation int64 [H, W], depth [1, H, W] in metres, normals [3, H, W]."""

    image: Tensor
    segmentation: Tensor
    depth: Tensor
    normals: Tensor


@dataclass(frozen=True)
class FrameSplit:
    """Frames that are read from their files when they are asked for.

    Attributes:
        folder: ``train`` or ``val`` of the data set.
        numbers: The numbers of the frames, as their files are named.
        statistics: Standardise the images.
        size: Height and width to resize frames to; None leaves them as they are.
        seed: Of augmentation and noise.
        corrupted: Positions in ``numbers`` of the frames whose segmentation labels are replaced.
        augments: An epoch's samples are cropped and flipped.
        device: Where batches lie.
    """

    folder: Path
    numbers: tuple[int, ...]
    statistics: ChannelStatistics
    size: tuple[int, int] | None
    seed: int
    corrupted: frozenset[int] = frozenset()
    augments: bool = False
    device: torch.device = _CPU

    def __len__(self) -> int:
        """Returns the number of frames."""
        return len(self.numbers)

    def batch(self, indices: Tensor, *, epoch: int | None = None) -> Batch:
        """Returns standardised images and the targets of the three tasks; augmented if ``epoch`` is given."""
        frames = [self._frame(index, epoch) for index in indices.tolist()]
        images = torch.stack([frame.image for frame in frames])
        targets: list[Tensor | None] = [
            torch.stack([frame.segmentation for frame in frames]),
            torch.stack([frame.depth for frame in frames]),
            torch.stack([frame.normals for frame in frames]),
        ]
        return Batch(self.statistics.standardise(images), targets).to(self.device)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Iterates over all frames in order."""
        for indices in torch.arange(len(self)).split(batch_size):
            yield self.batch(indices)

    def to(self, device: torch.device) -> "FrameSplit":
        """Returns this split with batches on ``device``; the files stay where they are."""
        return replace(self, device=device)

    def _frame(self, index: int, epoch: int | None) -> Frame:
        """Reads one frame. Noise comes before augmentation: a pixel keeps its wrong label in every crop."""
        number = self.numbers[index]
        frame = read_frame(self.folder, number, self.size)
        if index in self.corrupted:
            labels = corrupt_pixels(
                frame.segmentation, num_classes=NUM_CLASSES, seed=self.seed, sample=number
            )
            frame = replace(frame, segmentation=labels)
        if epoch is None or not self.augments:
            return frame
        return augment(frame, seeded_generator(self.seed, "augmentation", epoch, index))


def load_nyuv2(
    data_root: str | Path,
    *,
    noise: float = 0.0,
    seed: int = 0,
    num_train: int | None = None,
    size: tuple[int, int] | None = None,
) -> MultiTaskData:
    """Prepares NYUv2 in the layout ``{train,val}/{image,label,depth,normal}/N.npy``.

    Three tasks: ``segmentation`` of 13 classes, ``depth`` in metres, ``normals``. The frames in ``val`` test, as in
    the literature; a random tenth of those in ``train`` validates. Training frames are cropped and flipped anew each
    epoch (see `augment`). Images are standardised with statistics of 64 training frames; depth stays in metres, for
    its relative error. Only the training labels of segmentation carry noise: on the chosen frames, every pixel's.

    Frames are read when they are needed and checked then; this function checks which files there are, and by the
    headers of the images that all have one size, unless they are resized.

    Args:
        data_root: Folder with ``train`` and ``val``, or the folder above it where they lie in ``nyuv2``.
        noise: Share of the training frames whose segmentation labels are replaced, see `corrupt_pixels`.
        seed: Decides the validation frames, the noise and the augmentation.
        num_train: Number of training frames; all when None.
        size: Height and width to resize frames to, for small runs; None keeps the files' size.

    Raises:
        FileNotFoundError: the folder or a file is missing; says which, and where to download them.
        ValueError: a file is not what its name says, or ``num_train`` or ``size`` is out of range.
    """
    if size is not None and not (min(size) >= 1 and math.prod(size) <= MAX_PIXELS):
        raise ValueError(
            f"Expected `size` to be a height and a width of at least 1 with at most {MAX_PIXELS:,} pixels, "
            f"but got {size}."
        )
    folder = find_folder(
        Path(data_root),
        _LAYOUTS,
        marker="train/image",
        holds="NYUv2",
        example="train/image/0.npy",
        download=_DOWNLOAD,
    )
    numbers = _find_numbers(folder / "train")
    if len(numbers) < 2:
        raise ValueError(
            f"Expected at least 2 frames in {folder / 'train'}, to train and to validate on, but got {len(numbers)}."
        )
    test_numbers = _find_numbers(folder / "val")
    if size is None:
        # The frames of a batch are stacked; an evaluation takes its own.
        _check_sizes(folder / "train", numbers)
        _check_sizes(folder / "val", test_numbers)
    order = torch.randperm(
        len(numbers), generator=seeded_generator(seed, "split", "nyuv2")
    ).tolist()
    num_validation = max(1, round(VALIDATION_SHARE * len(numbers)))
    available = len(numbers) - num_validation
    num_train = available if num_train is None else num_train
    if not 1 <= num_train <= available:
        raise ValueError(f"Expected `num_train` in [1, {available}], but got {num_train}.")

    def pick(positions: Sequence[int]) -> tuple[int, ...]:
        return tuple(numbers[position] for position in sorted(positions))

    train = pick(order[num_validation : num_validation + num_train])
    statistics = channel_statistics(
        read_frame(folder / "train", train[position], size).image
        for position in evenly_spaced(len(train))
    )
    corrupted = choose_corrupted(len(train), fraction=noise, seed=seed)

    clean_train = FrameSplit(folder / "train", train, statistics, size, seed, augments=True)
    return MultiTaskData(
        tasks=TASKS,
        train=replace(clean_train, corrupted=frozenset(corrupted.tolist())),
        validation=FrameSplit(
            folder / "train", pick(order[:num_validation]), statistics, size, seed
        ),
        test=FrameSplit(folder / "val", test_numbers, statistics, size, seed),
        clean_train=clean_train,
        corrupted={"segmentation": corrupted},
    )


def read_frame(folder: Path, number: int, size: tuple[int, int] | None = None) -> Frame:
    """Reads and checks the four files of a frame, and resizes it if asked to.

    Images are resized bilinearly, labels to the nearest: neither classes nor "no label" can be averaged.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or has another shape or other values than its folder promises.
    """
    paths = {kind: folder / kind / f"{number}.npy" for kind in _CHANNELS}
    arrays = {kind: _read_array(path) for kind, path in paths.items()}
    height, width = arrays["image"].shape[:2] if arrays["image"].ndim == 3 else (0, 0)
    for kind, channels in _CHANNELS.items():
        expected = (height, width, channels) if channels else (height, width)
        if arrays[kind].shape != expected or not arrays[kind].size:
            shape = ["H", "W", *([channels] if channels else [])]
            raise ValueError(
                f"Expected {paths[kind]} to have shape [{', '.join(map(str, shape))}]"
                f"{'' if kind == 'image' else f' with H, W = {height}, {width} of its image'}, "
                f"but got {list(arrays[kind].shape)}. {_DOWNLOAD}"
            )
    labels = arrays["label"]
    whole = np.rint(labels)
    if (whole != labels).any() or whole.min() < IGNORED_CLASS or whole.max() >= NUM_CLASSES:
        raise ValueError(
            f"Expected {paths['label']} to hold classes from 0 to {NUM_CLASSES - 1}, or {IGNORED_CLASS} for none, "
            f"but got values from {labels.min():g} to {labels.max():g}. Other versions of NYUv2 have 40 classes. "
            f"{_DOWNLOAD}"
        )

    def channels_first(kind: str) -> Tensor:
        array = np.ascontiguousarray(arrays[kind].transpose(2, 0, 1), dtype=np.float32)
        return torch.from_numpy(array)

    frame = Frame(
        channels_first("image"),
        torch.from_numpy(whole.astype(np.int64)),
        channels_first("depth"),
        channels_first("normal"),
    )
    return frame if size is None or size == (height, width) else _resized(frame, size)


def augment(frame: Frame, generator: torch.Generator) -> Frame:
    """Crops a frame at a random place, enlarges it to full size, and mirrors it half the time (Liu et al. 2019).

    The scale is 1, 1.2 or 1.5. What is enlarged looks nearer by as much, so that depth is divided by the scale. In a
    mirror the normals' horizontal component changes its sign.
    """
    height, width = frame.segmentation.shape
    scale = CROP_SCALES[int(torch.randint(len(CROP_SCALES), (), generator=generator))]
    crop_height, crop_width = max(1, int(height / scale)), max(1, int(width / scale))
    top = int(torch.randint(height - crop_height + 1, (), generator=generator))
    left = int(torch.randint(width - crop_width + 1, (), generator=generator))
    is_mirrored = bool(torch.randint(2, (), generator=generator))
    if scale != 1.0:
        rows, columns = slice(top, top + crop_height), slice(left, left + crop_width)
        crop = Frame(
            frame.image[:, rows, columns],
            frame.segmentation[rows, columns],
            frame.depth[:, rows, columns],
            frame.normals[:, rows, columns],
        )
        frame = _resized(crop, (height, width))
        frame = replace(frame, depth=frame.depth / scale)
    if is_mirrored:
        normals = frame.normals.flip(-1)
        normals[0] = -normals[0]
        frame = Frame(
            frame.image.flip(-1), frame.segmentation.flip(-1), frame.depth.flip(-1), normals
        )
    return frame


def _resized(frame: Frame, size: tuple[int, int]) -> Frame:
    def nearest(labels: Tensor) -> Tensor:
        return functional.interpolate(labels[None], size, mode="nearest-exact")[0]

    # Antialiasing acts only where the image shrinks.
    image = functional.interpolate(frame.image[None], size, mode="bilinear", antialias=True)[0]
    # Classes are small integers: exact in float32.
    segmentation = nearest(frame.segmentation[None].float())[0].long()
    return Frame(image, segmentation, nearest(frame.depth), nearest(frame.normals))


def _find_numbers(part: Path) -> tuple[int, ...]:
    """Returns the numbers of the frames in ``train`` or ``val``, after checking that every frame has its four files."""
    found: dict[str, set[int]] = {}
    for kind in _CHANNELS:
        files = list((part / kind).glob("*.npy"))
        # 01.npy is not 1.npy: one of two such files would be passed over.
        strange = [file for file in files if not _NUMBER.fullmatch(file.stem)]
        if strange:
            raise ValueError(
                f"Expected files named by number without leading zeros, 0.npy, 1.npy, 2.npy, ..., in {part / kind}, "
                f"but got {min(strange).name}. Rename it, or move it elsewhere."
            )
        if not files:
            raise FileNotFoundError(
                f"Expected {part / kind / '0.npy'} and others, but {part} is: {listing(part)}, and {part / kind} is: "
                f"{listing(part / kind)}. {_DOWNLOAD}"
            )
        found[kind] = {int(file.stem) for file in files}
    for kind, numbers in found.items():
        missing = sorted(set.union(*found.values()) - numbers)
        if missing:
            raise FileNotFoundError(
                f"Expected {part / kind / f'{missing[0]}.npy'}, which other folders of {part} have, but it is missing, "
                f"with {len(missing) - 1} others. {_DOWNLOAD}"
            )
    return tuple(sorted(found["image"]))


def _check_sizes(folder: Path, numbers: Sequence[int]) -> None:
    """Raises ValueError unless the headers of all images promise one size, so that batches can be made of them."""
    first: tuple[int, ...] = ()
    for number in numbers:
        path = folder / "image" / f"{number}.npy"
        shape = _map_array(path).shape
        first = first or shape
        if len(shape) != 3 or shape[2] != _CHANNELS["image"]:
            read_frame(folder, number)  # says what is wrong
        if shape != first:
            raise ValueError(
                f"Expected frames of one size, {list(first)} as in {numbers[0]}.npy, but got {list(shape)} in {path}. "
                "Pass a size (--image-size) to resize them to."
            )


def _map_array(path: Path) -> np.ndarray:
    """Maps an array of numbers into memory, which reads its header only, and checks what that promises."""
    if not path.is_file():
        raise FileNotFoundError(f"Expected {path}, but it is missing. {_DOWNLOAD}")
    open_regular(path).close()
    try:
        # Mapped and not loaded: never unpickled, as a pickle can run code, never taken for an archive, and a header
        # that promises more than the file holds allocates nothing.
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # of a damaged header numpy raises whatever its parser trips over
        raise ValueError(
            f"Expected {path} to be an array of numbers, but reading its {path.stat().st_size:,} bytes failed: "
            f"{error}. Delete it and unpack the download again."
        ) from error
    if array.dtype.kind not in "fiu":
        raise ValueError(f"Expected {path} to hold numbers, but got {array.dtype}. {_DOWNLOAD}")
    if math.prod(array.shape[:2]) > MAX_PIXELS or array.ndim > 3:
        raise ValueError(
            f"Expected {path} to be a frame of at most {MAX_PIXELS:,} pixels, but got {list(array.shape)}. {_DOWNLOAD}"
        )
    return array


def _read_array(path: Path) -> np.ndarray:
    """Reads an array of numbers that float32 holds."""
    array = np.array(_map_array(path))
    for is_good, what in (
        (np.isfinite(array), "finite numbers"),
        (
            np.abs(array.astype(np.float64)) <= np.finfo(np.float32).max,
            "numbers that float32 holds",
        ),
    ):
        if not is_good.all():
            raise ValueError(
                f"Expected {what} in {path}, but {int((~is_good).sum()):,} are not. "
                "Delete it and unpack the download again."
            )
    return array
