"""The network of the paper's Office-Home experiment."""

from collections.abc import Sequence
from urllib.error import URLError

import torch
from torch import nn

from excessmtl_ext.models.encoder_heads import EncoderHeads

FEATURES = 512


def resnet18_heads(num_outputs: Sequence[int], *, pretrained: bool = False) -> EncoderHeads:
    """Builds torchvision's ResNet-18 (He et al. 2016) with one linear head per task instead of its classifier.

    Args:
        num_outputs: Outputs of each task's head.
        pretrained: Start from torchvision's ImageNet weights, which are downloaded on first use. The paper does not.

    Shape:
        Inputs float [B, 3, H, W], or a list of T of them; returns T tensors [B, num_outputs[i]].

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        RuntimeError: the weights are neither on this machine nor can they be downloaded.
    """
    try:
        from torchvision import models
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'ResNet-18 comes with torchvision, which is not installed: pip install ".[train]" in a clone.',
            name=error.name,
        ) from error
    encoder = models.resnet18()
    url = models.ResNet18_Weights.IMAGENET1K_V1.url
    try:
        if pretrained:
            # Not resnet18(weights=...), which unpickles what it finds in the cache.
            encoder.load_state_dict(
                torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True)
            )
    except URLError as error:
        raise RuntimeError(
            f"Expected to download {url} for `pretrained`, but got: {error.reason}. Put the file into the folder "
            "`checkpoints` of torch.hub.get_dir(), or pass pretrained=False."
        ) from error
    encoder.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return EncoderHeads(encoder, [nn.Linear(FEATURES, outputs) for outputs in num_outputs])
