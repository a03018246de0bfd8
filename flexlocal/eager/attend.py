"""The eager path: plain tensor operations, for every argument, device and dtype.

Queries are cut into tiles, each of which sees one interval of keys. Tiles are computed a portion at
a time (``autograd``). Inside a compiler, ``torch.export`` or a transform of ``torch.func`` all of
them are computed at once, by operators that these know. Shapes are those of ``spec`` and ``tiles``.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import without_autocast
from ..masks.keys import finite_padding, without_padding
from ..masks.rule import Rule
from ..mods.dropout import key_draws, query_draws
from ..mods.shared_qk import unit_keys
from ..regions import region
from ..rotary import rotate
from ..spec import (
    Inputs,
    Spec,
    beside_queries,
    first_positions,
    is_placed,
    mask_of_queries,
    positions,
    rule_of,
)
from ..torch_limits import is_exporting, is_symbolic, is_transformed
from . import dense
from .autograd import attend_in_portions, portions, scores_in_a_portion
from .formula import Formula, Operands, formula_of
from .tiles import Sizes, every_tile

_LEAST_TILE = 64
"""Fewest queries in a tile: a processor spends most of smaller matrix products on overhead."""


_VECTOR = 16
"""Numbers in a vector of the processor."""


def attend(spec: Spec, inputs: Inputs) -> Tensor | tuple[Tensor, Tensor]:
    """Local attention.

    Args:
        spec: the call, resolved.
        inputs: its tensors, shaped.

    Returns:
        ``(b, h, n, d_v)`` in ``q``'s dtype, and with ``return_lse`` the log-sum-exps ``(b, h, n)``.
    """
    if inputs.k.shape[2] == 0 < inputs.q.shape[2]:
        inputs = _with_a_hidden_key(inputs)
    rule = rule_of(spec, inputs)
    if is_placed(inputs):
        rule, inputs = _near_queries(spec, rule, inputs)
    q, k, v, mask, bias, seed, *_ = inputs
    if mask is not None:
        with region("key mask"):
            q = _finite_padding(rule, inputs)
            k, v = without_padding(k, mask), without_padding(v, mask)
    q, k = _turned(spec, rule, inputs._replace(q=q, k=k))
    if dense.serves(spec, rule, inputs):
        with without_autocast(q.device), region("attention"):
            return dense.attend(spec, rule, inputs._replace(q=q, k=k, v=v))
    b, h, n, _ = q.shape
    draws = None
    if spec.dropout > 0:
        assert seed is not None
        query, key = first_positions(inputs, rule)
        with region("dropout"):
            draws = query_draws(seed, b * h, n, query), key_draws(seed, b * h, k.shape[2], key)
    xpos = spec.xpos_base is not None
    one_window = rule.is_window and (bias is not None or xpos)
    sizes = _sizes(
        q,
        k,
        rule,
        one_window,
        slides=rule.is_window or xpos,
        may_shorten=bias is None or not rule.is_window,
    )
    if not is_symbolic(n):
        sizes, bias = _cropped(sizes, bias, rule)
    formula = formula_of(spec, rule, inputs, sizes, draws)
    operands = Operands(q, k, v, _cleared(bias, formula), inputs.sinks, mask)
    with without_autocast(q.device), region("attention"):
        if torch.compiler.is_compiling() or is_transformed():
            out, lse = formula.output(every_tile(sizes), operands)
        else:
            out, lse = attend_in_portions(operands, formula, sizes)
    return out if lse is None else (out, lse)


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
        q, k = _finite_padding(rule, inputs), without_padding(k, mask)
    q, k = _turned(spec, rule, inputs._replace(q=q, k=k))
    sizes, bias = _cropped(_sizes(q, k, rule, True, slides=True, may_shorten=False), bias, rule)
    formula = formula_of(spec, rule, inputs, sizes)
    operands = Operands(q, k, k, _cleared(bias, formula), inputs.sinks, mask)
    out = q.new_zeros((*q.shape[:-1], window.span), dtype=formula.compute)
    first = window.before - sizes.before
    columns = slice(first, first + sizes.span)
    with without_autocast(q.device):
        for tiles in portions(sizes, q.device):
            found = formula.weigh(tiles, *formula.scaled(tiles, q, k), operands)
            part = found.seeing(found.weights).flatten(2, 3)
            start = tiles.first * sizes.tile
            target = out[tiles.batch, tiles.heads, start : start + part.shape[2], columns]
            target.copy_(part[:, :, : target.shape[2]])
    return out


def _finite_padding(rule: Rule, inputs: Inputs) -> Tensor:
    """The call's queries, finite where they are padding and gradients are taken."""
    mask = mask_of_queries(rule, inputs)
    return inputs.q if mask is None else finite_padding(inputs.q, mask)


