"""The windowed path in plain tensor operations: every argument, any device and dtype.

Queries are cut into tiles of whole windows; a tile sees one run of keys. Tiles are worked off
some at a time, so that their scores stay in the cache and memory stays linear in the sequence;
the backward pass computes the weights again. Inside a compiler or ``torch.export`` all tiles go
at once, and the compiler fuses what it can. Shapes are those of ``tiles``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .autocast import without_autocast
from .masks import Window
from .masks.dropout import keeps, key_draws, query_draws
from .masks.keys import without_padding
from .masks.rule import sees
from .masks.scores import SELF_SCORE, unit_keys
from .regions import region
from .rotary import Xpos, rotate, xpos_bits
from .tiles import Sizes, Tiles, every_tile, some_at_a_time

_LEAST_TILE = 64
"""Queries in a tile at least (whole windows of them): smaller products waste the processor."""

_SCORES_ON_CPU, _SCORES_ELSEWHERE = 2**20, 2**26
"""Scores held at a time: few enough to be held cheaply, many enough to hide an operator's start."""


_MOST_BITS = 56
"""Powers of two that xpos may scale by in fp32: hidden scores, off by their square, are finite."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    inv_freq: Tensor | None,
    xpos: Xpos | None,
    *,
    window: Window,
    scale: float,
    shared_qk: bool,
    dropout: float,
) -> Tensor:
    """Local attention by windows.

    Args:
        q: ``(b, h, n, d)``; ``k``, ``v``: ``(b, h / groups, n, d or d_v)``.
        key_mask: boolean ``(b, h or 1, n)``, True = keep.
        bias: ``(heads, W, window.span)``; ``heads`` divides ``b * h``.
        seed: 0-d int64 tensor, needed with ``dropout``.

    Returns:
        ``(b, h, n, d_v)`` in ``q``'s dtype.
    """
    if key_mask is not None:
        with region("key mask"):
            k, v = without_padding(k, key_mask), without_padding(v, key_mask)
    q, k = _placed(q, k, window, shared_qk, inv_freq)
    b, h, n, _ = q.shape
    draws = None
    if dropout > 0:
        assert seed is not None
        with region("dropout"):
            draws = query_draws(seed, b * h, n), key_draws(seed, b * h, n)
    # A bias is laid out over one window, and xpos wants its keys near; else fill the tile.
    windows = 1 if bias is not None or xpos is not None else -(-_LEAST_TILE // window.size)
    sizes = _sizes(q, k, window, windows)
    # Keys around the only tile would lie outside of the sequence. A compiler is not to ask: it
    # would make a graph for each length.
    if not torch.compiler.is_compiling() and 0 < n <= sizes.tile:
        sizes = replace(sizes, tile=n, before=0, after=0)
        if bias is not None:
            bias = bias[:, :n, window.before : window.before + n]
    formula = _formula(q, sizes, window, scale, shared_qk, xpos, dropout, draws)
    bias = _cleared(bias, formula.hidden)
    with without_autocast(q.device), region("attention"):
        if torch.compiler.is_compiling():
            return formula.output(every_tile(sizes), q, k, v, bias, key_mask)
        out: Tensor = _Tiled.apply(  # type: ignore[no-untyped-call]
            q, k, v, bias, key_mask, formula, sizes
        )
        return out


def weights(
    q: Tensor,
    k: Tensor,
    *,
    window: Window,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    shared_qk: bool,
    inv_freq: Tensor | None,
    xpos: Xpos | None,
) -> Tensor:
    """The weights that ``attend`` mixes values with, before dropout; arguments as there.

    Returns:
        ``(b, h, n, window.span)`` in fp32 at least: column ``c`` of query ``i`` is the key
        ``window.span_start(i) + c``, and 0 where it is hidden or outside the sequence.
    """
    if key_mask is not None:
        k = without_padding(k, key_mask)
    q, k = _placed(q, k, window, shared_qk, inv_freq)
    sizes = _sizes(q, k, window, windows=1)
    formula = _formula(q, sizes, window, scale, shared_qk, xpos)
    bias = _cleared(bias, formula.hidden)
    out = q.new_empty((*q.shape[:-1], window.span), dtype=formula.compute)
    with without_autocast(q.device):
        for tiles in _portions(sizes, q.device):
            part = formula.of_tiles(tiles, q, k, bias, key_mask).flatten(2, 3)
            start = tiles.first * sizes.tile
            place = out[tiles.batch, tiles.heads, start : start + part.shape[2]]
            place.copy_(part[:, :, : place.shape[2]])
    return out


def _placed(
    q: Tensor, k: Tensor, window: Window, shared_qk: bool, inv_freq: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Queries and keys as their products are taken: keys to length 1, both rotated."""
    if shared_qk:
        k = unit_keys(k)
    if inv_freq is not None:
        with region("rotary"):
            position = torch.arange(q.shape[2], device=q.device)
            q = rotate(q, position + window.after, inv_freq).to(q.dtype)
            k = rotate(k, position, inv_freq).to(k.dtype)
    return q, k


