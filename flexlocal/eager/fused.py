"""The output by torch's fused kernel for processors, some tiles of all heads at a time.

The kernel writes no scores to memory, and reads a tile's keys where they lie. Tiles that see alike
are ``fused_alike``'s; here others have a call each, with a mask of its own. Shapes are those of
``formula``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..masks.rule import Rule
from ..spec import Inputs, Spec, is_plain
from ..torch_limits.sizes import at_least, at_most
from ..torch_limits.tensors import has_values
from . import fused_alike
from .formula import Operands
from .fused_kernel import QKV, attention, computed_in, hiding_of
from .fused_tiles import length_of, tiles_of

_LEAST_PRODUCTS = 3 * 2**20
"""Products of numbers of queries and keys in a tile of all heads, the fewest that repay a call of
the kernel for each tile; twice as many where each tile has a mask of its own. On an AMD EPYC (Zen
3) with one thread, 2M took 1.05 times and 4M 0.85 times as long as without the kernel; with a key
mask, 4M took 1.18 times and 17M 0.89 times as long. Where tiles that see alike share a call, none
are too few: 0.1M took 0.4 to 0.7 times as long."""

_LEAST_LONG, _MOST_SHORT, _MOST_SCORES = 128, 1024, 2**20
"""Queries in a window that stands, the fewest for which the kernel's backward pass leads in long
sequences; the most in a short sequence, and scores up to which it leads everywhere. On an AMD EPYC
(Zen 3) with one thread, training took 0.55 to 1.05 times as long with up to 1024 tokens, 0.8 to
1.05 with 2048, and 0.9 to 1.2 with 4096 or 8192; with two threads 0.7 to 1.1, 0.85 to 1.15 and 0.95
to 1.35; and where windows of 128 or more stand, 0.85 to 1.0 times."""


def serves(spec: Spec, rule: Rule, tensors: Inputs | Operands) -> bool:
    """Whether the kernel can compute the call, and is faster."""
    if not _can_compute(spec, rule, tensors):
        return False
    if fused_alike.serves(rule, tensors.mask):
        return True
    q, k = tensors.q, tensors.k
    if (rule.tensors or rule.by_head) and not has_values(q):  # the bounds' are looked at
        return False
    tile = min(length_of(rule), q.shape[2])
    keys = min(rule.reach.longest(tile), k.shape[2])
    products = q.shape[1] * tile * keys * q.shape[3]
    if rule.tensors or tensors.mask is not None:
        return products >= 2 * _LEAST_PRODUCTS
    return q.shape[0] * products >= _LEAST_PRODUCTS


def has_backward(spec: Spec, rule: Rule, tensors: Inputs | Operands) -> bool:
    """Whether the kernel's backward pass can compute the gradients, of any length.

    Not of 16-bit numbers: they would be twice as far off as those of ``autograd``, and where the
    processor does not multiply such numbers, take three times as long.
    """
    exact = tensors.q.dtype in (torch.float32, torch.float64)
    return exact and fused_alike.serves(rule, tensors.mask) and _can_compute(spec, rule, tensors)


def serves_backward(spec: Spec, rule: Rule, tensors: Inputs | Operands) -> bool:
    """Whether it also is the faster one."""
    if not has_backward(spec, rule, tensors):
        return False
    q, k = tensors.q, tensors.k
    scores = q.shape[:-1].numel() * min(rule.reach.longest(length_of(rule)), k.shape[2])
    long = rule.reach.step >= _LEAST_LONG or fused_alike.hides_nothing(rule, q.shape[2])
    return long or q.shape[2] <= _MOST_SHORT or scores <= _MOST_SCORES


def _can_compute(spec: Spec, rule: Rule, tensors: Inputs | Operands) -> bool:
    q, k, v = tensors.q, tensors.k, tensors.v
    plain = is_plain(spec, tensors.bias, tensors.sinks)
    fits = q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and not rule.has_holes
    return plain and fits and all(x.stride(-1) == 1 for x in (q, k, v))


def output(spec: Spec, rule: Rule, operands: Operands, lse: Tensor | None, scores: int) -> Tensor:
    """The output ``(b, h, n, d)``.

    Args:
        lse: filled with log-sum-exps ``(b, h, n)``; only if ``serves_backward``.
        scores: about how many scores a tile's mask may be of.
    """
    q, k, v, _, _, mask = operands
    if fused_alike.serves(rule, mask):
        return fused_alike.output(spec, rule, (q, k, v), mask, lse, scores)
    out, (first, last) = torch.empty_like(q), bounds(rule, q, k)
    if mask is None and first.shape[0] == 1:
        _fill(spec, rule, (q, k, v), (first, last), None, out, scores)
        return out
    for entry in range(q.shape[0]):  # each has keys of its own to leave out
        one = slice(entry, entry + 1)
        shown = (first, last) if first.shape[0] == 1 else (first[one], last[one])
        kept = None if mask is None else mask[one]
        _fill(spec, rule, (q[one], k[one], v[one]), shown, kept, out[one], scores)
    return out


def _fill(
    spec: Spec,
    rule: Rule,
    qkv: QKV,
    bounds: tuple[Tensor, Tensor],
    mask: Tensor | None,
    out: Tensor,
    scores: int,
) -> None:
    """Fills ``out`` with ``output`` of batch entries that share a mask, a tile at a time."""
    q, k, v = qkv
    groups = q.shape[1] // k.shape[1]
    masks = q.shape[1] if rule.by_head else groups
    for start, stop, low, high, _ in tiles_of(rule, bounds, q.shape[2], k.shape[2], masks, scores):
        queries, keys = slice(start, stop), slice(low, high)
        seen = _seen([x[..., queries] for x in bounds], mask, keys)
        blind = ~seen.any(-1, keepdim=True)
        hiding = hiding_of(seen | blind, computed_in(q.dtype), groups)
        of_tile = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        part, _ = attention(*of_tile, hiding, False, spec.scale)
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
