"""Tensors that a compiler must write out as they are."""

import math

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
    """``written_out`` for what a compiler traces without knowing that it does.

    Not for equal numbers: a compiler makes a constant of them, whose rows it may lay out with gaps.
    """
    # Its strides may be quotients of open sizes, where products of its own say the same.
    strides = [math.prod(x.shape[dim + 1 :]) for dim in range(x.dim())]
    return x.contiguous().as_strided(x.shape, strides)


@torch.library.custom_op("flexlocal::copied", mutates_args=())
def copied(x: Tensor) -> Tensor:
    """``x`` in contiguous memory of its own, an operator that a compiler fuses with no other."""
    return x.clone(memory_format=torch.contiguous_format)


@copied.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


copied.register_autograd(lambda ctx, grad: grad)
