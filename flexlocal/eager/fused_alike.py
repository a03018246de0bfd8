"""Tiles that see alike, by torch's fused kernel: they share a mask and a call, as batch entries.

Keys of several tiles overlap: the kernel reads them through views, and their gradients are added.
Shapes are those of ``formula``.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from ..masks.rule import Rule
from ..spec import Spec, may_hide_first
from ..torch_limits.tensors import has_values
from .fused_kernel import QKV, attention, computed_in, hiding_of
from .fused_kernel import gradients as gradients_of_kernel
from .fused_tiles import Cut, Tile, cuts_of, everything, tiles_of

_MOST_KEPT = 2**17
"""Numbers of a mask that is kept from call to call."""


def serves(rule: Rule, mask: Tensor | None) -> bool:
    """Whether tiles at the same place in a step of the rule see alike, padding aside."""
    by_head = rule.by_head or mask is not None and mask.shape[1] > 1
    return rule.reach.step > 0 and not (rule.tensors or by_head)


def output(
    spec: Spec, rule: Rule, qkv: QKV, mask: Tensor | None, lse: Tensor | None, scores: int
) -> Tensor:
    """The output ``(b, h, n, d)``.

    Args:
        mask: boolean ``(b or 1, 1, m)``, True for keys that are no padding.
        lse: log-sum-exps ``(b, h, n)``, to be filled.
        scores: about how many scores a mask may be of.
    """
    q, out = qkv[0], None
    others = [] if lse is None else [lse[..., None]]
    for cut, tile, part, hidden, blind in _calls(spec, rule, qkv, mask, others, scores):
        queries = tile.start, tile.stop - tile.start
        found, of_rows = attention(*part, hidden, _is_causal(rule, hidden), spec.scale)
        if blind is not None:
            found.masked_fill_(blind, 0.0)
        for rows in others:
            cut(rows, *queries).copy_(of_rows[..., None])
        if found.shape == q.shape:
            return _lying_as(found, q)
        out = torch.empty_like(q) if out is None else out
        cut(out, *queries).copy_(found)
    return torch.empty_like(q) if out is None else out


def _lying_as(found: Tensor, x: Tensor) -> Tensor:
    """``found``, in the dtype and the order in memory of ``x``."""
    alike = found.stride() == x.stride() and found.dtype == x.dtype
    return found if alike else torch.empty_like(x).copy_(found)


def gradients(
    spec: Spec,
    rule: Rule,
    qkv: QKV,
    mask: Tensor | None,
    result: tuple[Tensor, Tensor],
    grad: Tensor,
    scores: int,
) -> QKV:
    """Those of queries, keys and values.

    Args:
        mask: as in ``output``.
        result: the output and the log-sum-exps.
        grad: the output's.
        scores: as in ``output``.
    """
    out, lse = result[0], result[1][..., None]
    totals = None  # they lie as queries and keys do, and are cut alike
    others = out, lse, grad
    for cut, tile, part, hidden, blind in _calls(spec, rule, qkv, mask, others, scores):
        queries = tile.start, tile.stop - tile.start
        of_part = cut(out, *queries), cut(lse, *queries)[..., 0]
        given = cut(grad, *queries)
        if blind is not None:
            given = given.masked_fill(blind, 0.0)
        causal = _is_causal(rule, hidden)
        found = gradients_of_kernel(given, part, of_part, hidden, causal, spec.scale)
        if all(one.shape == x.shape for one, x in zip(found, qkv, strict=True)):
            grad_q, grad_k, grad_v = map(_lying_as, found, qkv)
            return grad_q, grad_k, grad_v
        totals = totals or _yet_to_be_added(qkv)
        cut(totals[0], *queries).copy_(found[0])
        for whole, of_keys in zip(totals[1:], found[1:], strict=True):
            # Keys of several tiles overlap, those of a period do not.
            for first, some in enumerate(of_keys.split(tile.period, 2)):
                cut(whole, tile.low + first * tile.period, some.shape[2]).add_(some)
    return totals or _yet_to_be_added(qkv)


def _yet_to_be_added(qkv: QKV) -> QKV:
    """Memory for each query's gradient, and for sums of the others."""
    q, k, v = qkv
    return torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)


