"""Corruption is exact, fixed by the seed, uniform over all classes, and nested over the noise levels."""

from __future__ import annotations

import pytest
import torch

from excessmtl_ext.data.label_noise import (
    choose_corrupted,
    corrupt_classes,
    corrupt_pixels,
    corrupt_values,
)

LABELS = torch.arange(10_000) % 10
VALUES = torch.linspace(-3.0, 9.0, 10_000)


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


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.333, 0.8, 1.0])
def test_values_are_corrupted_on_exactly_the_fraction(fraction: float) -> None:
    noisy = corrupt_values(VALUES, fraction=fraction, seed=3)
    changed = (noisy.labels != VALUES).nonzero().flatten()
    assert len(changed) == round(fraction * len(VALUES))
    assert torch.equal(changed, noisy.corrupted)


def test_noise_on_values_is_gaussian_with_the_variance_of_the_values() -> None:
    noise = corrupt_values(VALUES, fraction=1.0, seed=1).labels - VALUES
    std = float(VALUES.std(correction=0))
    # Five standard deviations of the mean, of the deviation and of the shares, over 10,000 draws.
    assert abs(float(noise.mean())) < 5 * std / 100
    assert float(noise.std()) == pytest.approx(std, rel=5 / (2 * 10_000) ** 0.5)
    for width, share in ((1, 0.6827), (2, 0.9545)):
        bound = 5 * (share * (1 - share) / 10_000) ** 0.5
        assert abs(float((noise.abs() < width * std).double().mean()) - share) < bound


def test_more_noise_on_values_keeps_the_corruption_of_less() -> None:
    less = corrupt_values(VALUES, fraction=0.2, seed=0)
    more = corrupt_values(VALUES, fraction=0.6, seed=0)
    assert set(less.corrupted.tolist()) < set(more.corrupted.tolist())
    assert torch.equal(less.labels[less.corrupted], more.labels[less.corrupted])


def test_noise_on_values_depends_on_seed_and_stream_only() -> None:
    first = corrupt_values(VALUES, fraction=0.4, seed=5, stream="a")
    torch.rand(17)
    again = corrupt_values(VALUES, fraction=0.4, seed=5, stream="a")
    assert torch.equal(first.labels, again.labels)
    for seed, stream in ((6, "a"), (5, "b")):
        other = corrupt_values(VALUES, fraction=0.4, seed=seed, stream=stream)
        assert not torch.equal(first.corrupted, other.corrupted)


def test_values_are_left_alone_and_keep_their_type() -> None:
    values = VALUES.double()
    noisy = corrupt_values(values, fraction=1.0, seed=0)
    assert torch.equal(values, VALUES.double())
    assert noisy.labels.dtype == torch.float64
    assert len(corrupt_values(torch.zeros(0), fraction=0.5, seed=0).labels) == 0


def test_values_that_are_no_targets_are_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"`values` to be floating point \[N\], but got torch.int64"
    ):
        corrupt_values(LABELS, fraction=0.5, seed=0)
    with pytest.raises(ValueError, match=r"Expected `fraction` in \[0, 1\], but got 2"):
        corrupt_values(VALUES, fraction=2, seed=0)


def test_chosen_samples_are_exact_and_nested() -> None:
    chosen = [
        choose_corrupted(50, fraction=fraction, seed=2).tolist() for fraction in (0, 0.2, 0.62, 1)
    ]
    assert [len(samples) for samples in chosen] == [0, 10, 31, 50]
    assert set(chosen[1]) < set(chosen[2]) < set(chosen[3]) == set(range(50))
    assert chosen[2] == sorted(chosen[2]) != choose_corrupted(50, fraction=0.62, seed=3).tolist()
    with pytest.raises(ValueError, match=r"Expected `fraction` in \[0, 1\], but got -1"):
        choose_corrupted(50, fraction=-1, seed=0)


def test_pixels_are_replaced_uniformly_and_ignored_ones_stay_ignored() -> None:
    labels = torch.full((200, 250), 4)
    labels[:, :50] = -1
    noisy = corrupt_pixels(labels, num_classes=13, seed=0, sample=7)
    assert (noisy[:, :50] == -1).all()
    shares = torch.bincount(noisy[:, 50:].flatten(), minlength=13) / 40_000
    assert (shares - 1 / 13).abs().max() < 5 * (12 / 169 / 40_000) ** 0.5
    assert (labels[:, 50:] == 4).all()


def test_pixels_depend_on_seed_and_sample_only() -> None:
    labels = torch.zeros(20, 20, dtype=torch.int64)
    first = corrupt_pixels(labels, num_classes=13, seed=0, sample=7)
    corrupt_pixels(labels, num_classes=13, seed=0, sample=8)
    assert torch.equal(first, corrupt_pixels(labels, num_classes=13, seed=0, sample=7))
    for seed, sample in ((0, 8), (1, 7)):
        other = corrupt_pixels(labels, num_classes=13, seed=seed, sample=sample)
        assert not torch.equal(first, other)
