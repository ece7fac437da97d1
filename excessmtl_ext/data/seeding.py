"""Independent random streams from one seed: pairing, splitting, corruption and batch order never share draws."""

import hashlib

import torch


def seeded_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Returns a CPU generator that depends on the seed and on its purpose only.

    A stream per purpose keeps choices apart: another noise level does not change the pairing, another number of
    epochs does not change the corrupted samples, and the batch order of epoch 7 does not depend on epochs 1 to 6.

    Args:
        seed: The seed of the run.
        purpose: Names the stream, for example ``"batch_order", epoch``.

    Example:
        >>> first = torch.randperm(3, generator=seeded_generator(0, "batch_order", 7))
        >>> second = torch.randperm(3, generator=seeded_generator(0, "batch_order", 7))
        >>> bool((first == second).all())
        True
    """
    digest = hashlib.sha256(repr((seed, purpose)).encode()).digest()
    # 63 bits: manual_seed takes a signed 64-bit integer.
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
