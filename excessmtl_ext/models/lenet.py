"""The network of the paper's MultiMNIST experiment."""

from collections.abc import Sequence

from torch import nn

from excessmtl_ext.models.encoder_heads import EncoderHeads

# He et al. 2024 give kernel 5 and the linear layer of 80. Their text names no channel counts: 10 and 20 are those of
# the MultiMNIST network they follow (Sener & Koltun 2018, MultiLeNetR).
CHANNELS = (10, 20)
KERNEL = 5
FEATURES = 80


def lenet(num_outputs: Sequence[int], *, image_size: int = 28) -> EncoderHeads:
    """Builds the MultiMNIST network of He et al. 2024: two convolutions, a linear layer of 80, linear heads.

    Args:
        num_outputs: Outputs of each task's head.
        image_size: Height and width of the one-channel images, at least 16.

    Shape:
        Inputs float [B, 1, image_size, image_size]; returns T tensors [B, num_outputs[i]].

    Raises:
        ValueError: ``image_size`` leaves nothing for the second pooling.
    """
    after_first = (image_size - KERNEL + 1) // 2
    after_second = (after_first - KERNEL + 1) // 2
    if after_second < 1:
        raise ValueError(f"Expected `image_size` of at least 16, but got {image_size}.")
    encoder = nn.Sequential(
        nn.Conv2d(1, CHANNELS[0], KERNEL),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(CHANNELS[0], CHANNELS[1], KERNEL),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(CHANNELS[1] * after_second**2, FEATURES),
        nn.ReLU(),
    )
    return EncoderHeads(encoder, [nn.Linear(FEATURES, outputs) for outputs in num_outputs])