def _sizes(q: Tensor, k: Tensor, window: Window, windows: int) -> Sizes:
    """Tiles of ``windows`` windows."""
    b, h, n, _ = q.shape
    return Sizes(
        b,
        h,
        k.shape[1],
        n,
        tile=windows * window.size,
        before=window.before,
        after=window.after,
    )


def _cleared(bias: Tensor | None, hidden: Tensor) -> Tensor | None:
    """``bias`` without what it holds where the window hides a key, which may be NaN."""
    return None if bias is None else bias.masked_fill(hidden < 0, 0.0)


@dataclass(frozen=True)
class _Formula:
    """Attention within tiles."""

    window: Window
    scale: float
    shared_qk: bool
    dropout: float
    draws: tuple[Tensor, Tensor] | None
    xpos: Xpos | None
    compute: torch.dtype
    hidden: Tensor
    """0 where a tile's query may see the tile's key, -inf elsewhere: ``(t, s)``."""

    def output(
        self,
        tiles: Tiles,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """The tiles' output, ``(b, h, queries, d_v)``."""
        weights = self.of_tiles(tiles, q, k, bias, mask)
        out = _times(weights, self.keep(tiles)) @ tiles.keys(v).to(self.compute)
        return out.flatten(2, 3)[:, :, : tiles.sizes.n - tiles.first * tiles.sizes.tile].to(q.dtype)

    def of_tiles(
        self, tiles: Tiles, q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """The tiles' weights, ``(b, h, g, t, s)``."""
        q_factor, k_factor = self.factors(tiles)
        q_tiles = tiles.queries(q).to(self.compute) * q_factor
        k_tiles = _times(tiles.keys(k).to(self.compute), k_factor)
        return self.weights(tiles, q_tiles, k_tiles, bias, mask)

    def factors(self, tiles: Tiles) -> tuple[Tensor | float, Tensor | None]:
        """What a tile's queries and keys are multiplied by before their product."""
        if self.xpos is None:
            return self.scale, None
        sizes, ahead = tiles.sizes, self.window.after
        scales = self.xpos.scales(sizes.tile, sizes.before, sizes.after, ahead, self.compute)
        q_factor, k_factor = (half.repeat(1, 2) for half in scales)
        return q_factor * self.scale, k_factor

    def weights(
        self, tiles: Tiles, q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Softmax over the visible keys, ``(b, h, g, t, s)``; zeros for a query that sees none."""
        scores = q @ k.transpose(-1, -2)
        if bias is not None:
            scores += bias[tiles.rows(q.device) % bias.shape[0]][:, :, None]
        if self.shared_qk:
            self.self_scores(tiles, scores).fill_(SELF_SCORE)
        scores += self.hidden
        if mask is not None or not tiles.inside:
            scores += _hiding(tiles.kept_keys(mask, q.device), self.compute)
        if bias is None and mask is None and not tiles.ragged:
            return scores.softmax(-1)  # every query sees its own key
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)

    def self_scores(self, tiles: Tiles, scores: Tensor) -> Tensor:
        """The scores of tokens with themselves: a tile's first query is its key ``before``."""
        return scores.diagonal(tiles.sizes.before, -2, -1)

    def keep(self, tiles: Tiles) -> Tensor | None:
        """What dropout multiplies the weights by."""
        if self.draws is None:
            return None
        by_query, by_key = (
            draw.unflatten(0, (tiles.sizes.batch, tiles.sizes.heads))[..., None]
            for draw in self.draws
        )
        by_query, by_key = tiles.queries(by_query), tiles.keys(by_key)
        keep = keeps(by_query, by_key.transpose(-1, -2), self.dropout)
        return keep.to(self.compute) / (1 - self.dropout)


def _formula(
    q: Tensor,
    sizes: Sizes,
    window: Window,
    scale: float,
    shared_qk: bool,
    xpos: Xpos | None,
    dropout: float = 0.0,
    draws: tuple[Tensor, Tensor] | None = None,
) -> _Formula:
    compute = torch.promote_types(q.dtype, torch.float32)
    if xpos is not None and xpos_bits(window, xpos.base) > _MOST_BITS:
        compute = torch.float64
    # Tiles are whole windows, or there is one: what the first one sees, every one sees.
    query = torch.arange(sizes.tile, device=q.device)[:, None]
    key = torch.arange(sizes.span, device=q.device) - sizes.before
    hidden = _hiding(sees(window, query, key), compute)
    return _Formula(window, scale, shared_qk, dropout, draws, xpos, compute, hidden)


def _hiding(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(seen, 0.0, -torch.inf).to(dtype)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


class _Tiled(torch.autograd.Function):
    """``_Formula`` some tiles at a time, its backward pass likewise."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        formula: _Formula,
        sizes: Sizes,
    ) -> Tensor:
        out = torch.empty_like(q) if v.shape[-1] == q.shape[-1] else _empty(q, v.shape[-1])
        for tiles in _portions(sizes, q.device):
            part = formula.output(tiles, q, k, v, bias, mask)
            start = tiles.first * sizes.tile
            out[tiles.batch, tiles.heads, start : start + part.shape[2]] = part
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.formula, ctx.sizes = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, mask, output = ctx.saved_tensors
        with without_autocast(grad.device), region("attention backward"):
            if torch.is_grad_enabled():
                grads = _differentiable_gradients(ctx.formula, ctx.sizes, q, k, v, bias, mask, grad)
            else:
                grads = _gradients(ctx.formula, ctx.sizes, q, k, v, bias, mask, output, grad)
        return (*grads, None, None, None)


def _gradients(
    formula: _Formula,
    sizes: Sizes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    output: Tensor,
    grad: Tensor,
) -> list[Tensor | None]:
    """Gradients of q, k, v and bias, as in FlashAttention (arXiv:2205.14135, appendix B.2)."""
    compute = formula.compute
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=compute) for x in (q, k, v))
    grad_bias = None if bias is None else torch.zeros_like(bias, dtype=compute)
    for tiles in _portions(sizes, q.device):
        q_factor, k_factor = formula.factors(tiles)
        q_tiles = tiles.queries(q).to(compute) * q_factor
        k_tiles = _times(tiles.keys(k).to(compute), k_factor)
        grad_out = tiles.queries(grad).to(compute)
        weights = formula.weights(tiles, q_tiles, k_tiles, bias, mask)
        keep = formula.keep(tiles)
        tiles.add_keys(grad_v, _times(weights, keep).transpose(-1, -2) @ grad_out)
        grad_weights = grad_out @ tiles.keys(v).to(compute).transpose(-1, -2)
        along = (grad_out * tiles.queries(output)).sum(-1, keepdim=True)
        grad_scores = _times(grad_weights, keep).sub_(along).mul_(weights)
        if formula.shared_qk:
            formula.self_scores(tiles, grad_scores).zero_()
        if grad_bias is not None:
            rows = tiles.rows(q.device).flatten() % grad_bias.shape[0]
            grad_bias.index_add_(0, rows, grad_scores.sum(2).flatten(0, 1))
        tiles.add_queries(grad_q, grad_scores @ k_tiles * q_factor)
        tiles.add_keys(grad_k, _times(grad_scores.transpose(-1, -2) @ q_tiles, k_factor))
    grads = [grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)]
    return [*grads, None if bias is None or grad_bias is None else grad_bias.to(bias.dtype)]


def _differentiable_gradients(
    formula: _Formula,
    sizes: Sizes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    grad: Tensor,
) -> list[Tensor | None]:
    """The same gradients with a graph of their own, for gradients of gradients."""
    wanted = [x for x in (q, k, v, bias) if x is not None and x.requires_grad]
    output = formula.output(every_tile(sizes), q, k, v, bias, mask)
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return [next(found) if x is not None and x.requires_grad else None for x in (q, k, v, bias)]


def _portions(sizes: Sizes, device: torch.device) -> Iterator[Tiles]:
    return some_at_a_time(sizes, _SCORES_ON_CPU if device.type == "cpu" else _SCORES_ELSEWHERE)


def _empty(q: Tensor, d_v: int) -> Tensor:
    return q.new_empty((*q.shape[:-1], d_v))
