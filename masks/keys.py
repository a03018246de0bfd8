"""Rules on keys alone: padding that no query sees."""

import torch
from torch import Tensor

from .clip import at_least, at_most
from .rule import MaskMod, Rule


def mask_of_rows(key_mask: Tensor, batch: int, heads: int) -> Tensor:
    """A key mask ``(m, n)``, ``m`` a divisor of ``batch * heads``, as ``(batch, heads or 1, n)``.

    Rows, counted over batch and heads, share a mask in runs of ``batch * heads / m``.
    """
    rows_each = batch * heads // key_mask.shape[0]
    if rows_each % heads == 0:
        return key_mask.repeat_interleave(rows_each // heads, dim=0)[:, None]
    return key_mask.repeat_interleave(rows_each, dim=0).view(batch, heads, -1)


def padding_mod(key_mask: Tensor, rule: Rule) -> MaskMod:
    """FlexAttention's mask_mod of a key mask, boolean ``(batch, heads or 1, n)``, by position."""
    heads, n = key_mask.shape[1:]

    def kept(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # A slot may hold no key; the rule hides it, but it is looked up all the same.
        position = at_most(at_least(rule.key_position(query, key), 0), n - 1)
        return key_mask[batch, head if heads > 1 else 0, position]

    kept.__name__ = "key_padding"
    return kept


def without_padding(keys: Tensor, key_mask: Tensor) -> Tensor:
    """``keys`` ``(batch, kv_heads, n, d)``, zeros where ``(batch, heads or 1, n)`` hides them.

    A hidden NaN or inf would spread otherwise: its weight is 0, and 0 * NaN is NaN.
    """
    if key_mask.shape[1] > 1:  # a key head stays where one of its query heads keeps it
        key_mask = key_mask.unflatten(1, (keys.shape[1], -1)).any(2)
    return torch.where(key_mask[..., None], keys, 0.0)
