"""A tower for what a user has rated, a tower for the item in question, and heads on one or on both: MovieLens."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from excessmtl_ext.models.encoder_heads import EncoderHeads

EMBEDDING_STD = 0.1


class TwoTowers(nn.Module):
    """Embeds an item and a user's history, each through a tower of its own.

    Args:
        num_tokens: Tokens are 0 to ``num_tokens - 1``; 0 is padding.
        width: Width of embeddings and towers.
        dropout: Share of the embeddings' coordinates that a training step drops.

    Shape:
        tokens [B, 1 + H], whole numbers of any type: the item, then the history, 0 behind its last entry.
        Returns [B, 3 * width]: the user's tower, the item's, and their product.
    """

    def __init__(self, num_tokens: int, width: int, dropout: float) -> None:
        super().__init__()
        self.history = nn.EmbeddingBag(num_tokens, width, mode="sum", padding_idx=0)
        self.item = nn.Embedding(num_tokens, width, padding_idx=0)
        with torch.no_grad():
            for table in (self.history, self.item):
                nn.init.normal_(table.weight, std=EMBEDDING_STD)
                table.weight[0] = 0.0
        self.user_tower, self.item_tower = (
            nn.Sequential(
                nn.Dropout(dropout), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
            )
            for _ in range(2)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the features of each row."""
        tokens = tokens.long()
        item, history = tokens[:, 0], tokens[:, 1:]
        count = (history != 0).sum(1, keepdim=True).clamp(min=1)
        user = self.user_tower(self.history(history) / count.sqrt())
        item = self.item_tower(self.item(item))
        return torch.cat([user, item, user * item], dim=1)


class UserHead(nn.Module):
    """A linear head on the user's tower alone: the item must not tell.

    Args:
        width: Of the tower.
        num_outputs: Of the head.

    Shape:
        features [B, 3 * width] of `TwoTowers`; returns [B, num_outputs].
    """

    def __init__(self, width: int, num_outputs: int) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(width, num_outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Returns the outputs for each row."""
        return self.linear(features[:, : self.width])


def two_towers(
    num_tokens: int,
    num_outputs: Sequence[int],
    *,
    user_tasks: Collection[int] = (),
    width: int = 32,
    dropout: float = 0.3,
) -> EncoderHeads:
    """Builds two towers with one linear head per task.

    Args:
        num_tokens: Tokens are 0 to ``num_tokens - 1``; 0 is padding.
        num_outputs: Outputs of each task's head.
        user_tasks: Numbers of the tasks whose head sees the user's tower alone.
        width: Width of embeddings and towers.
        dropout: Share of the embeddings' coordinates that a training step drops.

    Shape:
        Inputs: tokens [B, 1 + H] as in `TwoTowers`; returns T tensors [B, num_outputs[i]].
    """
    return EncoderHeads(
        TwoTowers(num_tokens, width, dropout),
        [
            UserHead(width, outputs) if task in user_tasks else nn.Linear(3 * width, outputs)
            for task, outputs in enumerate(num_outputs)
        ],
    )
