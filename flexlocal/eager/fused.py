"""The output by torch's fused kernel for processors, a tile of all heads at a time.

``scaled_dot_product_attention`` under a mask writes no scores to memory, and reads a tile's keys
where they lie. Its backward pass is slower than that of ``autograd``, which takes nothing from the
forward pass. Shapes are those of ``formula``.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks.rule import Rule
from ..masks.window import Window
from ..spec import Inputs, Spec, is_plain
from ..torch_limits import at_least, at_most, has_values
from .formula import Operands

_LEAST_PRODUCTS = 3 * 2**20
"""Products of numbers of queries and keys in a tile of all heads, the fewest that repay a call of
the kernel; twice as many where each tile has a mask of its own. On an AMD EPYC (Zen 3) with one
thread, 2M took 1.05 times and 4M 0.85 times as long as without the kernel; with a key mask, 4M took
1.18 times and 17M 0.89 times as long."""

_LEAST_TILE, _MOST_TILE, _VECTOR = 64, 128, 16
"""Queries in a tile. Shorter ones take as long for their overhead; longer ones score more keys that
are hidden. Long windows are cut into tiles of whole vectors."""


def serves(spec: Spec, rule: Rule, tensors: Inputs | Operands) -> bool:
    """Whether the kernel can compute the call, and is faster."""
    q, k, v = tensors.q, tensors.k, tensors.v
    plain = is_plain(spec, tensors.bias, tensors.sinks)
    fits = q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and not rule.has_holes
    if not (plain and fits and all(x.stride(-1) == 1 for x in (q, k, v))):
        return False
    if tensors.mask is None and hides_nothing(rule, q.shape[2]):
        return True
    if (rule.tensors or rule.by_head) and not has_values(q):  # the bounds' are looked at
        return False
    tile = min(_tile(rule), q.shape[2])
    keys = min(rule.reach.longest(tile), k.shape[2])
    products = q.shape[1] * tile * keys * q.shape[3]
    if rule.tensors or tensors.mask is not None:
        return products >= 2 * _LEAST_PRODUCTS
    return q.shape[0] * products >= _LEAST_PRODUCTS


def output(spec: Spec, rule: Rule, operands: Operands, out: Tensor, scores: int) -> None:
    """Fills ``out``, ``(b, h, n, d)``.

    Args:
        scores: about how many scores a tile's mask may be of.
    """
    q, k, v, _, _, mask = operands
    if mask is None and hides_nothing(rule, q.shape[2]):
        causal, groups = rule.window.causal, q.shape[1] != k.shape[1]
        whole = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=spec.scale, enable_gqa=groups
        )
        out.copy_(whole)
        return
    first, last = bounds(rule, q, k)
    if mask is None and first.shape[0] == 1:
        _fill(spec, rule, (q, k, v), (first, last), None, out, scores)
        return
    for entry in range(q.shape[0]):  # each has keys of its own to leave out
        one = slice(entry, entry + 1)
        shown = (first, last) if first.shape[0] == 1 else (first[one], last[one])
        kept = None if mask is None else mask[one]
        _fill(spec, rule, (q[one], k[one], v[one]), shown, kept, out[one], scores)


def hides_nothing(rule: Rule, n: int) -> bool:
    """Whether a window hides no key of ``n``, but for later ones where it is causal.

    The kernel needs no mask then, and leaves out what is later by itself.
    """
    if not rule.is_window or n == 0:
        return False
    window: Window = rule.window
    last: int = n - 1
    sees_first = window.first_key(last) <= 0
    return bool(sees_first and (window.causal or window.last_key(0) >= last))


def _fill(
    spec: Spec,
    rule: Rule,
    qkv: tuple[Tensor, Tensor, Tensor],
    bounds: tuple[Tensor, Tensor],
    mask: Tensor | None,
    out: Tensor,
    scores: int,
) -> None:
    """``output`` of batch entries that share a mask."""
    q, k, v = qkv
    (b, h, _, d), groups = q.shape, q.shape[1] // k.shape[1]
    step = rule.reach.step
    repeats = step > 0 and not (rule.tensors or rule.by_head) and mask is None
    place: tuple[int, ...] = ()
    masks = h if rule.by_head else groups
    for start, stop, low, high in _tiles(rule, bounds, k.shape[2], masks, scores):
        here = start % max(1, step), stop - start, low - start, high - start
        queries, keys = slice(start, stop), slice(low, high)
        if not repeats or place != here:
            place = here
            seen = _seen([x[..., queries] for x in bounds], mask, keys)
            if not repeats:  # in steps, a query sees its own key
                blind = ~seen.any(-1, keepdim=True)
                seen = seen | blind
            hiding = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)
            hiding.masked_fill_(~seen, -torch.inf)
            if hiding.shape[1] > 1:
                hiding = hiding.reshape(1, h // groups, -1, high - low)
            elif groups > 1:
                hiding = hiding.repeat(1, 1, groups, 1)
        # The heads of a group as queries of one head: torch would copy the keys for each of them.
        grouped = q[:, :, queries].reshape(b, h // groups, -1, d)
        part = F.scaled_dot_product_attention(
            grouped, k[:, :, keys], v[:, :, keys], attn_mask=hiding, scale=spec.scale
        ).reshape(b, h, -1, d)
        out[:, :, queries] = part if repeats else part.masked_fill(blind, 0.0)


def bounds(rule: Rule, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """First and last key that each query sees, of those that exist: int32 ``(b or 1, h or 1, n)``.

    A query that sees none has its last before its first.
    """
    b, h, n, _ = q.shape
    batch = torch.arange(b, device=q.device)[:, None, None] if rule.tensors else 0
    head = torch.arange(h, device=q.device)[:, None] if rule.by_head else 0
    query = torch.arange(n, device=q.device)[None, None]
    first, last = rule.keys(batch, head, query)
    # Clipped, since a rule of a user's own may look farther than 32 bits count.
    first = at_least(at_most(first, k.shape[2]), 0)
    last = at_least(at_most(last, k.shape[2] - 1), -1)
    first, last = torch.broadcast_tensors(first + 0 * query, last + 0 * query)
    return first.to(torch.int32), last.to(torch.int32)


def _tile(rule: Rule) -> int:
    """Queries in a tile: some steps of the rule, or an even part of a long one."""
    step = max(1, rule.reach.step)
    steps = -(-_LEAST_TILE // step) * step
    if steps <= _MOST_TILE:
        return steps
    part = -(-step // -(-step // _MOST_TILE))
    return -(-part // _VECTOR) * _VECTOR


def _tiles(
    rule: Rule, bounds: tuple[Tensor, Tensor], keys: int, masks: int, scores: int
) -> Iterator[tuple[int, int, int, int]]:
    """First query of each tile and the one after its last, the same of its keys.

    Tiles that may share a mask come one after the other.

    Args:
        keys: how many there are.
        masks: how often a tile's mask is held, for its heads.
        scores: about how many numbers these may be.
    """
    n, tile = bounds[0].shape[-1], _tile(rule)
    span = min(rule.reach.longest(tile), keys)
    if masks * tile * span > scores:
        tile = max(1, scores // (masks * span * _VECTOR)) * _VECTOR
    period = max(tile, rule.reach.step)
    for place in range(0, min(period, n), tile):
        for start in range(place, n, period):
            stop = min(start + tile, start - place + period, n)
            low, high = _keys_of(rule, bounds, start, stop)
            low, high = max(low, 0), min(high + 1, keys)
            yield start, stop, *((low, high) if low < high else (0, 1))


def _keys_of(rule: Rule, bounds: tuple[Tensor, Tensor], start: int, stop: int) -> tuple[Any, Any]:
    """First and last key that some of these queries may see."""
    if rule.tensors or rule.by_head:
        first, last = bounds
        return first[..., start].min().item(), last[..., stop - 1].max().item()
    return rule.keys(0, 0, start)[0], rule.keys(0, 0, stop - 1)[1]


def _seen(bounds: Sequence[Tensor], mask: Tensor | None, keys: slice) -> Tensor:
    """Which of a tile's keys each of its queries sees, ``(1, h or 1, t, s)``."""
    first, last = bounds
    key = torch.arange(keys.start, keys.stop, dtype=torch.int32, device=first.device)
    seen = (first[..., None] <= key) & (key <= last[..., None])
    return seen if mask is None else seen & mask[:, :, None, keys]
