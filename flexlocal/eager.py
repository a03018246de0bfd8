"""The windowed path in plain tensor operations: every argument, any device and dtype.

Queries are cut into tiles of whole windows; a tile sees one run of keys. Tiles are worked off
some at a time (``tiled``). Inside a compiler or ``torch.export`` all of them go at once, and the
compiler fuses what it can. Shapes are those of ``tiles``.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .autocast import without_autocast
from .formula import formula_of
from .masks import Window
from .masks.dropout import key_draws, query_draws
from .masks.keys import without_padding
from .masks.scores import unit_keys
from .regions import region
from .rotary import Xpos, rotate
from .tiled import attend_tiled, portions
from .tiles import Sizes, every_tile

_LEAST_TILE = 64
"""Queries in a tile at least (whole windows of them): smaller products waste the processor."""


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
    if not _is_open(n):
        sizes, bias = _cropped(sizes, bias)
    formula = formula_of(q, sizes, window, scale, shared_qk, xpos, dropout, draws)
    bias = _cleared(bias, formula.hidden)
    with without_autocast(q.device), region("attention"):
        if torch.compiler.is_compiling():
            return formula.output(every_tile(sizes), q, k, v, bias, key_mask)
        return attend_tiled(q, k, v, bias, key_mask, formula, sizes)


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
    sizes, bias = _cropped(_sizes(q, k, window, windows=1), bias)
    formula = formula_of(q, sizes, window, scale, shared_qk, xpos)
    bias = _cleared(bias, formula.hidden)
    out = q.new_zeros((*q.shape[:-1], window.span), dtype=formula.compute)
    first = window.before - sizes.before
    columns = slice(first, first + sizes.span)
    with without_autocast(q.device):
        for tiles in portions(sizes, q.device):
            part = formula.of_tiles(tiles, q, k, bias, key_mask).flatten(2, 3)
            start = tiles.first * sizes.tile
            place = out[tiles.batch, tiles.heads, start : start + part.shape[2], columns]
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


def _is_open(n: int) -> bool:
    """Whether a compiler is to make one graph for many lengths: to ask would make one for each."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # a third of a second

    return not has_static_value(n)


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


def _cropped(sizes: Sizes, bias: Tensor | None) -> tuple[Sizes, Tensor | None]:
    """Tiles without keys that lie outside of the sequence for each of them."""
    tile = sizes.n if 0 < sizes.n <= sizes.tile else sizes.tile
    furthest = max(0, sizes.tiles - 1) * sizes.tile
    before, after = min(sizes.before, furthest), min(sizes.after, furthest)
    if bias is not None:
        first = sizes.before - before
        bias = bias[:, :tile, first : first + before + tile + after]
    return replace(sizes, tile=tile, before=before, after=after), bias


def _cleared(bias: Tensor | None, hidden: Tensor) -> Tensor | None:
    """``bias`` without what it holds where the window hides a key, which may be NaN."""
    return None if bias is None else bias.masked_fill(hidden < 0, 0.0)
