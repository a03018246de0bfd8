"""Sizes and positions that a compiler may make symbolic."""

import operator
from typing import TypeVar

import torch
from torch import Tensor

from .tracing import is_tracing

Index = TypeVar("Index", int, Tensor)


def plain_int(size: int) -> int:
    """``size`` as a number, where a compiler made it symbolic.

    Kernels cannot be built for a symbolic number of heads, nor a mask_mod from a symbolic window;
    Dynamo makes both symbolic once it has met several (torch 2.11 to 2.15). Inside a compiler this
    guards on the number, and each one is a graph.
    """
    return operator.index(size)


def plain_float(x: float) -> float:
    """``x`` as a number, where a compiler made it symbolic; as ``plain_int``.

    ``dynamic=True`` makes settings of a layer symbolic, and Dynamo one that has changed. A kernel
    can capture none of them (torch 2.11 to 2.15).
    """
    if not torch.compiler.is_compiling():
        return x
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # a third of a second

    number: float = guard_scalar(x)
    return number


def is_symbolic(size: int) -> bool:
    """Whether a compiler is to make one graph for many sizes: to compare it would guard on it."""
    if is_tracing():  # sizes are 0-d tensors
        return True
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # a third of a second

    return not has_static_value(size)


def at_least(value: Index, low: Index | int) -> Index:
    """``value``, or ``low`` where that is more.

    By ``torch.where`` and not ``clamp``: torch 2.13's Inductor fails ("vr must not be None") on
    ``max(0, position) // 128``, as block lists have it.
    """
    if isinstance(value, Tensor):
        return torch.where(value > low, value, low)
    return max(value, low)


def at_most(value: Index, high: Index | int) -> Index:
    """``value``, or ``high`` where that is less; not by ``clamp``, as ``at_least``."""
    if isinstance(value, Tensor):
        return torch.where(value < high, value, high)
    return min(value, high)
