"""Corruption is exact, fixed by the seed, uniform over all classes, and nested over the noise levels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from excessmtl_ext.data.label_noise import (
    ClassNoise,
    CorruptedLabels,
    ValueNoise,
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


# ---- other kinds of noise

INPUTS = torch.randn(10_000, 6, generator=torch.Generator().manual_seed(1))
CLASS_KINDS: tuple[ClassNoise, ...] = ("symmetric", "pair_flip", "instance")
VALUE_KINDS: tuple[ValueNoise, ...] = ("gaussian", "heavy_tailed", "heteroscedastic")


def classes(kind: ClassNoise, fraction: float, **options: Any) -> CorruptedLabels:
    given = {"num_classes": 10, "seed": 3, "inputs": INPUTS, **options}
    return corrupt_classes(LABELS, fraction=fraction, kind=kind, **given)


@pytest.mark.parametrize("kind", CLASS_KINDS)
@pytest.mark.parametrize("fraction", [0.0, 0.333, 1.0])
def test_every_kind_of_class_noise_is_exact_and_leaves_the_others(
    kind: ClassNoise, fraction: float
) -> None:
    noisy = classes(kind, fraction)
    assert len(noisy.corrupted.unique()) == round(fraction * len(LABELS))
    untouched = torch.ones(len(LABELS), dtype=torch.bool)
    untouched[noisy.corrupted] = False
    assert torch.equal(noisy.labels[untouched], LABELS[untouched])
    assert int(noisy.labels.min()) >= 0
    assert int(noisy.labels.max()) < 10


@pytest.mark.parametrize("kind", CLASS_KINDS)
def test_every_kind_of_class_noise_is_nested_seeded_and_independent_per_stream(
    kind: ClassNoise,
) -> None:
    less, more = classes(kind, 0.2), classes(kind, 0.6)
    assert set(less.corrupted.tolist()) < set(more.corrupted.tolist())
    assert torch.equal(less.labels[less.corrupted], more.labels[less.corrupted])
    assert torch.equal(classes(kind, 0.2).corrupted, less.corrupted)
    for other in (classes(kind, 0.2, seed=4), classes(kind, 0.2, stream="other")):
        assert not torch.equal(other.corrupted, less.corrupted)


def test_pair_flip_moves_to_the_next_class() -> None:
    noisy = classes("pair_flip", 0.5)
    expected = (LABELS[noisy.corrupted] + 1) % 10
    assert torch.equal(noisy.labels[noisy.corrupted], expected)


def test_instance_noise_never_keeps_the_class_and_follows_the_inputs() -> None:
    noisy = classes("instance", 1.0)
    assert not (noisy.labels == LABELS).any()
    # Two samples of a class with the same inputs go to the same class far more often than by chance, 1 / 9.
    twins = INPUTS[:100].repeat(100, 1)
    labels = torch.zeros(10_000, dtype=torch.int64)
    alike = corrupt_classes(
        labels, num_classes=10, fraction=0.3, seed=0, kind="instance", inputs=twins
    )
    groups = alike.labels.view(100, 100)
    is_wrong = groups != 0
    # Which of the hundred points are corrupted: some nearly always, others hardly ever.
    share = is_wrong.double().mean(0)
    assert float(share.max()) > 0.6
    assert float(share.min()) < 0.1
    top = [groups[is_wrong[:, i], i].bincount(minlength=10).max() for i in range(100)]
    assert float(torch.stack(top).sum() / is_wrong.sum()) > 0.4


def test_instance_noise_does_not_depend_on_units_and_stands_constant_inputs() -> None:
    scaled = classes("instance", 0.3, inputs=INPUTS * 1000 - 5)
    assert torch.equal(scaled.labels, classes("instance", 0.3).labels)
    constant = classes("instance", 0.3, inputs=torch.ones(10_000, 2))
    assert len(constant.corrupted) == 3000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "assymetric"}, r"Expected `kind` to be one of symmetric, pair_flip, instance"),
        ({"kind": "instance", "inputs": None}, r"Expected `inputs` .* but got None"),
        ({"kind": "instance", "inputs": INPUTS[:5]}, r"Expected `inputs` .*\[10000, \.\.\.\]"),
        ({"kind": "instance", "inputs": LABELS}, r"Expected `inputs` .* but got torch.int64"),
    ],
)
def test_bad_class_noise_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classes(**{"kind": "symmetric", "fraction": 0.1, **options})


@pytest.mark.parametrize("kind", VALUE_KINDS)
def test_every_kind_of_value_noise_has_the_variance_of_the_targets(kind: ValueNoise) -> None:
    values = torch.randn(400_000, generator=torch.Generator().manual_seed(2)) * 3 + 100
    noisy = corrupt_values(values, fraction=1.0, seed=0, kind=kind)
    noise = (noisy.labels - values).double()
    # A t of 3 degrees has no fourth moment: its sample variance scatters.
    tolerance = 0.15 if kind == "heavy_tailed" else 0.02
    assert float(noise.var()) == pytest.approx(9.0, rel=tolerance)
    assert abs(float(noise.mean())) < 0.03


@pytest.mark.parametrize("kind", VALUE_KINDS)
def test_every_kind_of_value_noise_is_nested_and_seeded(kind: ValueNoise) -> None:
    less, more, again = (
        corrupt_values(VALUES, fraction=fraction, seed=0, kind=kind) for fraction in (0.2, 0.6, 0.2)
    )
    assert len(less.corrupted) == 2000
    assert set(less.corrupted.tolist()) < set(more.corrupted.tolist())
    assert torch.equal(less.labels[less.corrupted], more.labels[less.corrupted])
    assert torch.equal(less.labels, again.labels)


def test_the_shapes_of_value_noise() -> None:
    values = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    noise = {
        kind: corrupt_values(values, fraction=1.0, seed=1, kind=kind).labels - values
        for kind in VALUE_KINDS
    }
    scaled = {kind: each / each.std() for kind, each in noise.items()}
    # Beyond five deviations: 6e-7 of a normal's draws, 0.3 % of a t's with 3 degrees.
    assert int((scaled["gaussian"].abs() > 5).sum()) <= 1
    assert int((scaled["heavy_tailed"].abs() > 5).sum()) > 100
    edge, middle = values.abs() > 0.9, values.abs() < 0.1
    spread = noise["heteroscedastic"]
    assert float(spread[edge].std()) > 10 * float(spread[middle].std())
    assert float(noise["gaussian"][edge].std()) < 1.1 * float(noise["gaussian"][middle].std())


def test_an_unknown_kind_of_value_noise_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Expected `kind` to be one of gaussian, .*'cauchy'"):
        corrupt_values(VALUES, fraction=0.1, seed=0, kind="cauchy")  # type: ignore[arg-type]
