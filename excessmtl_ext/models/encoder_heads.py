"""The shape all models share: one encoder, one head per task."""

from collections.abc import Iterable

from torch import Tensor, nn


class EncoderHeads(nn.Module):
    """Feeds one encoder's features to every task's head (hard parameter sharing).

    Args:
        encoder: Maps inputs to features. Its parameters are the shared ones, the ones a balancer is given.
        heads: One module per task, in the order of the tasks.

    Example:
        >>> import torch
        >>> model = EncoderHeads(nn.Linear(4, 3), [nn.Linear(3, 10), nn.Linear(3, 1)])
        >>> [tuple(output.shape) for output in model(torch.zeros(2, 4))]
        [(2, 10), (2, 1)]
    """

    def __init__(self, encoder: nn.Module, heads: Iterable[nn.Module]) -> None:
        """Takes the parts as they are."""
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(heads)

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """Returns T outputs, one per head."""
        features = self.encoder(inputs)
        return [head(features) for head in self.heads]
