"""Clipping of token positions, for ints and integer tensors alike.

``torch.where`` and not ``clamp``: torch 2.13's inductor fails on ``max(0, position)`` when it
folds the positions of a block mask into index arithmetic ("vr must not be None").
"""

import torch
from torch import Tensor

from .window import Index


def at_least(value: Index, low: Index | int) -> Index:
    """``value``, or ``low`` where that is more."""
    if isinstance(value, Tensor):
        return torch.where(value > low, value, low)
    return max(value, low)


def at_most(value: Index, high: Index | int) -> Index:
    """``value``, or ``high`` where that is less."""
    if isinstance(value, Tensor):
        return torch.where(value < high, value, high)
    return min(value, high)
