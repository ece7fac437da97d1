"""QM9: eleven quantum-chemical properties of 130,831 small molecules (Ramakrishnan et al. 2014).

The table travels in the wheel of qm9pack.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from excessmtl_ext.data.molecule_features import (
    ELEMENTS,
    MAX_ATOMS,
    NUM_FEATURES,
    molecule_features,
)
from excessmtl_ext.data.multitask_data import MultiTaskData, Task
from excessmtl_ext.data.package_files import PackageFiles, cache_folder
from excessmtl_ext.data.tabular import Table, make_tabular_data

PARTS = ("qm9_part1.csv", "qm9_part2.csv", "qm9_part3.csv")

FILES = PackageFiles(
    title="QM9",
    folder="qm9",
    requirement="qm9pack==1.0.3",
    archive="qm9pack-1.0.3-py3-none-any.whl",
    sha256="1d88c2988007c6778e717ee3224cf511bd60e10732ebe3b7ed500ea5af05c9f0",
    members={name: f"qm9pack/data/{name}" for name in PARTS},
    max_bytes=100_000_000,
    size_mb=104,
    licence="MIT",
    citation="R. Ramakrishnan, P.O. Dral, M. Rupp and O.A. von Lilienfeld, Scientific Data 1, 140022, 2014",
)

# Task -> column, in the order of Navon et al. 2022 (Nash-MTL) and Liu et al. 2023 (FAMO).
COLUMNS = {
    "mu": "Dipole_debye",
    "alpha": "Polarizability_bohr3",
    "homo": "HOMO_au",
    "lumo": "LUMO_au",
    "r2": "R2_bohr2",
    "zpve": "ZPVE_au",
    "u0": "InternalEnergy_0K_au",
    "u": "InternalEnergy_298K_au",
    "h": "Enthalphy_298K_au",
    "g": "GibbsFreeEnergy_298K_au",
    "cv": "Heatcapacity_Cv_cal_mol_K",
}
NOISY = ("homo", "r2")

# Energies of the free atoms H, C, N, O, F in Hartree at the level of theory of the data: the four energies of a
# molecule are those of its bonds.
ATOM_ENERGIES = {
    "u0": (-0.500273, -37.846772, -54.583861, -75.064579, -99.718730),
    "u": (-0.498857, -37.845355, -54.582445, -75.063163, -99.717314),
    "h": (-0.497912, -37.844411, -54.581501, -75.062219, -99.716370),
    "g": (-0.510927, -37.861317, -54.598897, -75.079532, -99.733544),
}

_NUMBER_OF = {name: number for number, name in enumerate(ELEMENTS)}

MIN_ROWS, MAX_ROWS = 10, 200_000
CHUNK = 2_000
FEATURES_VERSION = 1


class Molecules(NamedTuple):
    """Molecules as they are in the files.

    Attributes:
        elements: Positions in `ELEMENTS`, int8 [N, 29]; -1 behind the last atom.
        positions: In Angstrom, float32 [N, 29, 3]; 0 behind the last atom.
        targets: float64 [N, 11], in the order of `COLUMNS`; the four energies are those of atomisation.
    """

    elements: Tensor
    positions: Tensor
    targets: Tensor


def load_qm9(
    data_root: str | Path | None = None,
    *,
    noise: float = 0.0,
    noise_kind: str | None = None,
    seed: int = 0,
    num_train: int | None = None,
) -> MultiTaskData:
    """Reads the three files, fetching them first where they are not in the cache yet.

    Eleven regression tasks: dipole moment ``mu``, polarisability ``alpha``, orbital energies ``homo`` and ``lumo``,
    spatial extent ``r2``, zero-point energy ``zpve``, the atomisation energies ``u0``, ``u``, ``h`` and ``g``, and heat
    capacity ``cv``, from features of the equilibrium geometry, see `molecule_features`. They are made once (a minute on
    two cores) and kept in the cache. A fifth of the molecules tests, the same for every seed. Features and targets are
    standardised with mean and deviation of the clean training rows. Only the training labels of ``homo`` and ``r2``
    carry noise.

    Licence: MIT. Cite Ramakrishnan et al. 2014.

    Args:
        data_root: Folder with ``qm9_part1.csv``, ``qm9_part2.csv`` and ``qm9_part3.csv``, or with
            ``qm9pack-1.0.3-py3-none-any.whl``, or this wheel; None to fetch it with pip once and keep it, see
            `cache_folder`.
        noise: Share of the training labels of ``homo`` and of ``r2`` that is corrupted, see `corrupt_values`.
        noise_kind: How; None for ``"heteroscedastic"``.
        seed: Decides the validation molecules and the noise.
        num_train: Number of training molecules; all when None.

    Raises:
        FileNotFoundError: a file is missing and cannot be fetched; says how to get it.
        ValueError: a file is not what its name says, or an argument is out of range.
    """
    folder = FILES.locate(data_root)
    return make_tabular_data(
        _read_table(folder, _state(folder)),
        noise=noise,
        noise_kind=noise_kind,
        seed=seed,
        num_train=num_train,
    )


def _state(folder: Path) -> str:
    """Returns a name for the present contents of the files."""
    facts = [
        (name, (folder / name).stat().st_size, (folder / name).stat().st_mtime_ns) for name in PARTS
    ]
    text = repr((FEATURES_VERSION, str(folder.resolve()), facts))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache  # every run of a sweep in this process reads the same
def _read_table(folder: Path, state: str) -> Table:
    """Returns features and targets, from the cache where they are there."""
    made = cache_folder() / f"qm9_features_{state}.npy"
    rows = _read_features(made)
    if rows is None:
        print(f"Computing features of QM9's molecules into {made}, once.", file=sys.stderr)
        rows = _with_features(read_molecules([folder / name for name in PARTS]))
        made.parent.mkdir(parents=True, exist_ok=True)
        part = made.with_name(f".{made.name}.{os.getpid()}")
        with part.open("wb") as file:
            np.save(file, rows)
        part.replace(made)
    table = torch.from_numpy(rows)
    return Table(
        name="qm9",
        inputs=table[:, len(COLUMNS) :],
        tasks=tuple(Task(name, 1, "regression", is_noisy=name in NOISY) for name in COLUMNS),
        targets=table[:, : len(COLUMNS)].unbind(1),
        noise_kinds={"regression": "heteroscedastic"},
    )


def _read_features(made: Path) -> np.ndarray | None:
    """Returns what a former run has kept, mapped into memory; None where it is missing or cut off."""
    if not made.is_file():
        return None
    try:
        # Copy on write: torch takes no array that it could not write to.
        rows = np.load(made, mmap_mode="c")
    except (ValueError, OSError, EOFError):
        return None
    is_whole = rows.ndim == 2 and rows.shape[1] == len(COLUMNS) + NUM_FEATURES
    return rows if is_whole and rows.dtype == np.float32 else None


def _with_features(molecules: Molecules) -> np.ndarray:
    """Returns targets and features side by side: float32 [N, 11 + NUM_FEATURES]."""
    rows = torch.empty(len(molecules.targets), len(COLUMNS) + NUM_FEATURES)
    rows[:, : len(COLUMNS)] = molecules.targets.float()
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        rows[part, len(COLUMNS) :] = molecule_features(
            molecules.elements[part].long(), molecules.positions[part]
        )
    return rows.numpy()


def read_molecules(paths: Sequence[Path]) -> Molecules:
    """Reads and checks the files.

    Raises:
        ValueError: a file is not a table of molecules; says which, and the line.
    """
    elements: list[Tensor] = []
    positions: list[Tensor] = []
    targets: list[list[float]] = []
    for path in paths:
        for line, row in _rows(path):
            try:
                atoms, places, values = _parse(row)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"Expected line {line} of {path} to be a molecule of at most {MAX_ATOMS} atoms of "
                    f"{', '.join(ELEMENTS)}, but got: {error}. {FILES.how_to_get()}"
                ) from error
            padding = MAX_ATOMS - len(atoms)
            elements.append(torch.tensor(atoms + [-1] * padding, dtype=torch.int8))
            positions.append(torch.tensor(places + [0.0] * (3 * padding)))
            targets.append(values)
            if len(targets) > MAX_ROWS:
                raise ValueError(f"Expected at most {MAX_ROWS:,} molecules, but {path} has more.")
    if len(targets) < MIN_ROWS:
        raise ValueError(
            f"Expected at least {MIN_ROWS} molecules in {paths[0].parent}, but got {len(targets)}."
        )
    return Molecules(
        torch.stack(elements),
        torch.stack(positions).view(-1, MAX_ATOMS, 3),
        torch.tensor(targets, dtype=torch.float64),
    )


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the number of each line and its columns."""
    if path.stat().st_size > FILES.max_bytes:
        raise ValueError(
            f"Expected {path} to have at most {FILES.max_bytes:,} bytes, but it has {path.stat().st_size:,}. "
            f"{FILES.how_to_get()}"
        )
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                yield reader.line_num, row
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(
                f"Expected {path} to be a CSV table, but line {reader.line_num + 1} is not: {error}. "
                f"{FILES.how_to_get()}"
            ) from error


def _parse(row: dict[str, str]) -> tuple[list[int], list[float], list[float]]:
    """Returns the elements, the coordinates one after another, and the eleven targets."""
    atoms = [_NUMBER_OF[name.strip(" '\"")] for name in row["Elements"].strip("[]").split(",")]
    places = [float(text) for text in row["XYZ_Ang"].replace("[", "").replace("]", "").split(",")]
    if len(atoms) > MAX_ATOMS or len(places) != 3 * len(atoms):
        raise ValueError(f"{len(atoms)} atoms with {len(places)} coordinates")
    values = []
    for task, column in COLUMNS.items():
        value = float(row[column])
        if task in ATOM_ENERGIES:
            value -= sum(ATOM_ENERGIES[task][atom] for atom in atoms)
        values.append(value)
    if not all(map(math.isfinite, [*places, *values])):
        raise ValueError("a number that is not finite")
    return atoms, places, values
