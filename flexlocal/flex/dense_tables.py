"""Tables that short sequences share, kept on their device: what windows hide, and what rotates.

Shapes are those of ``spec``.
"""

import weakref
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..masks.window import Window
from ..rotation import table_of
from ..torch_limits.tensors import has_values, state_of
from .kept import kept

LONGEST = 1024
"""The most tokens of which a table tells what is hidden: it takes 2 MB in 16 bits."""

SHORTEST = 1024
"""Positions in a table of rotations, at least."""


def hidden_by(window: Window, q: Tensor) -> Tensor:
    """What is added to scores: 0 where a token sees another, else -inf.

    Returns:
        ``(LONGEST, LONGEST)``, in ``q``'s dtype on its device.
    """
    make = partial(_hiding, window, q.dtype, q.device)
    return kept((window, q.dtype), q.device, make) if has_values(q) else make()


def _hiding(window: Window, dtype: torch.dtype, device: torch.device) -> Tensor:
    token = torch.arange(LONGEST, device=device)
    table = torch.full((LONGEST, LONGEST), -torch.inf, dtype=dtype, device=device)
    return table.masked_fill_(window.sees(0, 0, token[:, None], token), 0.0)


Rotations = tuple[Tensor, Tensor] | tuple[None, None]
"""Of queries and of keys: ``(n or more, d)``, the cosines of each token and then its sines."""


def rotations_of(inv_freq: Tensor | None, n: int, shift: int, dtype: torch.dtype) -> Rotations:
    """What rotates queries and keys.

    Args:
        inv_freq: ``(d / 2,)``, or None for no rotation.
        n: how many there are.
        shift: added to the positions of queries.
        dtype: theirs; what rotates them is in fp32 at least.
    """
    if inv_freq is None:
        return None, None
    dtype = torch.promote_types(dtype, torch.float32)
    of_keys = _rotation(inv_freq, 0, n, dtype)
    return _rotation(inv_freq, shift, n, dtype) if shift else of_keys, of_keys


def _rotation(inv_freq: Tensor, first: int, n: int, dtype: torch.dtype) -> Tensor:
    """What rotates ``n`` tokens or more from position ``first`` on."""
    values = _values(inv_freq)
    if values is None:
        with torch.no_grad():
            return _turning(inv_freq, first, n, dtype)
    length = max(SHORTEST, 1 << (n - 1).bit_length())
    make = partial(_turning, inv_freq, first, length, dtype)
    return kept((first, length, dtype, values), inv_freq.device, make)


def _turning(inv_freq: Tensor, first: int, length: int, dtype: torch.dtype) -> Tensor:
    position = torch.arange(first, first + length, device=inv_freq.device)
    return torch.cat(table_of(position, inv_freq, dtype), dim=1)


class _Read(NamedTuple):
    """Frequencies that were read, and the state that their tensor was in."""

    tensor: "weakref.ref[Tensor]"
    state: tuple[int, int]
    values: tuple[float, ...]


_READ: dict[int, _Read] = {}
"""By the ``id`` of their tensor: torch's own weak dictionary takes several times as long."""


def _forget(number: int, _: object) -> None:
    _READ.pop(number, None)


def _values(inv_freq: Tensor) -> tuple[float, ...] | None:
    """The frequencies, by which the layers of a model share a table.

    They are read when a tensor is first met, and again once it has changed: that waits for the
    device. None where they cannot be read, or where nothing tells that they have changed.
    """
    state = state_of(inv_freq)
    if state is None:
        return None
    known = _READ.get(id(inv_freq))
    if known is not None and known.tensor() is inv_freq and known.state == state:
        return known.values
    if inv_freq.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    values = tuple(inv_freq.tolist())
    tensor = weakref.ref(inv_freq, partial(_forget, id(inv_freq)))
    _READ[id(inv_freq)] = _Read(tensor, state, values)
    return values
