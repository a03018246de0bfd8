"""Rules on keys alone: padding that no query sees."""

from typing import Any

import torch
from torch import Tensor

from .rule import MaskMod


def mask_of_rows(key_mask: Tensor, batch: int, heads: int) -> Tensor:
    """A key mask ``(m, n)``, ``m`` a divisor of ``batch * heads``, as ``(batch, heads or 1, n)``.

    Rows, counted over batch and heads, share a mask in runs of ``batch * heads / m``.
    """
    if batch * heads == 0:
        return key_mask.new_ones(batch, 1, key_mask.shape[1])
    rows_each = batch * heads // key_mask.shape[0]
    copies, masks = (rows_each, heads) if rows_each % heads else (rows_each // heads, 1)
    # Not repeat_interleave, which launches a copy of what is as it should be.
    return key_mask[:, None].expand(-1, copies, -1).contiguous().view(batch, masks, -1)


def padding_mod(kept: Tensor) -> MaskMod:
    """FlexAttention's mask_mod of ``kept``, boolean ``(batch, heads or 1, slots)``, True = keep."""
    by_head = kept.shape[1] > 1  # and no size, which a compiler may leave open, in a kernel

    def keeps(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # Looked up by the kernel's own index: any arithmetic on it would cost more than the rest.
        return kept[batch, head if by_head else 0, key]

    keeps.__name__ = "key_padding"
    return keeps


def for_each_head(keys: Tensor, heads: int) -> Tensor:
    """``(batch, kv_heads, n, d)`` as ``(batch, heads, n, d)``: each query head of a group a copy.

    What a mask by head hides from one of them, another may see.
    """
    kv_heads = keys.shape[1]
    return keys if heads == kv_heads else keys.repeat_interleave(heads // kv_heads, dim=1)


def without_padding(keys: Tensor, key_mask: Tensor) -> Tensor:
    """``keys`` ``(batch, heads, n, d)``, zeros where ``(batch, heads or 1, n)`` hides them.

    A hidden NaN or inf would spread otherwise: its weight is 0, and 0 * NaN is NaN.
    """
    cleared: Tensor = _Cleared.apply(keys, key_mask)  # type: ignore[no-untyped-call]
    return cleared


class _Cleared(torch.autograd.Function):
    """Zeros for hidden keys; nothing to do in the backward pass, their gradients are zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(keys: Tensor, key_mask: Tensor) -> Tensor:
        return torch.where(key_mask[..., None], keys, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