def _calls(
    spec: Spec,
    rule: Rule,
    qkv: QKV,
    mask: Tensor | None,
    others: Sequence[Tensor],
    scores: int,
) -> Iterator[tuple[Cut, Tile, QKV, Tensor | None, Tensor | None]]:
    """Calls of the kernel.

    Args:
        mask, scores: as in ``output``.
        others: tensors that will be cut as queries or keys are.

    Yields:
        How tensors are cut, by the first tile, which comes second; queries, keys and values; and
        what ``_hidden`` says of them, or None twice where the kernel knows what is hidden.
    """
    q, k, v = qkv
    n, m = q.shape[2], k.shape[2]
    if mask is None and _needs_no_mask(spec, rule, n):
        yield everything, Tile(0, n, 0, m, n), qkv, None, None
        return
    kept = None if mask is None else mask.expand(q.shape[0], -1, -1)[..., None]
    for tiles, hiding in _alike(rule, q, k, scores):
        start, stop, low, high, _ = tiles[0]
        queries, keys = (start, stop - start), (low, high - low)
        masks = 0 if kept is None else hiding.numel()
        for cut in cuts_of(tiles, q, k, v, *others, masks=masks):
            part = cut(q, *queries), cut(k, *keys), cut(v, *keys)
            hidden, blind = _hidden(hiding, None if kept is None else cut(kept, *keys))
            yield cut, tiles[0], part, hidden, None if blind is None else blind[:, :, : queries[1]]


def hides_nothing(rule: Rule, n: int) -> bool:
    """Whether a query sees all keys, or all but those after it."""
    return n > 0 and rule.is_window and bool(rule.window.hides_nothing(n))


def _is_causal(rule: Rule, hidden: Tensor | None) -> bool:
    """Whether the kernel is to leave out later keys, of which nothing else tells it."""
    return hidden is None and bool(rule.window.causal)


def _needs_no_mask(spec: Spec, rule: Rule, n: int) -> bool:
    """Whether the kernel knows what is hidden: it leaves out later keys by itself."""
    return hides_nothing(rule, n) and (may_hide_first(spec) or not rule.window.causal)


def _hidden(hiding: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What hides a tile's keys, those that are padding among them, and which queries see none.

    Args:
        hiding: what the rule hides, ``(1, 1, groups * t, s)``.
        kept: boolean ``(entries, 1, s, 1)``, True for keys that are no padding.

    Returns:
        ``(entries, 1, groups * t, s)``, and boolean ``(entries, 1, groups * t, 1)``, or None where
        all see some. Such queries have their keys shown: the kernel may make NaN of none.
    """
    if kept is None:
        return hiding, None
    hidden = hiding.masked_fill(~kept.mT, -torch.inf)
    blind = hidden.amax(-1, keepdim=True) == -torch.inf
    if has_values(blind) and not bool(blind.any()):
        return hidden, None
    return hidden.masked_fill_(blind, 0.0), blind


_Sight = tuple[int, int, int, int]
"""As of a ``Tile``, whose first query is in the first step of the rule."""


def _alike(rule: Rule, q: Tensor, k: Tensor, scores: int) -> Iterator[tuple[list[Tile], Tensor]]:
    """Tiles that see alike, and what hides keys from each of them."""
    groups, step = q.shape[1] // max(1, k.shape[1]), rule.reach.step

    def sight(tile: Tile) -> _Sight:
        shift = tile.start - tile.start % step
        return tile.start - shift, tile.stop - shift, tile.low - shift, tile.high - shift

    tiles = tiles_of(rule, None, q.shape[2], k.shape[2], groups, scores)
    for of_some, some in groupby(tiles, sight):
        yield list(some), _mask_of(rule, of_some, groups, q)


def _mask_of(rule: Rule, sight: _Sight, groups: int, q: Tensor) -> Tensor:
    """``_shared_mask`` for queries like ``q``, kept if it is small."""
    start, stop, low, high = sight
    small = groups * (stop - start) * (high - low) <= _MOST_KEPT
    make = _shared_mask if small and has_values(q) else _shared_mask.__wrapped__
    return make(rule, sight, groups, computed_in(q.dtype), q.device)


@lru_cache(maxsize=64)
def _shared_mask(
    rule: Rule, sight: _Sight, groups: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """0 where a tile's query sees a key, else -inf: ``(1, 1, groups * t, s)``."""
    start, stop, low, high = sight
    with torch.inference_mode(False):
        query = torch.arange(start, stop, device=device)[:, None]
        key = torch.arange(low, high, device=device)
        return hiding_of(rule.sees(0, 0, query, key).expand(1, 1, -1, -1), dtype, groups)