def _with_a_hidden_key(inputs: Inputs) -> Inputs:
    """A call without keys as one with a key that no query sees."""
    k, v = (F.pad(x, (0, 0, 0, 1)) for x in (inputs.k, inputs.v))
    mask = k.new_zeros((k.shape[0], 1, 1), dtype=torch.bool)
    documents = None if inputs.documents is None else F.pad(inputs.documents, (0, 1), value=-1)
    return inputs._replace(k=k, v=v, mask=mask, documents=documents)


def _near_queries(spec: Spec, rule: Any, inputs: Inputs) -> tuple[Rule, Inputs]:
    """The rule and the call's keys without those that no query may see, if offsets tell.

    Keys are copied where offsets differ by row, so that all queries stand at keys of their own
    index. Not where windows are wider than all keys, one tile of which is then less work.
    """
    n, m = inputs.q.shape[2], inputs.k.shape[2]
    if isinstance(rule.lead, int):
        stays = rule.lead == 0 and n == m
    else:
        stays = rule.reach.back + rule.reach.ahead >= m and spec.xpos_base is None
    if stays:
        return rule, inputs
    return beside_queries(rule, inputs)


def _turned(spec: Spec, rule: Rule, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Queries and keys before their product: keys of length 1 and both rotated, where asked."""
    q, k, inv_freq = inputs.q, inputs.k, inputs.inv_freq
    if spec.shared_qk:
        k = unit_keys(k)
    if inv_freq is not None:
        with region("rotary"):
            query, key = positions(rule, q, k.shape[2])
            shift = 0 if rule.window is None else rule.window.after
            q = rotate(q, query + shift, inv_freq).to(q.dtype)
            k = rotate(k, key, inv_freq).to(k.dtype)
    return q, k


def _sizes(
    q: Tensor, k: Tensor, rule: Rule, one_window: bool, slides: bool, may_shorten: bool
) -> Sizes:
    """The shape of tiles: some of the rule's steps, or one window.

    Shorter tiles compute fewer scores that are hidden. Inside a compiler a tile is at least as long
    as its keys before and after it, because each further piece of keys is an operator of its own.

    Args:
        one_window: a tile is to be one window, because a bias or xpos's factors are laid out so.
        may_shorten: a tile may be shorter than these, so that long windows take little memory.
        slides: a tile's keys are to slide with its queries. They may else be all keys there are.
    """
    b, h, n, _ = q.shape
    reach, m = rule.reach, k.shape[2]
    at_once = is_symbolic(n) or torch.compiler.is_compiling() or is_transformed()
    if not isinstance(rule.lead, int) or not slides and not is_symbolic(m) and m <= _LEAST_TILE:
        tile = n if at_once else _shortened(q.device, n, m)
        if tile < n:  # of each tile, its portion takes those keys that exist
            return Sizes(b, h, k.shape[1], n, m, tile, before=n, after=m)
        return Sizes(b, h, k.shape[1], n, m, tile=n, before=0, after=m - n)
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
        # Rows of scores that are whole vectors long make matrix products faster.
        before, after = (-(-x // _VECTOR) * _VECTOR for x in reach.around(tile))
    if may_shorten and not at_once:
        short = _shortened(q.device, min(tile, n), min(before + tile + after, m))
        if short < min(tile, n):
            tile = short
            before, after = reach.around(tile)
    any_length = is_symbolic(n) and is_exporting()
    return Sizes(b, h, k.shape[1], n, m, tile, before, after, rule.lead, any_length)


def _shortened(device: torch.device, queries: int, keys: int) -> int:
    """Queries in a tile of so many keys that its scores fill one portion; ``queries`` at most."""
    if queries * keys <= 4 * scores_in_a_portion(device):
        return queries
    fitting = scores_in_a_portion(device) // keys // _VECTOR * _VECTOR
    return min(queries, max(_VECTOR, fitting))


def _cropped(sizes: Sizes, bias: Tensor | None, rule: Rule) -> tuple[Sizes, Tensor | None]:
    """``sizes`` without keys that lie outside the sequence for every tile; the bias accordingly."""
    tile = sizes.n if 0 < sizes.n <= sizes.tile else sizes.tile
    last = max(0, sizes.tiles - 1) * sizes.tile
    before = min(sizes.before, max(0, last + sizes.lead))
    after = min(sizes.after, max(last, sizes.m - sizes.lead - tile))
    if bias is not None and rule.is_window:
        first = sizes.before - before
        bias = bias[:, :tile, first : first + before + tile + after]
    return replace(sizes, tile=tile, before=before, after=after), bias


def _cleared(bias: Tensor | None, formula: Formula) -> Tensor | None:
    """``bias`` with zeros where the window hides a key: a NaN there would spread."""
    if bias is None or formula.same is None:
        return bias
    return bias.masked_fill(~formula.same, 0.0)
