"""bfloat16 state: float32 numbers are rounded to a neighbour at random, so that their mean is the number itself.

The bits are a function of (seed, step, task, position in the row) and of nothing else: equal on
every device and again after a checkpoint (``csrc/stochastic_rounding.h``).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK_32 = 0xFFFFFFFF
_MASK_64 = 0xFFFFFFFFFFFFFFFF


def _mixed(z: int) -> int:
    """Applies the output function of SplitMix64 (Steele, Lea, Flood 2014) on 64 bits."""
    z = (z + 0x9E3779B97F4A7C15) & _MASK_64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & _MASK_64
    return z ^ z >> 31


def rounding_words(
    seed: int,
    step: int,
    task: int,
    num_positions: int,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Returns the 32 random bits of every position of a task's row of the state in one step, as int64 [num_positions].

    A function of its arguments and nothing else. The low 16 bits round S, the high 16 bits m. Two
    rounds of multiply and xorshift (constants: C. Wellons, hash-prospector) under a 64-bit key.

    Args:
        seed: The balancer's.
        step: ``num_steps``, the steps that counted so far.
        task: The row.
        num_positions: Padded P.
        device: Where the bits are wanted.
    """
    of_step = _mixed(_mixed(seed & _MASK_64) + step)
    key = _mixed(of_step + 2 * task)
    position = torch.arange(num_positions, device=device)
    word = position & _MASK_32 ^ ((key & _MASK_32) + (position >> 32) * 0x9E3779B9 & _MASK_32)
    word = (word ^ word >> 16) * 0x7FEB352D & _MASK_32
    word ^= key >> 32
    word = (word ^ word >> 15) * 0x846CA68B & _MASK_32
    return word ^ word >> 16


def stochastically_rounded(values: Tensor, random_16_bits: Tensor) -> Tensor:
    r"""Rounds float32 to bfloat16 so that the mean over the random bits is the number itself.

    .. math:: P(\text{round}(x) = x_+) = \frac{x - x_-}{x_+ - x_-}, \qquad \mathrm E[\text{round}(x)] = x

    with the bfloat16 neighbours :math:`x_- \le x < x_+` of x. Exact, since a float32 lies a whole number of 65,536ths
    between its neighbours. From the largest finite bfloat16 (3.39e38) on it cuts off, so that
    nothing finite becomes infinite; infinities and NaN stay.

    Args:
        values: float32.
        random_16_bits: int64, uniform on 0 to 65,535.
    """
    bits = values.float().view(torch.int32).long() & _MASK_32
    magnitude = bits & 0x7FFFFFFF
    rounded = torch.where(magnitude < 0x7F7F0000, bits + random_16_bits, bits)
    rounded = torch.where(magnitude > 0x7F800000, rounded | 0x00400000, rounded)
    return (rounded >> 16).to(torch.int16).view(torch.bfloat16)
