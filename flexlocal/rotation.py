"""Rotates queries and keys by their positions, before either path.

Su et al., RoFormer, arXiv:2104.09864. Shapes: ``n`` tokens, ``d`` the head size.
"""

from typing import Any

import torch
from torch import Tensor

from .angles import angles
from .masks.key_layout import KeyLayout
from .torch_limits.memory import written_out
from .torch_limits.tracing import is_transformed

Table = tuple[Tensor, Tensor]
"""The cosines and sines of positions' angles, ``(..., n, d / 2)`` each."""


def table_of(
    position: Tensor, inv_freq: Tensor, dtype: torch.dtype, factor: Tensor | None = None
) -> Table:
    """The table that turns ``dtype``, in fp32 at least.

    Args:
        position: ``(n,)``, or what broadcasts to the dimensions before the last.
        factor: multiplies both halves of what is turned; ``(n, d / 2)``, or what broadcasts
            likewise.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    angle = angles(position, inv_freq)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    if factor is not None:
        cos, sin = cos * factor, sin * factor
    return written_out(cos), written_out(sin)


def tables_of(
    query: Tensor,
    key: Tensor,
    shift: int,
    inv_freq: Tensor,
    dtype: torch.dtype,
    factors: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Table, Table]:
    """The tables of queries and of keys, computed once where they are the same.

    Args:
        query, key: positions as for ``table_of``; one tensor for both says that they are equal.
        shift: added to the positions of queries.
        factors: of queries and of keys, as for ``table_of``.
    """
    of_keys = table_of(key, inv_freq, dtype, factors[1])
    if query is key and not shift and factors[0] is None:
        return of_keys, of_keys
    return table_of(query + shift if shift else query, inv_freq, dtype, factors[0]), of_keys


def rotate(x: Tensor, table: Table, layout: KeyLayout | None = None) -> Tensor:
    """``x`` ``(..., n, d)`` rotated by a table of its positions, in that table's dtype.

    Args:
        layout: lays ``x`` out in slots first; ``n`` of table and result are then slots.
    """
    cos, sin = table
    if is_transformed():
        return _Turned.forward(x, cos, sin, layout)
    turned: Tensor = _Turned.apply(x, cos, sin, layout)  # type: ignore[no-untyped-call]
    return turned


class _Turned(torch.autograd.Function):
    """Rotates the halves of ``x``, or of its slots, against each other; backward rotates back.

    Inductor makes one pass each way of this, which loads several channels at a time and a table for
    half of them only. Of autograd's own backward pass it makes several: that one adds up the halves
    one by one, and writes every copy of a key before it adds them up.
    """

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, layout: KeyLayout | None) -> Tensor:
        laid_out = x if layout is None else layout.in_slots(x)
        return torch.cat(_turned(laid_out, cos, sin, cos.dtype), dim=-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, cos, sin, ctx.layout = inputs
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        halves = _turned(grad, cos, -sin, ctx.dtype)
        if ctx.layout is not None:  # before `cat`, whose result Inductor would write to memory
            halves = tuple(ctx.layout.from_slots(half) for half in halves)
        return torch.cat(halves, dim=-1), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Both halves of ``x``, rotated in ``cos``'s dtype, each a tensor of its own in ``dtype``."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)
