"""Texts as hashed words and character n-grams (Weinberger et al. 2009; Bojanowski et al. 2017)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

_TOKEN = re.compile(r"[a-z0-9']+|[^\sa-z0-9']")


def hashed_features(
    text: str, *, num_buckets: int, ngram: int = 4, max_features: int = 384
) -> list[int]:
    """Returns the buckets of a text's words, punctuation marks and character n-grams within words.

    Args:
        text: Lower case and upper case are the same.
        num_buckets: Buckets 1 to ``num_buckets - 1`` are used; 0 is left for padding.
        ngram: Characters of an n-gram; words are marked by angle brackets at both ends.
        max_features: The rest of a longer text is dropped.

    Example:
        >>> len(hashed_features("Good, good!", num_buckets=100))  # 2 words of 3 n-grams each, 2 marks
        10
    """
    features: list[int] = []
    for word in _TOKEN.findall(text.lower()):
        marked = f"<{word}>"
        pieces = ["w" + word]
        if len(word) > 1:
            pieces += [
                "c" + marked[start : start + ngram] for start in range(len(marked) - ngram + 1)
            ]
        # crc32 is the same in every process, which Python's own hash of a string is not.
        features += [1 + zlib.crc32(piece.encode()) % (num_buckets - 1) for piece in pieces]
        if len(features) >= max_features:
            break
    return features[:max_features]


def pad_features(features: Sequence[Sequence[int]]) -> Tensor:
    """Returns features as int32 [N, longest], rows filled up with 0."""
    lengths = torch.tensor([len(row) for row in features])
    longest = int(lengths.max()) if len(features) else 0
    padded = torch.zeros(len(features), max(1, longest), dtype=torch.int32)
    is_used = torch.arange(padded.shape[1]) < lengths[:, None]
    padded[is_used] = torch.tensor(
        [bucket for row in features for bucket in row], dtype=torch.int32
    )
    return padded
