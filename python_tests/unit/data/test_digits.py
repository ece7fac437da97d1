"""The digits of scikit-learn as pairs: no download, disjoint splits."""

from __future__ import annotations

import sys

import pytest
import torch

from excessmtl_ext.data import TensorSplit, load_digit_pairs
from excessmtl_ext.data.digit_pairs import LabelledDigits, split_digits


def test_pairs_have_the_promised_sizes() -> None:
    data = load_digit_pairs(noise=0.8)
    assert [len(data.train), len(data.validation), len(data.test)] == [8_000, 2_000, 4_000]
    inputs = data.train.batch(torch.arange(2)).inputs
    assert isinstance(inputs, torch.Tensor)
    assert inputs.shape == (2, 1, 12, 12)
    assert len(data.corrupted["bottom_right"]) == 6_400


def test_the_test_pairs_are_the_same_for_every_seed() -> None:
    first, second = load_digit_pairs(seed=0), load_digit_pairs(seed=1)
    assert isinstance(first.test, TensorSplit)
    assert isinstance(second.test, TensorSplit)
    assert torch.equal(first.test.inputs, second.test.inputs)
    assert isinstance(first.train, TensorSplit)
    assert isinstance(second.train, TensorSplit)
    assert not torch.equal(first.train.inputs, second.train.inputs)


def test_no_digit_is_in_two_splits() -> None:
    digits = LabelledDigits(torch.arange(50).view(50, 1, 1), torch.arange(50))
    kept, cut = split_digits(digits, 12, seed=0, purpose="test")
    assert len(cut.labels) == 12
    assert sorted(kept.labels.tolist() + cut.labels.tolist()) == list(range(50))
    assert torch.equal(kept.images.flatten(), kept.labels)


def test_num_train_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Expected `num_train` in \[1, 1,159,929\], but got"):
        load_digit_pairs(num_train=0)
    with pytest.raises(ValueError, match=r"but got 10000000000"):
        load_digit_pairs(num_train=10**10)


def test_without_scikit_learn_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "\.\[train\]" in a clone'):
        load_digit_pairs()
