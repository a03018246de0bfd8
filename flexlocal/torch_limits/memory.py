"""Tensors that a compiled graph has to hold in memory of their own."""

import math

import torch
from torch import Tensor


def written_out(x: Tensor) -> Tensor:
    """``x``; inside ``torch.compile`` a contiguous buffer of its own.

    Inductor computes a small table anew for every element that reads it, and the CPU's kernel can
    look up nothing that the graph computes (torch 2.11 to 2.15: a C++ error). It may also transpose
    block lists and captured tensors, whose strides a GPU's kernels take for granted (torch 2.11:
    illegal memory access). ``as_strided`` prevents all three.
    """
    return settled(x) if torch.compiler.is_compiling() else x


def settled(x: Tensor) -> Tensor:
    """``written_out`` for code that is traced while ``is_compiling()`` is False.

    Not for tensors whose elements are all equal: Inductor makes a constant of them, and may leave
    gaps between its rows (torch 2.11).
    """
    # Inductor may know the strides only as quotients of symbolic sizes. These are products.
    strides = [math.prod(x.shape[dim + 1 :]) for dim in range(x.dim())]
    return x.contiguous().as_strided(x.shape, strides)


@torch.library.custom_op("flexlocal::copied", mutates_args=())
def copied(x: Tensor) -> Tensor:
    """``x`` in contiguous memory of its own, by an operator that Inductor fuses with no other.

    The CPU's FlexAttention kernel refuses neighbours that Inductor fused with it, and reads a view
    that the graph makes without its offset (torch 2.13).
    """
    return x.clone(memory_format=torch.contiguous_format)


@copied.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


copied.register_autograd(lambda ctx, grad: grad)


def number_in_memory(n: int, device: torch.device) -> Tensor:
    """``n`` as a 0-d int32 buffer, so that kernels load it instead of specialising on it.

    Dropout's backward pass cannot capture a symbolic int (torch 2.11 to 2.15), nor a GPU's kernel
    arithmetic on one (torch 2.11).
    """
    # Not torch.full: Inductor would make a constant of it, and no buffer (torch 2.11 to 2.15).
    return written_out(torch.arange(n, n + 1, dtype=torch.int32, device=device).view(()))
