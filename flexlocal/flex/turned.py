"""Queries and keys as the flex path turns them, by rotary embeddings and xpos, before a kernel.

Shapes are those of ``spec``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..masks.key_layout import KeyLayout
from ..masks.rule import Rule
from ..positions import positions
from ..rotation import Table, rotate, tables_of
from ..spec import Inputs
from ..xpos import Xpos

Turn = Callable[..., tuple[Tensor, Tensor]]
"""Rotates queries and keys, or with ``back=True`` their gradients the other way; no autograd."""


def turned(
    rule: Rule, layout: KeyLayout | None, inputs: Inputs, xpos: Xpos | None
) -> tuple[Tensor, Tensor]:
    """Queries and keys, rotated, in their own dtypes; keys in their slots, if there is a layout."""
    q, k, inv_freq = inputs.q, inputs.k, inputs.inv_freq
    assert inv_freq is not None
    shift = 0 if rule.window is None else rule.window.after
    factors: tuple[Tensor | None, Tensor | None] = None, None
    if xpos is not None:
        factors = _xpos_factors(xpos, rule, layout, q.shape[-2])
    slots = k.shape[2] if layout is None else layout.all_slots
    query, key = positions(rule if layout is None else layout, q, slots)
    of_queries, of_keys = tables_of(query, key, shift, inv_freq, q.dtype, factors)
    turned_k = _rotated(k, of_keys) if layout is None else rotate(k, of_keys, layout)
    return _rotated(q, of_queries).to(q.dtype), turned_k.to(k.dtype)


def _xpos_factors(
    xpos: Xpos, rule: Rule, layout: KeyLayout | None, n: int
) -> tuple[Tensor, Tensor]:
    """What queries and key slots are multiplied by, ``(n, d / 2)`` and ``(slots, d / 2)``."""
    shift, dtype = rule.window.after, torch.float32
    if layout is None:
        return xpos.scales(n, 0, 0, shift, dtype)
    query, slot = xpos.scales(layout.segment, layout.before, layout.after, shift, dtype)
    return query.repeat(layout.count, 1)[:n], slot.repeat(layout.count, 1)


def _rotated(x: Tensor, table: Table) -> Tensor:
    """As ``rotate``, with the result in ``x``'s order in memory.

    FlexAttention's output takes its query's order. In another one, a user's view that joins the
    heads again would become a copy.
    """
    if x.stride(1) >= x.stride(2):
        return rotate(x, table)
    cos, sin = (y[:, None] if y.dim() == 2 else y.transpose(1, 2) for y in table)
    return rotate(x.transpose(1, 2), (cos, sin)).transpose(1, 2)
