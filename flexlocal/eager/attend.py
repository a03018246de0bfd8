"""The eager path: plain tensor operations, for every argument, device and dtype.

Queries are cut into tiles, each of which sees one interval of keys. Tiles are computed a portion at
a time (``autograd``). Inside a compiler or ``torch.export`` all of them are computed at once, and
the compiler fuses what it can. Shapes are those of ``spec`` and of ``tiles``.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..masks.keys import without_padding
from ..masks.rule import Rule
from ..mods.dropout import key_draws, query_draws
from ..mods.shared_qk import unit_keys
from ..regions import region
from ..rotary import rotate
from ..spec import Inputs, Spec, rule_of
from ..torch_limits import is_symbolic
from .autograd import attend_in_portions, portions
from .formula import Formula, formula_of
from .tiles import Sizes, every_tile

_LEAST_TILE = 64
"""Fewest queries in a tile: a processor spends most of smaller matrix products on overhead."""


def attend(spec: Spec, inputs: Inputs) -> Tensor:
    """Local attention.

    Args:
        spec: the call, resolved.
        inputs: its tensors, shaped.

    Returns:
        ``(b, h, n, d_v)`` in ``q``'s dtype.
    """
    q, k, v, mask, bias, seed, *_ = inputs
    rule = rule_of(spec, inputs)
    if mask is not None:
        with region("key mask"):
            k, v = without_padding(k, mask), without_padding(v, mask)
    q, k = _placed(spec, rule, inputs._replace(k=k))
    b, h, n, _ = q.shape
    draws = None
    if spec.dropout > 0:
        assert seed is not None
        with region("dropout"):
            draws = query_draws(seed, b * h, n), key_draws(seed, b * h, n)
    sizes = _sizes(q, k, rule, one_window=bias is not None or spec.xpos_base is not None)
    if not is_symbolic(n):
        sizes, bias = _cropped(sizes, bias)
    formula = formula_of(spec, rule, inputs, sizes, draws)
    bias = _cleared(bias, formula)
    with without_autocast(q.device), region("attention"):
        if torch.compiler.is_compiling():
            return formula.output(every_tile(sizes), q, k, v, bias, mask)
        return attend_in_portions(q, k, v, bias, mask, formula, sizes)


def weights(spec: Spec, inputs: Inputs) -> Tensor:
    """The weights that ``attend`` mixes values with, before dropout; arguments as there.

    Returns:
        ``(b, h, n, span)`` in fp32 at least: column ``c`` of query ``i`` is the key
        ``window.span_start(i) + c``, and 0 where it is hidden or outside the sequence.
    """
    q, k, _, mask, bias, *_ = inputs
    rule = rule_of(spec, inputs)
    window = rule.window
    if mask is not None:
        k = without_padding(k, mask)
    q, k = _placed(spec, rule, inputs._replace(k=k))
    sizes, bias = _cropped(_sizes(q, k, rule, one_window=True), bias)
    formula = formula_of(spec, rule, inputs, sizes)
    bias = _cleared(bias, formula)
    out = q.new_zeros((*q.shape[:-1], window.span), dtype=formula.compute)
    first = window.before - sizes.before
    columns = slice(first, first + sizes.span)
    with without_autocast(q.device):
        for tiles in portions(sizes, q.device):
            part, _ = formula.weights(tiles, *formula.scaled(tiles, q, k), bias, mask)
            part = part.flatten(2, 3)
            start = tiles.first * sizes.tile
            target = out[tiles.batch, tiles.heads, start : start + part.shape[2], columns]
            target.copy_(part[:, :, : target.shape[2]])
    return out


def _placed(spec: Spec, rule: Rule, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Queries and keys before their product: keys of length 1 and both rotated, where asked."""
    q, k, inv_freq = inputs.q, inputs.k, inputs.inv_freq
    if spec.shared_qk:
        k = unit_keys(k)
    if inv_freq is not None:
        with region("rotary"):
            position = torch.arange(q.shape[2], device=q.device)
            shift = 0 if rule.window is None else rule.window.after
            q = rotate(q, position + shift, inv_freq).to(q.dtype)
            k = rotate(k, position, inv_freq).to(k.dtype)
    return q, k


def _sizes(q: Tensor, k: Tensor, rule: Rule, one_window: bool) -> Sizes:
    """The shape of tiles: some of the rule's steps, or one window.

    Shorter tiles compute fewer scores that are hidden. Inside a compiler a tile is at least as long
    as its keys before and after it, because each further piece of keys is an operator of its own.

    Args:
        one_window: a tile is to be one window, because a bias or xpos's factors are laid out so.
    """
    b, h, n, _ = q.shape
    reach = rule.reach
    if one_window:
        tile = rule.window.size
        before, after = rule.window.before, rule.window.after
    else:
        least = _LEAST_TILE
        if torch.compiler.is_compiling():
            least = max(least, reach.back, reach.ahead)
        step = max(1, reach.step)
        if step > 1:
            least = _LEAST_TILE
        tile = -(-least // step) * step
        before, after = reach.around(tile)
    return Sizes(b, h, k.shape[1], n, tile=tile, before=before, after=after)


def _cropped(sizes: Sizes, bias: Tensor | None) -> tuple[Sizes, Tensor | None]:
    """``sizes`` without keys that lie outside the sequence for every tile; the bias accordingly."""
    tile = sizes.n if 0 < sizes.n <= sizes.tile else sizes.tile
    furthest = max(0, sizes.tiles - 1) * sizes.tile
    before, after = min(sizes.before, furthest), min(sizes.after, furthest)
    if bias is not None:
        first = sizes.before - before
        bias = bias[:, :tile, first : first + before + tile + after]
    return replace(sizes, tile=tile, before=before, after=after), bias


def _cleared(bias: Tensor | None, formula: Formula) -> Tensor | None:
    """``bias`` with zeros where the window hides a key: a NaN there would spread."""
    if bias is None or formula.hiding is None:
        return bias
    return bias.masked_fill(formula.hiding < 0, 0.0)
