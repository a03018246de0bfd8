"""Tensors that a compiler must write out as they are."""

import torch
from torch import Tensor


def written_out(x: Tensor) -> Tensor:
    """``x``; inside ``torch.compile`` a contiguous buffer of its own.

    Inductor would otherwise compute a small table anew for every element that reads it, and may
    transpose block lists and captured tensors, whose strides FlexAttention's kernels take for
    granted (torch 2.11: illegal memory access). ``as_strided`` makes it settle both.
    """
    return settled(x) if torch.compiler.is_compiling() else x


def settled(x: Tensor) -> Tensor:
    """``written_out`` for what a compiler traces without knowing that it does."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())
