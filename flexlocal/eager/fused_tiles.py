"""Which queries and keys torch's fused kernel is called with: tiles, alone or several at once.

Shapes are those of ``formula``.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..masks.rule import Rule

_LEAST_TILE, _MOST_TILE, _VECTOR = 64, 128, 16
"""Queries in a tile. Shorter ones take as long for their overhead; longer ones score more keys that
are hidden. Long windows are cut into tiles of whole vectors."""

_NUMBERS = 2**21
"""Of the output, as many as a call may hold beside it."""


class Tile(NamedTuple):
    """First query of a tile and the one after its last, the same of its keys.

    The tile at its place in the next step, or the next but some, begins ``period`` tokens later.
    """

    start: int
    stop: int
    low: int
    high: int
    period: int


def length_of(rule: Rule) -> int:
    """Queries in a tile: some steps of the rule, or an even part of a long one."""
    step = max(1, rule.reach.step)
    steps = -(-_LEAST_TILE // step) * step
    if steps <= _MOST_TILE:
        return steps
    part = -(-step // -(-step // _MOST_TILE))
    return -(-part // _VECTOR) * _VECTOR


def tiles_of(
    rule: Rule, bounds: tuple[Tensor, Tensor] | None, n: int, keys: int, masks: int, scores: int
) -> Iterator[Tile]:
    """All tiles. Those that may share a mask come one after the other.

    Args:
        bounds: of all queries, where the rule does not tell them without its tensors.
        n, keys: how many queries and keys there are.
        masks: how often a tile's mask is held, for its heads.
        scores: about how many numbers these may be.
    """
    tile = length_of(rule)
    span = min(rule.reach.longest(tile), keys)
    if masks * tile * span > scores:
        tile = max(1, scores // (masks * span * _VECTOR)) * _VECTOR
    period = max(tile, rule.reach.step)
    for place in range(0, min(period, n), tile):
        for start in range(place, n, period):
            stop = min(start + tile, start - place + period, n)
            low, high = _keys_of(rule, bounds, start, stop)
            low, high = max(low, 0), min(high + 1, keys)
            if low >= high:
                low, high = 0, 1
            yield Tile(start, stop, low, high, period)


def _keys_of(
    rule: Rule, bounds: tuple[Tensor, Tensor] | None, start: int, stop: int
) -> tuple[Any, Any]:
    """First and last key that some of these queries may see."""
    if rule.tensors or rule.by_head:
        assert bounds is not None
        first, last = bounds
        return first[..., start].min().item(), last[..., stop - 1].max().item()
    return rule.keys(0, 0, start)[0], rule.keys(0, 0, stop - 1)[1]


def parts_of(alike: list[Tile], *tensors: Tensor) -> Iterator[Sequence[Tensor]]:
    """Queries, keys, values and outputs of tiles that see alike, as few calls as views allow.

    Each is a part of one of ``tensors`` or several, as ``(entries, heads, length, d)``.
    """
    start, stop, low, high, period = alike[0]
    b, h, _, d = tensors[0].shape
    most = max(1, _NUMBERS // (b * h * (stop - start) * d))
    for first in range(0, len(alike), most):
        count, shift = min(most, len(alike) - first), first * period
        queries, keys = (start + shift, stop - start), (low + shift, high - low)
        places = queries, keys, keys, queries
        parts = [_parts(x, *place, period, count) for x, place in zip(tensors, places, strict=True)]
        if count > 1 and all(b == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in parts):
            yield [x.flatten(0, 1).transpose(0, 1) for x in parts]
        elif b < count:
            yield from zip(*(x.transpose(1, 2) for x in parts), strict=True)
        else:
            yield from zip(*(x.unbind(2) for x in parts), strict=True)


def _parts(x: Tensor, start: int, length: int, period: int, count: int) -> Tensor:
    """Parts of ``x``, which may overlap: a view ``(b, h, count, length, d)``."""
    stop = start + (count - 1) * period + length
    return x[:, :, start:stop].unfold(2, length, period).transpose(-1, -2)
