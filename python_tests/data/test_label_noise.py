"""Corruption is exact, fixed by the seed, uniform over all classes, and nested over the noise levels."""

from __future__ import annotations

import pytest
import torch

from excessmtl_ext.data.label_noise import corrupt_classes

LABELS = torch.arange(10_000) % 10


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.333, 0.8, 1.0])
def test_corrupts_exactly_the_fraction(fraction: float) -> None:
    noisy = corrupt_classes(LABELS, num_classes=10, fraction=fraction, seed=3)
    assert len(noisy.corrupted) == round(fraction * len(LABELS))
    assert len(noisy.corrupted.unique()) == len(noisy.corrupted)
    untouched = torch.ones(len(LABELS), dtype=torch.bool)
    untouched[noisy.corrupted] = False
    assert torch.equal(noisy.labels[untouched], LABELS[untouched])


def test_same_seed_corrupts_the_same_samples_whatever_ran_before() -> None:
    first = corrupt_classes(LABELS, num_classes=10, fraction=0.4, seed=5)
    torch.rand(17)
    second = corrupt_classes(LABELS, num_classes=10, fraction=0.4, seed=5)
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.corrupted, second.corrupted)


def test_another_seed_corrupts_other_samples() -> None:
    first = corrupt_classes(LABELS, num_classes=10, fraction=0.4, seed=5)
    second = corrupt_classes(LABELS, num_classes=10, fraction=0.4, seed=6)
    assert not torch.equal(first.corrupted, second.corrupted)


def test_more_noise_keeps_the_corruption_of_less() -> None:
    less = corrupt_classes(LABELS, num_classes=10, fraction=0.2, seed=0)
    more = corrupt_classes(LABELS, num_classes=10, fraction=0.6, seed=0)
    assert set(less.corrupted.tolist()) < set(more.corrupted.tolist())
    assert torch.equal(less.labels[less.corrupted], more.labels[less.corrupted])


def test_replacements_are_uniform_over_all_classes() -> None:
    noisy = corrupt_classes(
        torch.zeros(50_000, dtype=torch.int64), num_classes=10, fraction=1, seed=1
    )
    shares = torch.bincount(noisy.labels, minlength=10) / 50_000
    # Five standard deviations of a share of 0.1 over 50,000 draws; class 0, the true one, included.
    assert (shares - 0.1).abs().max() < 5 * (0.09 / 50_000) ** 0.5


def test_leaves_the_given_labels_alone() -> None:
    labels = LABELS.clone()
    corrupt_classes(labels, num_classes=10, fraction=1.0, seed=0)
    assert torch.equal(labels, LABELS)


def test_no_samples() -> None:
    noisy = corrupt_classes(torch.zeros(0, dtype=torch.int64), num_classes=2, fraction=0.5, seed=0)
    assert len(noisy.labels) == len(noisy.corrupted) == 0


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_fraction_out_of_range_is_an_error(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"Expected `fraction` in \[0, 1\], but got"):
        corrupt_classes(LABELS, num_classes=10, fraction=fraction, seed=0)


def test_labels_out_of_range_are_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"Expected `labels` in \[0, 5\), but got values from 0 to 9"
    ):
        corrupt_classes(LABELS, num_classes=5, fraction=0.5, seed=0)


def test_labels_that_are_no_class_indices_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"class indices, int64 \[N\], but got torch.float32"):
        corrupt_classes(LABELS.float(), num_classes=10, fraction=0.5, seed=0)
