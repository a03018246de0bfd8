"""Which queries and keys torch's fused kernel is called with: tiles, alone or several at once.

Shapes are those of ``formula``.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from ..masks.rule import Rule

_LEAST_TILE, _MOST_TILE, _VECTOR = 64, 128, 16
"""Queries in a tile. Shorter ones take as long for their overhead; longer ones score more keys that
are hidden. Long windows are cut into tiles of whole vectors."""

_LEAST_NUMBERS, _MOST_NUMBERS = 2**17, 2**21
"""Of the output: so many repay calls for each batch entry, and as many a call may hold beside it.
On an AMD EPYC (Zen 3), calls for each of 16 entries of 0.5M took 0.77 to 0.9 times as long in
training as calls for all at once, with one thread and two; of 32k 1.0 to 1.2 times."""


class Tile(NamedTuple):
    """First query of a tile and the one after its last, the same of its keys.

    The tile at the same place in a later step of the rule begins ``period`` tokens after it.
    """

    start: int
    stop: int
    low: int
    high: int
    period: int


def length_of(rule: Rule) -> int:
    """Queries in a tile: some steps of the rule, or an even part of a long one."""
    steps, step = rule.reach.in_steps(_LEAST_TILE), rule.reach.step
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
    before, after = rule.reach.around(tile)
    if min(before, after) >= n - tile:  # each tile would have all keys
        tile = max(tile, n)
    span = min(before + tile + after, keys)
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


Cut = Callable[[Tensor, int, int], Tensor]
"""From a tensor ``(b, h, n, d)`` a view ``(entries, heads, tokens, d)`` of the same tokens of each
tile. The first token and their number are given as those of the first tile."""


def everything(x: Tensor, token: int, tokens: int) -> Tensor:
    """The ``Cut`` of a call that is given all there is."""
    return x


def cuts_of(alike: Sequence[Tile], *tensors: Tensor, masks: int = 0) -> Iterator[Cut]:
    """How tiles that see alike are cut out of ``tensors``, one cut for each call of the kernel.

    Tiles become batch entries. The tensors' own have calls for themselves, so that a call holds
    less at once, unless all together are few numbers. Where no view joins them with heads, or they
    have masks of their own, each of them has a call, or each tile, whichever are fewer.

    Args:
        masks: numbers of a tile's mask, where each tile of each batch entry has its own.
    """
    start, stop, _, _, period = alike[0]
    b, h, _, d = tensors[0].shape
    numbers = h * (stop - start) * d
    joins = not masks and all(b == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in tensors)
    if joins:
        by_entry = len(alike) > 1 and len(alike) * numbers >= _LEAST_NUMBERS
    else:
        by_entry = b < len(alike)
    at_once = numbers if by_entry else b * numbers
    most = max(1, _MOST_NUMBERS // max(1, at_once, masks)) if by_entry or joins else 1
    for entry in range(b if by_entry else 1):
        for first in range(0, len(alike), most):
            count, shift = min(most, len(alike) - first), first * period
            if by_entry:
                yield partial(_of_entry, entry, shift, period, count)
            elif count > 1:
                yield partial(_joined, shift, period, count)
            else:
                yield partial(_of_tile, shift)


def _joined(shift: int, period: int, count: int, x: Tensor, token: int, tokens: int) -> Tensor:
    parts = _parts(x, token + shift, tokens, period, count)
    return parts.flatten(0, 1).transpose(0, 1)


def _of_entry(
    entry: int, shift: int, period: int, count: int, x: Tensor, token: int, tokens: int
) -> Tensor:
    return _parts(x, token + shift, tokens, period, count)[entry].transpose(0, 1)


def _of_tile(shift: int, x: Tensor, token: int, tokens: int) -> Tensor:
    return x.narrow(2, token + shift, tokens)


def _parts(x: Tensor, start: int, length: int, period: int, count: int) -> Tensor:
    """Parts of ``x``, which may overlap: a view ``(b, h, count, length, d)``."""
    stop = start + (count - 1) * period + length
    return x[:, :, start:stop].unfold(2, length, period).transpose(-1, -2)
