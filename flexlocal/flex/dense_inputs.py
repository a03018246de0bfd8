"""Queries, keys and values as ``dense`` gives them to its kernels: turned, and free of padding.

The host's time is what counts there: this is a handful of launches, for any size and without a
compiler. Shapes are those of ``spec``.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from ..rotary import table_of
from ..torch_limits import has_values
from .kept import kept

SHORTEST = 1024
"""Positions of a table of rotations, at least."""

Turn = tuple[Tensor, Tensor]
"""What turns ``n`` tokens, in fp32 at least: cosines ``(n, 1, d / 2)`` for both halves, and sines
``(n, 2, d / 2)``, of which those for the first half are negative."""


class Padding(NamedTuple):
    """A key mask, which is that of the queries too.

    Attributes:
        kept: ``(b, h or 1, n, 1)``, False where a token is padding.
        zero: a 0 of keys' dtype on their device. A plain number would have to be sent there first.
    """

    kept: Tensor
    zero: Tensor


class Treatment(NamedTuple):
    """What is done to queries, keys and values.

    Attributes:
        turns: of queries and of keys, if they are to be rotated.
        padding: what is to be cleared, if there is any.
    """

    turns: tuple[Turn, Turn] | None
    padding: Padding | None


def treated(
    q: Tensor, k: Tensor, v: Tensor, treatment: Treatment, trains: bool
) -> Sequence[Tensor]:
    """Queries, keys and values, treated.

    Args:
        trains: whether gradients will be taken.
    """
    if treatment == (None, None):
        return q, k, v
    if not trains:
        return _forward(q, k, v, treatment, trains)
    found: Sequence[Tensor] = _Treated.apply(q, k, v, treatment)  # type: ignore[no-untyped-call]
    return found


def _forward(
    q: Tensor, k: Tensor, v: Tensor, treatment: Treatment, trains: bool
) -> tuple[Tensor, ...]:
    turns, padding = treatment
    if padding is not None:
        # What padding holds, NaN perhaps, would spread: its weight is 0, and 0 * NaN is NaN.
        k, v = (torch.where(padding.kept, x, padding.zero) for x in (k, v))
        if trains:  # so it would by gradients of queries that are padding, which are 0
            q = torch.where(padding.kept, q, q.nan_to_num(0.0, 0.0, 0.0))
    if turns is not None:
        q, k = _rotated(q, k, turns)
    return q, k, v


class _Treated(torch.autograd.Function):
    """One step of autograd for all of it.

    Gradients of padding are 0 as they come, but for those of values, which queries that see padding
    alone weigh.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, treatment: Treatment
    ) -> tuple[Tensor, ...]:
        ctx.turns, padding = treatment
        ctx.save_for_backward(*(() if padding is None else padding[:2]))
        return _forward(q, k, v, treatment, trains=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.saved_tensors:
            kept, zero = ctx.saved_tensors
            dv = torch.where(kept, dv, zero)
        if ctx.turns is not None:
            dq, dk = _rotated(dq, dk, ctx.turns, back=True)
        return dq, dk, dv, None


def _rotated(
    q: Tensor, k: Tensor, turns: tuple[Turn, Turn], back: bool = False
) -> tuple[Tensor, Tensor]:
    of_queries, of_keys = turns
    if of_queries is not of_keys:
        return _turned(q, of_queries, back), _turned(k, of_keys, back)
    heads = q.shape[1]
    both = _turned(torch.cat((q, k), dim=1), of_keys, back)  # four launches in place of six
    return both[:, :heads], both[:, heads:]


def _turned(x: Tensor, turn: Turn, back: bool) -> Tensor:
    """``x``, its halves rotated against each other and rounded once."""
    cos, sin = turn
    halves = x.view(*x.shape[:-1], 2, -1)
    found = torch.empty_like(halves)
    torch.addcmul(halves * cos, halves.flip(-2), sin, value=-1 if back else 1, out=found)
    return found.flatten(-2)


def turns_of(inv_freq: Tensor, n: int, shift: int, dtype: torch.dtype) -> tuple[Turn, Turn]:
    """What rotates ``n`` queries and keys of ``dtype``.

    Args:
        inv_freq: ``(d / 2,)``.
        shift: added to the positions of queries.
    """
    length = max(SHORTEST, 1 << (n + shift - 1).bit_length())
    make = partial(_made, inv_freq, length, dtype)
    values = _values(inv_freq)
    cos, sin = make() if values is None else kept((length, values, dtype), inv_freq.device, make)
    of_keys = cos[:n], sin[:n]
    return (cos[shift : shift + n], sin[shift : shift + n]) if shift else of_keys, of_keys


def _made(inv_freq: Tensor, length: int, dtype: torch.dtype) -> Turn:
    position = torch.arange(length, device=inv_freq.device)
    cos, sin = table_of(position, inv_freq, dtype)
    return cos[:, None], torch.stack((-sin, sin), dim=1)


def _values(inv_freq: Tensor) -> tuple[float, ...] | None:
    """The frequencies, by which the layers of a model share a table.

    They are read once: that waits for the device. None where they cannot be read, or nothing would
    tell that they have changed.
    """
    if not has_values(inv_freq) or inv_freq.is_inference():
        return None
    known: tuple[int, tuple[float, ...]] | None = _READ.get(inv_freq)
    if known is not None and known[0] == inv_freq._version:
        return known[1]
    if inv_freq.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    values = tuple(inv_freq.tolist())
    _READ[inv_freq] = inv_freq._version, values
    return values


_READ = WeakTensorKeyDictionary()
"""Version and values of frequencies, as long as they live."""
