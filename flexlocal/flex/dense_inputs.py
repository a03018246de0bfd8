"""Queries, keys and values as ``dense`` gives them to its kernels: rotated, and free of padding.

It is a handful of launches, for any size and without a compiler: what counts there is the host's
time. Shapes are those of ``spec``.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..rotary import table_of
from ..torch_limits import state_of
from .kept import kept

SHORTEST = 1024
"""Positions in a table of rotations, at least."""


class Rotation(NamedTuple):
    """What rotates ``n`` tokens, in fp32 at least.

    Attributes:
        cos: ``(n, 1, d / 2)``, for both halves of a token.
        sin: ``(n, 2, d / 2)``, negative for the first half.
    """

    cos: Tensor
    sin: Tensor


class Padding(NamedTuple):
    """A key mask, which tells padded queries as well.

    Attributes:
        mask: ``(b, h or 1, n, 1)``, False where a token is padding.
        zero: a 0 of keys' dtype on their device. A plain number would have to be sent there first.
    """

    mask: Tensor
    zero: Tensor


class Treatment(NamedTuple):
    """What is done to queries, keys and values.

    Attributes:
        rotations: of queries and of keys, if they are to be rotated.
        padding: what is to be cleared, if there is any.
    """

    rotations: tuple[Rotation, Rotation] | None
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
    rotations, padding = treatment
    if padding is not None:
        # A NaN in padding would spread: its weight is 0, and 0 * NaN is NaN.
        k, v = (torch.where(padding.mask, x, padding.zero) for x in (k, v))
        if trains:  # and from a padded query by its gradient, which is 0
            q = torch.where(padding.mask, q, q.nan_to_num(0.0, 0.0, 0.0))
    if rotations is not None:
        q, k = _rotated(q, k, rotations)
    return q, k, v


class _Treated(torch.autograd.Function):
    """All of it as one step of autograd.

    Gradients of padding are 0 as they come, but for those of values: a query that sees padding
    alone gives it weight.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, treatment: Treatment
    ) -> tuple[Tensor, ...]:
        ctx.rotations, padding = treatment
        ctx.save_for_backward(*(padding or ()))
        return _forward(q, k, v, treatment, trains=True)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.saved_tensors:
            mask, zero = ctx.saved_tensors
            dv = torch.where(mask, dv, zero)
        if ctx.rotations is not None:
            dq, dk = _rotated(dq, dk, ctx.rotations, back=True)
        return dq, dk, dv, None


def _rotated(
    q: Tensor, k: Tensor, rotations: tuple[Rotation, Rotation], back: bool = False
) -> tuple[Tensor, Tensor]:
    of_queries, of_keys = rotations
    if of_queries is not of_keys:
        return _one_rotated(q, of_queries, back), _one_rotated(k, of_keys, back)
    heads = q.shape[1]
    both = _one_rotated(torch.cat((q, k), dim=1), of_keys, back)  # four launches instead of six
    return both[:, :heads], both[:, heads:]


def _one_rotated(x: Tensor, rotation: Rotation, back: bool) -> Tensor:
    """``x``, its halves rotated against each other and rounded once."""
    halves = x.view(*x.shape[:-1], 2, -1)
    terms = halves * rotation.cos, halves.flip(-2), rotation.sin
    sign = -1 if back else 1
    if torch.is_grad_enabled() and x.requires_grad:  # a gradient, of which another is wanted
        return torch.addcmul(*terms, value=sign).to(x.dtype).flatten(-2)
    return torch.addcmul(*terms, value=sign, out=torch.empty_like(halves)).flatten(-2)


def rotations_of(
    inv_freq: Tensor, n: int, shift: int, dtype: torch.dtype
) -> tuple[Rotation, Rotation]:
    """What rotates ``n`` queries and keys of ``dtype``.

    Args:
        inv_freq: ``(d / 2,)``.
        shift: added to the positions of queries.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    of_keys = _rotation(inv_freq, 0, n, dtype)
    return _rotation(inv_freq, shift, n, dtype) if shift else of_keys, of_keys


def _rotation(inv_freq: Tensor, first: int, n: int, dtype: torch.dtype) -> Rotation:
    """What rotates ``n`` tokens from position ``first`` on: a part of a table that is kept."""
    values = _values(inv_freq)
    if values is None:
        with torch.no_grad():
            return _made(inv_freq, first, n, dtype)
    length = max(SHORTEST, 1 << (n - 1).bit_length())
    make = partial(_made, inv_freq, first, length, dtype)
    cos, sin = kept((first, length, dtype, values), inv_freq.device, make)
    return Rotation(cos[:n], sin[:n])


def _made(inv_freq: Tensor, first: int, length: int, dtype: torch.dtype) -> Rotation:
    position = torch.arange(first, first + length, device=inv_freq.device)
    cos, sin = table_of(position, inv_freq, dtype)
    return Rotation(cos[:, None], torch.stack((-sin, sin), dim=1))


def _values(inv_freq: Tensor) -> tuple[float, ...] | None:
    """The frequencies, by which the layers of a model share a table.

    They are read when a tensor is first met, and again once it has changed: that waits for the
    device. None where they cannot be read, or where nothing tells that they have changed.
    """
    state = state_of(inv_freq)
    if state is None:
        return None
    known: tuple[tuple[int, int], tuple[float, ...]] | None = _READ.get(inv_freq)
    if known is not None and known[0] == state:
        return known[1]
    if inv_freq.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    values = tuple(inv_freq.tolist())
    _READ[inv_freq] = state, values
    return values


_READ = WeakTensorKeyDictionary()
"""Frequencies that were read, beside the state that their tensor was in."""
