"""Prices and grades of 53,940 round-cut diamonds: tasks that their inputs cannot settle, each to another degree.

The table of ggplot2 (Wickham 2016, "ggplot2: Elegant Graphics for Data Analysis"), which travels in the wheel of
plotnine.
"""

from __future__ import annotations

import csv
import math
from functools import cache
from pathlib import Path

import torch

from excessmtl_ext.data.multitask_data import MultiTaskData, Task
from excessmtl_ext.data.package_files import PackageFiles
from excessmtl_ext.data.tabular import Table, make_tabular_data

FILES = PackageFiles(
    title="the diamonds of ggplot2",
    folder="diamonds",
    requirement="plotnine==0.15.9",
    archive="plotnine-0.15.9-py3-none-any.whl",
    sha256="36f4526235b3ddd9ea379dd677093ea2ee1b58ab98adec1bde891930283448cd",
    members={"diamonds.csv": "plotnine/data/diamonds.csv"},
    max_bytes=10_000_000,
    size_mb=1.6,
    licence="MIT",
    citation="H. Wickham, ggplot2: Elegant Graphics for Data Analysis, Springer 2016",
)

INPUTS = ("carat", "depth", "table", "x", "y", "z")
# From worst to best; the order matters to noise that moves a label to the next class only.
GRADES = {
    "cut": ("Fair", "Good", "Very Good", "Premium", "Ideal"),
    "color": ("J", "I", "H", "G", "F", "E", "D"),
    "clarity": ("I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"),
}
NOISY = "cut"
MAX_ROWS = 1_000_000
MIN_ROWS = 10


def load_diamonds(
    data_root: str | Path | None = None,
    *,
    noise: float = 0.0,
    noise_kind: str | None = None,
    seed: int = 0,
    num_train: int | None = None,
) -> MultiTaskData:
    """Reads the table, fetching it first where it is not in the cache yet.

    Four tasks from six measurements (weight in carat, depth and table in percent, length, width and height in mm):
    the logarithm of the ``price`` (regression), and the grades ``cut`` (5 classes), ``color`` (7) and ``clarity`` (8).
    Sizes tell the price well, the cut roughly, and colour and clarity hardly: three levels of error that no network
    can undercut. A fifth of the stones tests, the same for every seed; stones with equal measurements are in one part.
    Inputs and the price are standardised with mean and deviation of the clean training rows. Only the training labels
    of ``cut`` carry noise.

    Licence: MIT. Cite Wickham 2016.

    Args:
        data_root: Folder with ``diamonds.csv`` or with ``plotnine-0.15.9-py3-none-any.whl``, or this wheel; None to
            fetch it with pip once and keep it, see `cache_folder`.
        noise: Share of the training labels of ``cut`` that is corrupted, see `corrupt_classes`.
        noise_kind: How; None for ``"instance"``: stones of similar measurements are confused.
        seed: Decides the validation rows and the noise.
        num_train: Number of training rows; all when None.

    Raises:
        FileNotFoundError: the table is missing and cannot be fetched; says how to get it.
        ValueError: the file is not what its name says, or an argument is out of range.
    """
    path = FILES.locate(data_root) / "diamonds.csv"
    return make_tabular_data(
        _read_table(path, path.stat().st_mtime_ns),
        noise=noise,
        noise_kind=noise_kind,
        seed=seed,
        num_train=num_train,
    )


@cache  # every run of a sweep in this process reads the same
def _read_table(path: Path, state: int) -> Table:
    """Reads and checks the file; ``state`` tells apart two contents of it."""
    inputs: list[list[float]] = []
    prices: list[float] = []
    grades: dict[str, list[int]] = {name: [] for name in GRADES}
    if path.stat().st_size > FILES.max_bytes:
        raise ValueError(
            f"Expected {path} to have at most {FILES.max_bytes:,} bytes, but it has {path.stat().st_size:,}. "
            f"{FILES.how_to_get()}"
        )
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                inputs.append([_number(row[name], name) for name in INPUTS])
                price = _number(row["price"], "price")
                if not price > 0:
                    raise ValueError(f"a price of {price:g}")
                prices.append(math.log(price))
                for name, order in GRADES.items():
                    grades[name].append(_grade(row[name], name, order))
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise ValueError(
                f"Expected line {reader.line_num} of {path} to be a diamond with {', '.join(INPUTS)}, price, "
                f"{', '.join(GRADES)}, but got: {error}. Delete the file and fetch it again."
            ) from error
    if not MIN_ROWS <= len(inputs) <= MAX_ROWS:
        raise ValueError(
            f"Expected from {MIN_ROWS} to {MAX_ROWS:,} rows in {path}, but got {len(inputs):,}."
        )
    rows = torch.tensor(inputs, dtype=torch.float64)
    return Table(
        name="diamonds",
        inputs=rows,
        tasks=(
            Task("price", 1, "regression"),
            *(Task(name, len(order), is_noisy=name == NOISY) for name, order in GRADES.items()),
        ),
        targets=(
            torch.tensor(prices, dtype=torch.float64),
            *(torch.tensor(grades[name]) for name in GRADES),
        ),
        groups=rows.unique(dim=0, return_inverse=True)[1],
        noise_kinds={"classification": "instance"},
    )


def _grade(text: str, name: str, order: tuple[str, ...]) -> int:
    if text not in order:
        raise ValueError(f"{name} = {text!r}")
    return order.index(text)


def _number(text: str, name: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{name} = {text}")
    return value
