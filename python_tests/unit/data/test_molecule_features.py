"""Features of molecules: by hand for small ones, and the same however a molecule is written down."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from excessmtl_ext.data.molecule_features import (
    BIN_CENTRES,
    BIN_WIDTH,
    ELEMENTS,
    MAX_ATOMS,
    NUM_FEATURES,
    molecule_features,
)


def features_of(atoms: str, positions: list[list[float]], padding: int = 0) -> Tensor:
    elements = torch.tensor([[ELEMENTS.index(atom) for atom in atoms] + [-1] * padding])
    places = torch.tensor([positions + [[0.0, 0.0, 0.0]] * padding])
    return molecule_features(elements, places)[0]


def parts(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counts, spectrum, histogram = features.split([5, MAX_ATOMS, NUM_FEATURES - 5 - MAX_ATOMS])
    return counts, spectrum, histogram.view(-1, len(BIN_CENTRES))


def test_hydrogen_by_hand() -> None:
    counts, spectrum, histogram = parts(features_of("HH", [[0, 0, 0], [0, 0, 0.8]]))
    assert counts.tolist() == [2, 0, 0, 0, 0]
    # [[0.5, 1 / 0.8], [1 / 0.8, 0.5]]
    assert spectrum[:2].tolist() == pytest.approx([1.75, -0.75])
    assert not spectrum[2:].any()
    expected = [math.exp(-(((0.8 - centre) / BIN_WIDTH) ** 2) / 2) for centre in BIN_CENTRES]
    assert histogram[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert not histogram[1:].any()


def test_every_pair_of_elements_has_bins_of_its_own() -> None:
    seen = set()
    for first in range(5):
        for second in range(5):
            atoms = ELEMENTS[first] + ELEMENTS[second]
            histogram = parts(features_of(atoms, [[0, 0, 0], [0, 0, 1.2]]))[2]
            (kind,) = (histogram[:, 1] > 0.5).nonzero().flatten().tolist()
            seen.add((frozenset((first, second)), kind))
    assert len({kind for _, kind in seen}) == len(seen) == 15


WATER = [[0.0, 0.0, 0.12], [0.0, 0.76, -0.47], [0.0, -0.76, -0.47]]


def test_order_place_and_turn_of_a_molecule_change_nothing() -> None:
    expected = features_of("OHH", WATER)
    turned = features_of("HOH", [WATER[1], WATER[0], WATER[2]])
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=1e-5)
    angle = 0.7
    rotation = torch.tensor(
        [[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]]
    )
    moved = (torch.tensor(WATER) @ rotation.T + 3.0).tolist()
    torch.testing.assert_close(features_of("OHH", moved), expected, atol=1e-5, rtol=1e-5)


def test_missing_atoms_change_nothing_and_an_atom_may_lie_at_the_origin() -> None:
    at_origin = [[0.0, 0.0, 0.0], [0.0, 0.0, 1.1]]
    expected = features_of("CO", at_origin)
    assert expected.isfinite().all()
    torch.testing.assert_close(features_of("CO", at_origin, padding=3), expected)


def test_another_shape_has_other_features() -> None:
    straight = [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]
    assert not torch.allclose(features_of("OHH", WATER), features_of("OHH", straight), atol=0.1)
