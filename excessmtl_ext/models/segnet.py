"""The network of the paper's NYUv2 experiment."""

from collections.abc import Collection, Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from excessmtl_ext.models.encoder_heads import EncoderHeads

# Channels of the four stages in multiples of the width, and convolutions in each: the first four stages of VGG-16, on
# which SegNet is built.
STAGE_CHANNELS = (1, 2, 4, 8)
STAGE_CONVOLUTIONS = (2, 2, 3, 3)

# Each stage halves height and width.
SIZE_MULTIPLE = 2 ** len(STAGE_CHANNELS)


class SegNetEncoder(nn.Module):
    """Encoder and decoder of SegNet (Badrinarayanan et al. 2017), with four stages each: what all tasks share.

    An encoder stage ends in a max pooling. The decoder stage that mirrors it puts its inputs back to where the maxima
    were, which keeps edges sharp without passing the feature maps themselves.

    Args:
        width: Channels of the first stage and of the features.

    Shape:
        Inputs float [B, 3, H, W], H and W multiples of 16; returns [B, width, H, W].
    """

    def __init__(self, width: int) -> None:
        """Makes the stages, randomly initialised."""
        super().__init__()
        channels = [width * factor for factor in STAGE_CHANNELS]
        fan_ins = [3, *channels[:-1]]
        self.down = nn.ModuleList(
            _stage([fan_in] + [fan_out] * count)
            for fan_in, fan_out, count in zip(fan_ins, channels, STAGE_CONVOLUTIONS, strict=True)
        )
        # Each mirrors the encoder stage of its number; the first keeps the width for the heads.
        fan_outs = [width, *channels[:-1]]
        self.up = nn.ModuleList(
            _stage([fan_in] * count + [fan_out])
            for fan_in, fan_out, count in zip(channels, fan_outs, STAGE_CONVOLUTIONS, strict=True)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Returns features at full resolution."""
        if images.shape[-2] % SIZE_MULTIPLE or images.shape[-1] % SIZE_MULTIPLE:
            raise ValueError(
                f"Expected `images` with height and width in multiples of {SIZE_MULTIPLE}, "
                f"but got {list(images.shape)}. Resize them."
            )
        features = images
        maxima: list[Tensor] = []
        for stage in self.down:
            features, positions = functional.max_pool2d(stage(features), 2, return_indices=True)
            maxima.append(positions)
        for stage, positions in zip(reversed(self.up), reversed(maxima), strict=True):
            features = stage(functional.max_unpool2d(features, positions, [2, 2]))
        return features


class UnitVectors(nn.Module):
    """Scales the vector of channels at each pixel to length 1: [B, C, H, W] to the same."""

    def forward(self, vectors: Tensor) -> Tensor:
        """Returns the directions of ``vectors``."""
        return functional.normalize(vectors, dim=1)


def segnet(
    num_outputs: Sequence[int], *, unit_heads: Collection[int] = (), width: int = 64
) -> EncoderHeads:
    """Builds SegNet with four encoder and four decoder stages and two convolutions per head (He et al. 2024).

    Args:
        num_outputs: Channels of each task's output.
        unit_heads: Positions of the heads whose outputs are unit vectors: surface normals.
        width: Channels of the first stage; 64 is SegNet's, fewer make a small network.

    Shape:
        Inputs float [B, 3, H, W], H and W multiples of 16; returns T tensors [B, num_outputs[i], H, W].

    Raises:
        ValueError: ``width`` is below 1, or ``unit_heads`` names a head that there is not.
    """
    if width < 1:
        raise ValueError(f"Expected `width` of at least 1, but got {width}.")
    if not set(unit_heads) <= set(range(len(num_outputs))):
        raise ValueError(
            f"Expected `unit_heads` to be positions below {len(num_outputs)}, the number of heads, "
            f"but got {sorted(unit_heads)}."
        )
    heads: list[nn.Module] = []
    for position, outputs in enumerate(num_outputs):
        layers: list[nn.Module] = [
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1),
        ]
        if position in unit_heads:
            layers.append(UnitVectors())
        heads.append(nn.Sequential(*layers))
    return EncoderHeads(SegNetEncoder(width), heads)


def _stage(channels: Sequence[int]) -> nn.Sequential:
    """Makes 3 x 3 convolutions from each number of channels to the next, each with batch normalisation and ReLU."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(channels):
        # No bias: the normalisation would take it out again.
        layers += [
            nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(fan_out),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)
