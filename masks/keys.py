"""Rules on keys alone: padding that no query sees."""

from typing import Any

import torch
from torch import Tensor

from .rule import MaskMod


def mask_of_rows(key_mask: Tensor, batch: int, heads: int) -> Tensor:
    """A key mask ``(m, n)``, ``m`` a divisor of ``batch * heads``, as ``(batch, heads or 1, n)``.

    Rows, counted over batch and heads, share a mask in runs of ``batch * heads / m``.
    """
    rows_each = batch * heads // key_mask.shape[0]
    if rows_each % heads == 0:
        return key_mask.repeat_interleave(rows_each // heads, dim=0)[:, None]
    return key_mask.repeat_interleave(rows_each, dim=0).view(batch, heads, -1)


def padding_mod(kept: Tensor) -> MaskMod:
    """FlexAttention's mask_mod of ``kept``, boolean ``(batch, heads or 1, slots)``, True = keep."""
    heads = kept.shape[1]

    def keeps(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # Looked up by the kernel's own index: any arithmetic on it would cost more than the rest.
        return kept[batch, head if heads > 1 else 0, key]

    keeps.__name__ = "key_padding"
    return keeps


def without_padding(keys: Tensor, key_mask: Tensor) -> Tensor:
    """``keys`` ``(batch, kv_heads, n, d)``, zeros where ``(batch, heads or 1, n)`` hides them.

    A hidden NaN or inf would spread otherwise: its weight is 0, and 0 * NaN is NaN.
    """
    if key_mask.shape[1] > 1:  # a key head stays where one of its query heads keeps it
        key_mask = key_mask.unflatten(1, (keys.shape[1], -1)).any(2)
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
