"""Texts as hashed words and character n-grams."""

from __future__ import annotations

import subprocess
import sys

import torch

from excessmtl_ext.data.text_features import hashed_features, pad_features

MANY = 1 << 30  # buckets, so that nothing collides


def features(text: str, **options: int) -> list[int]:
    return hashed_features(text, **{"num_buckets": MANY, **options})


def test_words_marks_and_ngrams_by_hand() -> None:
    # good: the word and <goo, good, ood>; the comma: itself.
    good = features("good")
    assert len(good) == len(set(good)) == 4
    assert features("Good,") == [*good, *features(",")]
    assert len(features(",")) == 1
    # Three characters and their marks make one n-gram, two make one of all, one makes none.
    assert [len(features(word)) for word in ("a", "an", "the")] == [1, 2, 3]


def test_similar_words_share_ngrams_and_not_the_word() -> None:
    good, goods = set(features("good")), set(features("goods"))
    assert len(good & goods) == 2
    assert features("good")[0] != features("goods")[0]


def test_buckets_leave_zero_for_padding_and_long_texts_are_cut() -> None:
    found = hashed_features("what a long sentence this is", num_buckets=4)
    assert set(found) <= {1, 2, 3}
    assert len(features("word " * 1000, max_features=20)) == 20


def test_another_process_hashes_in_the_same_way() -> None:
    code = (
        "from excessmtl_ext.data.text_features import hashed_features as f;"
        "print(f('Not bad at all :-)', num_buckets=1000))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(hashed_features("Not bad at all :-)", num_buckets=1000))


def test_rows_are_filled_up_with_zeros() -> None:
    padded = pad_features([[5, 6, 7], [], [8]])
    assert padded.dtype == torch.int32
    assert padded.tolist() == [[5, 6, 7], [0, 0, 0], [8, 0, 0]]
    assert pad_features([[]]).shape == (1, 1)
