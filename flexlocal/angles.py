"""Angles of rotary embeddings, exact at any position.

An fp32 product of a position and a frequency is off by a twentieth of a radian at position 10**6.
"""

import math

import torch
from torch import Tensor

from .torch_limits.kernels import has_float64


def angles(position: Tensor, inv_freq: Tensor) -> Tensor:
    """``position`` times each frequency, in radians: ``(..., d / 2)``.

    In fp64, and where a device has none in fp32, less whole turns.

    Args:
        position: integer ``(...)``.
        inv_freq: ``(d / 2,)``.
    """
    if has_float64(inv_freq.device):
        return position.to(torch.float64)[..., None] * inv_freq.to(torch.float64)
    return _by_integers(position, inv_freq)


_STEPS = 2935890503282001226
"""A radian in 2**64ths of a turn, 2**64 / (2 pi)."""


def _by_integers(position: Tensor, inv_freq: Tensor) -> Tensor:
    """``angles`` without fp64, less whole turns: fp32 in [-pi, pi].

    A 64-bit number counts 2**64ths of a turn. Where a product wraps it loses whole turns, and is
    otherwise exact at every position.

    Args:
        inv_freq: at least 0.
    """
    bits = inv_freq.to(torch.float32).view(torch.int32).to(torch.int64)
    exponent, mantissa = bits >> 23, bits & (2**23 - 1) | 2**23
    # The frequency is `mantissa * 2 ** (exponent - 150)`. Its product with `_STEPS` has 88 bits.
    high = _times_power_of_2(mantissa * (_STEPS >> 32), exponent - 118)
    low = _times_power_of_2(mantissa * (_STEPS & (2**32 - 1)), exponent - 150)
    steps = position.to(torch.int64)[..., None] * (high + low)
    return steps.to(torch.float32) * (2 * math.pi / 2**64)


def _times_power_of_2(x: Tensor, power: Tensor) -> Tensor:
    up, down = power.clamp(0, 63), (-power).clamp(0, 63)
    return torch.where(power < 0, x >> down, x << up)
