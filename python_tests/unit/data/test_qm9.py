"""QM9 from small made-up tables, and the real ones where the cache has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from _datasets import METHANE, qm9_csv, write_qm9

from excessmtl_ext.data import TensorSplit, load_qm9, qm9
from excessmtl_ext.data.molecule_features import NUM_FEATURES
from excessmtl_ext.data.package_files import cache_folder
from excessmtl_ext.data.qm9 import COLUMNS, FILES, PARTS, read_molecules

REAL_CACHE = cache_folder() / FILES.folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXCESSMTL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_qm9(tmp_path / "data")


def tensors(split: object) -> TensorSplit:
    assert isinstance(split, TensorSplit)
    return split


def same(first: object, second: object) -> bool:
    one, other = tensors(first), tensors(second)
    return torch.equal(one.inputs, other.inputs) and all(
        map(torch.equal, one.targets, other.targets)
    )


def test_tasks_and_splits_have_the_promised_shapes(root: Path) -> None:
    data = load_qm9(root, noise=0.5)
    assert [task.name for task in data.tasks] == list(COLUMNS)
    assert [task.name for task in data.tasks if task.is_noisy] == ["homo", "r2"]
    assert {task.kind for task in data.tasks} == {"regression"}
    assert [len(part) for part in (data.train, data.validation, data.test)] == [42, 6, 12]
    assert tensors(data.train).inputs.shape == (42, NUM_FEATURES)
    assert set(data.corrupted) == {"homo", "r2"}


def test_energies_are_those_of_the_bonds(root: Path) -> None:
    molecules = read_molecules([root / PARTS[0]])
    methane = dict(zip(COLUMNS, molecules.targets[0].tolist(), strict=True))
    # What other readers of QM9 give for methane, in eV; a Hartree is 27.2114 of them.
    for name, energy in {"u0": -17.172, "u": -17.287, "h": -17.390, "g": -16.152}.items():
        assert methane[name] * 27.2114 == pytest.approx(energy, abs=0.001)
    for name, value in zip(COLUMNS, METHANE, strict=True):
        if name not in ("u0", "u", "h", "g"):
            assert methane[name] == float(value)
    assert molecules.elements[0].tolist()[:6] == [1, 0, 0, 0, 0, -1]


def test_features_are_made_once_and_anew_for_other_files(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = qm9.molecule_features

    def counted(elements: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        calls.append(len(elements))
        return real(elements, positions)

    monkeypatch.setattr(qm9, "molecule_features", counted)
    first = load_qm9(root)
    assert sum(calls) == 60
    qm9._read_table.cache_clear()  # as in another process
    assert same(load_qm9(root).train, first.train)
    assert sum(calls) == 60
    write_qm9(root, {PARTS[0]: qm9_csv(25, seed=9)})
    assert len(load_qm9(root).train) > len(first.train)
    assert sum(calls) == 125


def test_features_that_were_cut_off_are_made_again(root: Path) -> None:
    first = load_qm9(root)
    (kept,) = cache_folder().glob("qm9_features_*.npy")
    whole = kept.read_bytes()
    for damaged in (whole[:50], whole[: len(whole) // 2], b""):
        kept.write_bytes(damaged)
        qm9._read_table.cache_clear()
        assert same(load_qm9(root).train, first.train)
        assert kept.read_bytes() == whole
    np.save(kept, np.zeros((3, 4), np.float32))
    qm9._read_table.cache_clear()
    assert same(load_qm9(root).train, first.train)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("'C'", "'Si'", r"line 2 of .*qm9_part2\.csv .* but got: .*Si"),
        ("Dipole_debye", "Dipole", r"line 2 of .*qm9_part2\.csv .* but got: 'Dipole_debye'"),
        ("[1, 0, 0]", "[1, 0]", r"line 2 of .* but got: 5 atoms with 14 coordinates"),
        ("[1, 0, 0]", "[1, 0, x]", r"line 2 of .* could not convert"),
        ("13.21", "inf", r"line 2 of .* a number that is not finite"),
    ],
)
def test_a_damaged_table_is_named_with_the_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    content = qm9_csv(seed=2)
    assert old in content
    root = write_qm9(tmp_path / "data", {PARTS[1]: content.replace(old, new, 1)})
    with pytest.raises(ValueError, match=message):
        load_qm9(root)


def test_a_row_that_ends_too_early_is_named(tmp_path: Path) -> None:
    content = qm9_csv(seed=2)[:-60]
    root = write_qm9(tmp_path / "data", {PARTS[1]: content})
    with pytest.raises(ValueError, match=r"line 21 of .*qm9_part2\.csv"):
        load_qm9(root)


def test_too_few_rows_and_too_large_files_are_errors(tmp_path: Path) -> None:
    few = write_qm9(tmp_path / "few", dict.fromkeys(PARTS, qm9_csv(2)))
    with pytest.raises(ValueError, match=r"at least 10 molecules in .*few, but got 6"):
        load_qm9(few)
    large = write_qm9(tmp_path / "large")
    with (large / PARTS[2]).open("ab") as file:
        file.truncate(FILES.max_bytes + 1)
    with pytest.raises(ValueError, match=r"qm9_part3\.csv to have at most 100,000,000 bytes"):
        load_qm9(large)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_CACHE.is_dir(), reason="the cache has no QM9")
def test_the_real_molecules_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXCESSMTL_CACHE", str(REAL_CACHE.parent))
    data = load_qm9()
    assert sum(len(part) for part in (data.train, data.validation, data.test)) == 130_831
