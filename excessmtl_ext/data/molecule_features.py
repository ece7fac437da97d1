"""What a perceptron can be told of a molecule: which atoms, how far apart, and the spectrum of its Coulomb matrix."""

from __future__ import annotations

import torch
from torch import Tensor

ELEMENTS = ("H", "C", "N", "O", "F")
CHARGES = (1.0, 6.0, 7.0, 8.0, 9.0)
MAX_ATOMS = 29

# Distances of each pair of elements are counted in soft bins, 0.4 apart from 0.8 to 6.8 Angstrom.
BIN_CENTRES = tuple(0.8 + 0.4 * index for index in range(16))
BIN_WIDTH = 0.3

# In Angstrom; no two atoms of a molecule are nearer.
MIN_DISTANCE = 0.1

NUM_PAIR_TYPES = len(ELEMENTS) * (len(ELEMENTS) + 1) // 2
NUM_FEATURES = len(ELEMENTS) + MAX_ATOMS + NUM_PAIR_TYPES * len(BIN_CENTRES)


def molecule_features(elements: Tensor, positions: Tensor) -> Tensor:
    """Returns features that do not change with the order of the atoms, nor when the molecule is moved or turned.

    The counts of the elements; the eigenvalues of the Coulomb matrix, the largest first (Rupp et al. 2012); and for
    each pair of elements how many pairs of atoms lie at about which distance, as in Behler & Parrinello 2007.

    Args:
        elements: Positions in `ELEMENTS`, int64 [N, A]; -1 behind the last atom.
        positions: In Angstrom, floating point [N, A, 3].

    Shape:
        Returns float32 [N, `NUM_FEATURES`].
    """
    is_atom = elements >= 0
    counts = torch.stack([(elements == index).sum(1) for index in range(len(ELEMENTS))], dim=1)
    distances = torch.cdist(positions.double(), positions.double())
    spectrum = _coulomb_spectrum(elements, distances, is_atom)
    histogram = _distance_histogram(elements, distances)
    return torch.cat([counts.float(), spectrum.float(), histogram.float()], dim=1)


def _coulomb_spectrum(elements: Tensor, distances: Tensor, is_atom: Tensor) -> Tensor:
    """Returns the eigenvalues of Z_i Z_j / d_ij, 0.5 Z_i^2.4 on the diagonal, in falling order: [N, MAX_ATOMS]."""
    charges = torch.tensor(CHARGES, dtype=torch.float64)[elements.clamp(min=0)] * is_atom
    # Missing atoms lie on one another; they have no charge.
    matrix = charges[:, :, None] * charges[:, None, :] / distances.clamp(min=MIN_DISTANCE)
    matrix.diagonal(dim1=1, dim2=2).copy_(0.5 * charges**2.4)
    spectrum = torch.linalg.eigvalsh(matrix).flip(1)
    return torch.nn.functional.pad(spectrum, (0, MAX_ATOMS - spectrum.shape[1]))


def _distance_histogram(elements: Tensor, distances: Tensor) -> Tensor:
    """Returns softly binned distances for each pair of elements: [N, NUM_PAIR_TYPES * bins]."""
    num_molecules, num_atoms = elements.shape
    first, second = torch.triu_indices(num_atoms, num_atoms, offset=1)
    low = torch.minimum(elements[:, first], elements[:, second])
    high = torch.maximum(elements[:, first], elements[:, second])
    # Pairs (low <= high) numbered row by row; those with a missing atom go to a type of their own.
    kinds = low * len(ELEMENTS) - low * (low - 1) // 2 + high - low
    kinds = torch.where(low >= 0, kinds, NUM_PAIR_TYPES)
    centres = torch.tensor(BIN_CENTRES, dtype=torch.float64)
    shares = ((distances[:, first, second, None] - centres) / BIN_WIDTH).square().mul(-0.5).exp()
    histogram = torch.zeros(
        num_molecules, NUM_PAIR_TYPES + 1, len(BIN_CENTRES), dtype=torch.float64
    )
    histogram.scatter_add_(1, kinds[:, :, None].expand_as(shares), shares)
    return histogram[:, :NUM_PAIR_TYPES].flatten(1)
