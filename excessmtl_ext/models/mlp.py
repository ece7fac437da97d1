"""A multilayer perceptron with linear heads: digits, SARCOS."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from excessmtl_ext.models.encoder_heads import EncoderHeads


def mlp(
    input_shape: Sequence[int], num_outputs: Sequence[int], *, hidden: Sequence[int] = (128, 128)
) -> EncoderHeads:
    """Builds a perceptron of ReLU layers with one linear head per task.

    Args:
        input_shape: Shape of one sample; flattened.
        num_outputs: Outputs of each task's head.
        hidden: Widths of the shared layers, at least one.

    Shape:
        Inputs float ``[B, *input_shape]``; returns T tensors [B, num_outputs[i]].

    Raises:
        ValueError: ``hidden`` is empty: there would be nothing to share.
    """
    if not hidden:
        raise ValueError(
            "Expected at least one width in `hidden`, but got none: heads would share nothing."
        )
    widths = [math.prod(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return EncoderHeads(
        nn.Sequential(*layers), [nn.Linear(widths[-1], outputs) for outputs in num_outputs]
    )
