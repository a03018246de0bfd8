"""The output by torch's fused kernel for processors, some tiles of all heads at a time.

``scaled_dot_product_attention`` under a mask writes no scores to memory, and reads a tile's keys
where they lie. Tiles that see alike share a mask and a call, in which they are batch entries. Its
backward pass is slower than that of ``autograd``, which takes nothing from the forward pass. Shapes
are those of ``formula``.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks.rule import Rule
from ..masks.window import Window
from ..spec import Inputs, Spec, is_plain
from ..torch_limits import at_least, at_most, has_values
from .formula import Operands
from .fused_tiles import Tile, length_of, cuts_of, tiles_of

_LEAST_PRODUCTS = 3 * 2**20
"""Products of numbers of queries and keys in a tile of all heads, the fewest that repay a call of
the kernel for each tile; twice as many where each tile has a mask of its own. On an AMD EPYC (Zen
3) with one thread, 2M took 1.05 times and 4M 0.85 times as long as without the kernel; with a key
mask, 4M took 1.18 times and 17M 0.89 times as long. Where tiles that see alike share a call, none
are too few: 0.1M took 0.4 to 0.7 times as long."""

_MOST_KEPT = 2**17
"""Numbers of a mask that is kept from call to call."""


def serves(spec: Spec, rule: Rule, tensors: Inputs | Operands) -> bool:
    """Whether the kernel can compute the call, and is faster."""
    q, k, v = tensors.q, tensors.k, tensors.v
    plain = is_plain(spec, tensors.bias, tensors.sinks)
    fits = q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and not rule.has_holes
    if not (plain and fits and all(x.stride(-1) == 1 for x in (q, k, v))):
        return False
    if _repeats(rule, tensors.mask) or tensors.mask is None and hides_nothing(rule, q.shape[2]):
        return True
    if (rule.tensors or rule.by_head) and not has_values(q):  # the bounds' are looked at
        return False
    tile = min(length_of(rule), q.shape[2])
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
    if _repeats(rule, mask):
        _fill_alike(spec, rule, (q, k, v), out, scores)
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


_QKV = tuple[Tensor, Tensor, Tensor]


def _repeats(rule: Rule, mask: Tensor | None) -> bool:
    """Whether tiles at the same place in a step of the rule see alike."""
    return rule.reach.step > 0 and not (rule.tensors or rule.by_head) and mask is None


def _fill_alike(spec: Spec, rule: Rule, qkv: _QKV, out: Tensor, scores: int) -> None:
    """``output`` of calls whose tiles see alike, many of them at once."""
    q, k, v = qkv
    groups, step = q.shape[1] // k.shape[1], rule.reach.step

    def sight(tile: Tile) -> _Sight:
        shift = tile.start - tile.start % step
        return tile.start - shift, tile.stop - shift, tile.low - shift, tile.high - shift

    tiles = tiles_of(rule, None, q.shape[2], k.shape[2], groups, scores)
    for of_some, several in groupby(tiles, sight):
        hiding = _mask_of(rule, of_some, groups, q)
        _, _, low, high, _ = tile = next(several)
        queries, keys = (tile.start, tile.stop - tile.start), (low, high - low)
        for cut in cuts_of([tile, *several], q, k, v, out):
            part = _attention(cut(q, *queries), cut(k, *keys), cut(v, *keys), hiding, spec.scale)
            cut(out, *queries).copy_(part)


_Sight = tuple[int, int, int, int]
"""As of a ``Tile``, whose first query is in the first step of the rule."""


def _mask_of(rule: Rule, sight: _Sight, groups: int, q: Tensor) -> Tensor:
    """``_shared_mask`` for queries like ``q``, kept if it is small."""
    start, stop, low, high = sight
    small = groups * (stop - start) * (high - low) <= _MOST_KEPT
    make = _shared_mask if small and has_values(q) else _shared_mask.__wrapped__
    return make(rule, sight, groups, q.dtype, q.device)


@lru_cache(maxsize=64)
def _shared_mask(
    rule: Rule, sight: _Sight, groups: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """0 where a tile's query sees a key, else -inf: ``(1, 1, groups * t, s)``."""
    start, stop, low, high = sight
    with torch.inference_mode(False):
        query = torch.arange(start, stop, device=device)[:, None]
        key = torch.arange(low, high, device=device)
        return _hiding(rule.sees(0, 0, query, key).expand(1, 1, -1, -1), dtype, groups)


def _hiding(seen: Tensor, dtype: torch.dtype, groups: int) -> Tensor:
    """What hides keys that are not ``seen``, ``(1, h or 1, t, s)``, from groups of queries."""
    hiding = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    hiding.masked_fill_(~seen, -torch.inf)
    if hiding.shape[1] > 1:
        return hiding.reshape(1, hiding.shape[1] // groups, -1, seen.shape[-1])
    return hiding.repeat(1, 1, groups, 1) if groups > 1 else hiding


def _attention(q: Tensor, k: Tensor, v: Tensor, hiding: Tensor, scale: float | None) -> Tensor:
    """By torch's kernel, with a mask to add: ``(b, h, t, d)``."""
    # The heads of a group as queries of one head: torch would copy the keys for each of them.
    grouped = q.reshape(len(q), -1, hiding.shape[2], q.shape[3])
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=hiding, scale=scale)
    return out.reshape(q.shape)


def _fill(
    spec: Spec,
    rule: Rule,
    qkv: _QKV,
    bounds: tuple[Tensor, Tensor],
    mask: Tensor | None,
    out: Tensor,
    scores: int,
) -> None:
    """``output`` of batch entries that share a mask, a tile at a time."""
    q, k, v = qkv
    groups = q.shape[1] // k.shape[1]
    masks = q.shape[1] if rule.by_head else groups
    for start, stop, low, high, _ in tiles_of(rule, bounds, q.shape[2], k.shape[2], masks, scores):
        queries, keys = slice(start, stop), slice(low, high)
        seen = _seen([x[..., queries] for x in bounds], mask, keys)
        blind = ~seen.any(-1, keepdim=True)
        hiding = _hiding(seen | blind, q.dtype, groups)
        part = _attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], hiding, spec.scale)
        out[:, :, queries] = part.masked_fill(blind, 0.0)


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


def _seen(bounds: Sequence[Tensor], mask: Tensor | None, keys: slice) -> Tensor:
    """Which of a tile's keys each of its queries sees, ``(1, h or 1, t, s)``."""
    first, last = bounds
    key = torch.arange(keys.start, keys.stop, dtype=torch.int32, device=first.device)
    seen = (first[..., None] <= key) & (key <= last[..., None])
    return seen if mask is None else seen & mask[:, :, None, keys]
