"""How a call is cut: how long its tiles are, and what is computed of each.

Shapes are those of ``spec`` and ``tiles``.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..masks.rule import Rule
from ..spec import Inputs, Spec
from ..torch_limits.sizes import is_symbolic
from ..torch_limits.tracing import is_exporting, is_transformed
from .autograd import scores_in_a_portion
from .formula import Formula, Operands, formula_of, operands_of
from .tiles import Sizes

LEAST_TILE = 64
"""Fewest queries in a tile: a processor spends most of smaller matrix products on overhead."""

_VECTOR = 16
"""Numbers in a vector of the processor."""

_PART, _LEAST_SCORES = 128, 2**18
"""Queries in a part of a long window, and scores of the parts of all heads, the fewest that repay a
portion. On an AMD EPYC (Zen 3) with one thread and windows of 512, training took 0.73 times as long
with 8 heads, and 1.16 times with one head, which has half as many."""


def in_tiles(
    spec: Spec, rule: Rule, inputs: Inputs, draws: tuple[Tensor, Tensor] | None
) -> tuple[Operands, Formula, Sizes]:
    """A call's tensors, formula and sizes.

    Args:
        rule: the call's.
        inputs: shaped; queries and keys are rotated, and padding is cleared.
        draws: see ``Formula``.
    """
    q, k, bias = inputs.q, inputs.k, inputs.bias
    xpos = spec.xpos_base is not None
    sizes = sizes_of(
        q,
        k,
        rule,
        one_window=rule.is_window and (bias is not None or xpos),
        slides=rule.is_window or xpos,
        may_shorten=bias is None or not rule.is_window,
    )
    if not is_symbolic(q.shape[2]):
        sizes = cropped(sizes)
    formula = formula_of(spec, rule, inputs, sizes, draws)
    if bias is not None:
        bias = cleared(bias_within(bias, sizes, rule), formula)
    return operands_of(inputs)._replace(bias=bias), formula, sizes


def sizes_of(
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
    if not isinstance(rule.lead, int) or not slides and not is_symbolic(m) and m <= LEAST_TILE:
        tile = n if at_once else _shortened(q.device, n, m)
        if tile < n:  # of each tile, its portion takes those keys that exist
            return Sizes(b, h, k.shape[1], n, m, tile, before=n, after=m)
        return Sizes(b, h, k.shape[1], n, m, tile=n, before=0, after=m - n)
    if one_window:
        tile = rule.window.size
        before, after = rule.window.before, rule.window.after
    else:
        least = LEAST_TILE
        if torch.compiler.is_compiling() and reach.step <= 1:
            least = max(least, reach.back, reach.ahead)
        tile = reach.in_steps(least)
        # Rows of scores that are whole vectors long make matrix products faster.
        before, after = (-(-x // _VECTOR) * _VECTOR for x in reach.around(tile))
    if may_shorten and not at_once:
        short = _shortened(q.device, min(tile, n), min(before + tile + after, m))
        if short < min(tile, n):
            tile = short
            before, after = reach.around(tile)
        elif not one_window and _parts_pay(q, k, rule):
            before, after = reach.around(_PART)
            return Sizes(b, h, k.shape[1], n, m, _PART, before, after, by_tile=True)
    any_length = is_symbolic(n) and is_exporting()
    return Sizes(b, h, k.shape[1], n, m, tile, before, after, rule.lead, any_length)


def _parts_pay(q: Tensor, k: Tensor, rule: Rule) -> bool:
    """Whether a tile is faster that is a part of a causal window, without the keys after itself."""
    h, n = q.shape[1:3]
    if q.device.type != "cpu" or not rule.is_window or not rule.window.causal:
        return False
    scores = _PART * min(rule.reach.longest(_PART), n)
    most = scores_in_a_portion(q.device) * k.shape[1] // h
    return min(rule.reach.step, n) > _PART and _LEAST_SCORES / h <= scores <= most


def _shortened(device: torch.device, queries: int, keys: int) -> int:
    """Queries in a tile of so many keys that its scores fill one portion; ``queries`` at most."""
    if queries * keys <= 4 * scores_in_a_portion(device):
        return queries
    fitting = scores_in_a_portion(device) // keys // _VECTOR * _VECTOR
    return min(queries, max(_VECTOR, fitting))


def cropped(sizes: Sizes) -> Sizes:
    """``sizes`` without keys that lie outside the sequence for every tile."""
    tile = sizes.n if 0 < sizes.n <= sizes.tile else sizes.tile
    last = max(0, sizes.tiles - 1) * sizes.tile
    before = min(sizes.before, max(0, last + sizes.lead))
    after = min(sizes.after, max(last, sizes.m - sizes.lead - tile))
    return replace(sizes, tile=tile, before=before, after=after)


def bias_within(bias: Tensor, sizes: Sizes, rule: Rule) -> Tensor:
    """What tiles of these sizes need of a bias; a view. All, where positions are not indices."""
    if not rule.is_window:
        return bias
    first = rule.window.before - sizes.before
    return bias[:, : sizes.tile, first : first + sizes.span]


def cleared(bias: Tensor, formula: Formula) -> Tensor:
    """``bias`` with zeros where the window hides a key: a NaN there would spread."""
    return bias if formula.same is None else bias.masked_fill(~formula.same, 0.0)
