"""Mean and deviation of the colour channels of training images."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# Statistics of this many images stand for those of all: reading every JPEG would take minutes before each run.
NUM_IMAGES = 64

# A hundredth of the step between two grey levels of 256.
MIN_STD = 1 / 25_600


class ChannelStatistics(NamedTuple):
    """Mean and standard deviation of each colour channel, float32 [C, 1, 1]."""

    mean: Tensor
    std: Tensor

    def standardise(self, images: Tensor) -> Tensor:
        """Subtracts the means of images [..., C, H, W] and divides by the deviations."""
        return (images - self.mean) / self.std


def evenly_spaced(num_available: int, num_wanted: int = NUM_IMAGES) -> list[int]:
    """Returns at most ``num_wanted`` indices, evenly spaced over all that are available."""
    count = min(num_available, num_wanted)
    return [index * num_available // count for index in range(count)]


def channel_statistics(images: Iterable[Tensor]) -> ChannelStatistics:
    """Returns the statistics over all pixels of the images.

    Args:
        images: At least one, each [C, H, W]; the sizes may differ.
    """
    count = 0
    total = sq_total = torch.zeros(())
    for image in images:
        pixels = image.double().flatten(1)
        count += pixels.shape[1]
        total = total + pixels.sum(1)
        sq_total = sq_total + (pixels * pixels).sum(1)
    mean = total / count
    std = (sq_total / count - mean**2).clamp(min=0).sqrt()
    # A channel of one value says nothing; rounding must not blow it up.
    std[std < MIN_STD] = 1.0
    return ChannelStatistics(mean.float()[:, None, None], std.float()[:, None, None])
