"""SARCOS: inverse dynamics of a robot arm, seven regression tasks (Vijayakumar & Schaal 2000)."""

import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from excessmtl_ext.data.folder_search import find_folder, listing
from excessmtl_ext.data.label_noise import corrupt_values, noise_share
from excessmtl_ext.data.mat_file import MatFileError, read_matrix
from excessmtl_ext.data.multitask_data import MultiTaskData, Task, TensorSplit
from excessmtl_ext.data.seeding import seeded_generator

# Columns of a row: positions, velocities and accelerations of seven joints, then their torques.
NUM_INPUTS = 21
NUM_TORQUES = 7

# He et al. 2024, Sec. 5: the torques that carry noise are the first two.
NUM_NOISY = 2

VALIDATION_SHARE = 0.1

# Ten times the rows of the public training file: 112 MB.
MAX_ROWS = 500_000

# Below this a tenth is no row to validate on.
MIN_TRAIN_ROWS = 10

_KEYS = {"train": "sarcos_inv", "test": "sarcos_inv_test"}
_LAYOUTS = ("sarcos", ".")
_DOWNLOAD = (
    "Download sarcos_inv.mat and sarcos_inv_test.mat from http://www.gaussianprocess.org/gpml/data/ "
    "into one folder."
)


def load_sarcos(
    data_root: str | Path,
    *,
    noise: float = 0.0,
    seed: int = 0,
    num_train: int | None = None,
    disjoint: bool = False,
) -> MultiTaskData:
    """Reads the two SARCOS files, into memory.

    Seven tasks, ``torque_1`` to ``torque_7``, regressed from the 21 positions, velocities and accelerations of the
    joints. A random tenth of the training rows validates; the rows of the test file test. Inputs and targets are
    standardised with mean and deviation of the clean training rows. Only the first two torques carry noise, each on
    samples of its own and only in training.

    The public training file contains nearly all rows of the public test file (4,446 of 4,449): a model that
    memorises them has a low test error. ``disjoint`` removes them from the training data; otherwise they stay, as in
    published results, with a warning.

    Args:
        data_root: Folder with both files, or the folder above it where they lie in ``sarcos``.
        noise: Share of the training samples whose torque is corrupted, see `corrupt_values`.
        seed: Decides the validation rows and the noise.
        num_train: Number of training rows; all when None.
        disjoint: Drop the training rows that are in the test file too.

    Raises:
        FileNotFoundError: the folder or a file is missing; says which, and where to download them.
        ValueError: a file is not what its name says, or ``num_train`` is out of range.

    Warns:
        UserWarning: test rows are in the training data, unless ``disjoint``. Names their number.
    """
    folder = find_folder(
        Path(data_root),
        _LAYOUTS,
        marker="sarcos_inv*.mat",
        holds="SARCOS",
        example="sarcos_inv.mat",
        download=_DOWNLOAD,
    )
    train_rows, test_rows = _read_rows(folder, "train"), _read_rows(folder, "test")
    in_test = _is_among(train_rows, test_rows)
    if disjoint:
        train_rows = train_rows[~in_test]
    elif in_test.any():
        num_leaked = int(_is_among(test_rows, train_rows).sum())
        warnings.warn(
            f"{num_leaked:,} of the {len(test_rows):,} SARCOS test rows are in the training file too: test errors will "
            "be too good. Pass disjoint=True (--disjoint) to train without them.",
            UserWarning,
            stacklevel=2,
        )
    if len(train_rows) < MIN_TRAIN_ROWS:
        raise ValueError(
            f"Expected at least {MIN_TRAIN_ROWS} rows to train on in {folder / 'sarcos_inv.mat'}, "
            f"but got {len(train_rows)}{' that are not in the test file' if disjoint else ''}."
        )
    order = torch.randperm(len(train_rows), generator=seeded_generator(seed, "split", "sarcos"))
    num_validation = round(VALIDATION_SHARE * len(train_rows))
    available = len(train_rows) - num_validation
    num_train = available if num_train is None else num_train
    if not 1 <= num_train <= available:
        raise ValueError(f"Expected `num_train` in [1, {available}], but got {num_train}.")
    rows = torch.from_numpy(train_rows)
    train = rows[order[num_validation : num_validation + num_train]]
    validation = rows[order[:num_validation]]

    mean, std = train.mean(0), train.std(0, correction=0)
    # A column that never changes says nothing; without this it would be NaN.
    std[std == 0] = 1.0

    def standardised(part: Tensor, name: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        values = ((part - mean) / std).float()
        if not values.isfinite().all():
            raise ValueError(
                f"Expected the rows of {folder / name} to be finite when they are standardised with mean and deviation "
                "of the training rows, but some are not. Delete it and download it again."
            )
        return values[:, :NUM_INPUTS].contiguous(), values[:, NUM_INPUTS:].T.contiguous().unbind()

    tasks = tuple(
        Task(f"torque_{joint + 1}", 1, "regression", is_noisy=joint < NUM_NOISY)
        for joint in range(NUM_TORQUES)
    )
    inputs, clean = standardised(train, "sarcos_inv.mat")
    noisy = {
        task.name: corrupt_values(target, fraction=noise, seed=seed, stream=task.name)
        for task, target in zip(tasks, clean, strict=True)
        if task.is_noisy
    }
    targets = tuple(
        noisy[task.name].labels if task.is_noisy else target
        for task, target in zip(tasks, clean, strict=True)
    )
    validation_inputs, validation_targets = standardised(validation, "sarcos_inv.mat")
    observed = tuple(
        corrupt_values(target, fraction=noise, seed=seed, stream=f"{task.name}/validation").labels
        if task.is_noisy
        else target
        for task, target in zip(tasks, validation_targets, strict=True)
    )
    return MultiTaskData(
        tasks=tasks,
        train=TensorSplit(inputs, targets),
        validation=TensorSplit(validation_inputs, validation_targets),
        test=TensorSplit(*standardised(torch.from_numpy(test_rows), "sarcos_inv_test.mat")),
        clean_train=TensorSplit(inputs, clean),
        corrupted={name: labels.corrupted for name, labels in noisy.items()},
        observed_validation=TensorSplit(validation_inputs, observed),
        noise_shares={
            task.name: noise_share(noisy[task.name].labels, target)
            for task, target in zip(tasks, clean, strict=True)
            if task.is_noisy
        },
    )


def _read_rows(folder: Path, part: str) -> NDArray[np.float64]:
    """Returns the rows of one file, float64 [N, 28], after checking it."""
    key = _KEYS[part]
    path = folder / f"{key}.mat"
    if not path.is_file():
        raise FileNotFoundError(f"Expected {path}, but {folder} is: {listing(folder)}. {_DOWNLOAD}")
    num_columns = NUM_INPUTS + NUM_TORQUES

    def is_table(shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and shape[1] == num_columns and 1 <= shape[0] <= MAX_ROWS

    try:
        rows = read_matrix(path, key, is_table, f"[N, {num_columns}]")
    except LookupError as error:
        raise ValueError(
            f"Expected {path} to hold the variable {key!r}, but got {error.args[0]}. {_DOWNLOAD}"
        ) from error
    except TypeError as error:
        raise ValueError(
            f"Expected {key!r} in {path} to be floating point {error}. At most {MAX_ROWS:,} rows are read. {_DOWNLOAD}"
        ) from error
    except MatFileError as error:
        raise ValueError(
            f"Expected {path} to be a MATLAB 5 file, but reading its {path.stat().st_size:,} bytes failed: {error}. "
            "Is it an error page or an incomplete download? Delete it and download it again."
        ) from error
    # Standardised, the numbers are float32; squares of larger ones would leave float64.
    is_bad = ~(np.abs(rows) <= np.finfo(np.float32).max)
    if is_bad.any():
        raise ValueError(
            f"Expected finite numbers within the range of float32 in {path}, but {int(is_bad.any(axis=1).sum())} of "
            "its rows have others. Delete it and download it again."
        )
    return np.ascontiguousarray(rows, dtype=np.float64)


def _is_among(rows: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Returns which rows are also in ``others``, in all their columns."""
    # Adding 0.0 turns -0.0 into 0.0: equal numbers are then equal bytes.
    others_bytes = {row.tobytes() for row in others + 0.0}
    return np.fromiter((row.tobytes() in others_bytes for row in rows + 0.0), bool, len(rows))
