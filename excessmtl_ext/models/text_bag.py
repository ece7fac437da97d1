"""A bag of embedded tokens under a small perceptron, with linear heads: human ratings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from excessmtl_ext.models.encoder_heads import EncoderHeads

# Sums of a few dozen embeddings, divided by the root of their number, are then of the order of one.
EMBEDDING_STD = 0.1


class TextBag(nn.Module):
    """Embeds tokens, adds them up, divides by the root of their number, and feeds one hidden layer.

    Args:
        num_buckets: Tokens are 0 to ``num_buckets - 1``; 0 is padding.
        width: Width of the embeddings.
        hidden: Width of the features.
        dropout: Share of the embedding's coordinates that a training step drops.

    Shape:
        tokens int32 or int64 [B, L], rows ending in zeros; returns [B, hidden].
    """

    def __init__(self, num_buckets: int, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(num_buckets, width, mode="sum", padding_idx=0)
        with torch.no_grad():
            nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
            self.embedding.weight[0] = 0.0
        self.layers = nn.Sequential(
            nn.Dropout(dropout), nn.ReLU(), nn.Linear(width, hidden), nn.ReLU()
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the features of each row."""
        count = (tokens != 0).sum(1, keepdim=True).clamp(min=1)
        return self.layers(self.embedding(tokens) / count.sqrt())


def text_bag(
    num_buckets: int,
    num_outputs: Sequence[int],
    *,
    width: int = 32,
    hidden: int = 64,
    dropout: float = 0.3,
) -> EncoderHeads:
    """Builds a bag of embeddings with one linear head per task.

    Args:
        num_buckets: Tokens are 0 to ``num_buckets - 1``; 0 is padding.
        num_outputs: Outputs of each task's head.
        width: Width of the embeddings.
        hidden: Width of the features.
        dropout: Share of the embedding's coordinates that a training step drops.

    Shape:
        Inputs: tokens int32 or int64 [B, L], or a list of T such; returns T tensors [B, num_outputs[i]].
    """
    return EncoderHeads(
        TextBag(num_buckets, width, hidden, dropout),
        [nn.Linear(hidden, outputs) for outputs in num_outputs],
    )
