"""The shape all models share: one encoder, one head per task."""

from collections.abc import Iterable

from torch import Tensor, nn


class EncoderHeads(nn.Module):
    """Feeds one encoder's features to every task's head (hard parameter sharing).

    Tasks with inputs of their own each take a pass through the encoder: their graphs have only its parameters in
    common, and a backward pass per task goes through the encoder once each, T times in all.

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

    def forward(self, inputs: Tensor | list[Tensor]) -> list[Tensor]:
        """Returns T outputs, one per head.

        Args:
            inputs: What all tasks share, or a list of T, one for each task.

        Raises:
            ValueError: the list does not have as many inputs as there are heads.
        """
        return self.outputs(self.features(inputs))

    def features(self, inputs: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Returns the encoder's features, T of them for T inputs: what ``balancer.backward`` takes as `features`."""
        if not isinstance(inputs, list):
            return self.encoder(inputs)
        if len(inputs) != len(self.heads):
            raise ValueError(
                f"Expected `inputs` to be a tensor or a list of {len(self.heads)}, one per head, "
                f"but got a list of {len(inputs)}."
            )
        return [self.encoder(task_inputs) for task_inputs in inputs]

    def outputs(self, features: Tensor | list[Tensor]) -> list[Tensor]:
        """Returns the heads' outputs for what :meth:`features` has returned."""
        if isinstance(features, list):
            return [head(own) for head, own in zip(self.heads, features, strict=True)]
        return [head(features) for head in self.heads]
