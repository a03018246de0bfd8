"""Cutting queries and keys into tiles, a portion at a time, and adding gradients back.

A tile is some consecutive queries and the one interval of keys that they may see. Keys before the
first one and after the last one are zeros. Shapes: ``batch``, ``heads`` and ``kv_heads`` are those
of a call; ``b`` batch entries and ``h`` query heads of a portion, ``g`` tiles, ``t`` queries in a
tile, ``s`` keys of a tile, ``n`` queries, ``m`` keys, ``d`` any last dimension.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_limits.sizes import at_most


@dataclass(frozen=True)
class Sizes:
    """Batch entries, query heads, key heads, queries and keys of a call; the shape of its tiles."""

    batch: int
    heads: int
    kv_heads: int
    n: int
    m: int
    tile: int
    before: int
    """Keys of a tile before that at its first query."""
    after: int
    """Keys of a tile after that at its last query."""
    lead: int = 0
    """Index of the key at a query, less the index of the query."""
    any_length: bool = False
    """Whether ``n`` is symbolic, and no comparison may be made with it."""
    by_tile: bool = False
    """Whether a portion is one tile, as where tiles see more or fewer keys, of many heads."""

    @property
    def span(self) -> int:
        """Keys of a tile."""
        return self.before + self.tile + self.after

    @property
    def pieces(self) -> int:
        """Pieces, as long as a tile, that cover its keys; the next tile's begin one piece later."""
        return -(-self.span // self.tile)

    @property
    def tiles(self) -> int:
        """Tiles that cover the queries; never fewer than two of any length, nor just enough.

        torch.export would guard on what is left over (torch 2.11 to 2.15).
        """
        if self.any_length:
            return self.n // self.tile + 2
        return -(-self.n // self.tile)


@dataclass(frozen=True)
class Tiles:
    """A portion: some tiles of some heads of some batch entries, computed at a time."""

    sizes: Sizes
    batch: slice
    heads: slice
    kv_heads: slice
    first: int
    """First tile."""
    count: int
    whole: bool = False
    """Whether these are all tiles, of a sequence whose length may be symbolic."""

    @property
    def inside(self) -> bool:
        """Whether all the tiles' keys are known to exist."""
        start, stop = self.key_range
        return not self.whole and start >= 0 and stop <= self.sizes.m

    @property
    def ragged(self) -> bool:
        """Whether the last tile may reach past the last query."""
        return self.whole or self.query_range[1] > self.sizes.n

    def queries(self, x: Tensor) -> Tensor:
        """``(batch, heads, n, d)`` to ``(b, h, g, t, d)``."""
        queries = self._cut(x[self.batch, self.heads], *self.query_range)
        return self._apart(queries, self.count)

    def keys(self, x: Tensor) -> Tensor:
        """``(batch, kv_heads or heads, m, d)`` to ``(b, h, g, s, d)``, a view where it can be."""
        shared = x.shape[1] != self.sizes.heads
        heads = self.kv_heads if shared else self.heads
        tiles = self._overlapping(self._cut(x[self.batch, heads], *self.key_range))
        groups = (self.heads.stop - self.heads.start) // tiles.shape[1]
        return tiles.repeat_interleave(groups, dim=1) if shared else tiles

    def rows(self, device: torch.device) -> Tensor:
        """The row of each head, counted over the call's batch entries and heads: ``(b, h)``."""
        batch = torch.arange(self.batch.start, self.batch.stop, device=device)
        heads = torch.arange(self.heads.start, self.heads.stop, device=device)
        return batch[:, None] * self.sizes.heads + heads

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Batch entry, head, query and key of each score; they broadcast to ``(b, h, g, t, s)``.

        A query past the last one is taken for that one, and a key may not exist.
        """
        batch = torch.arange(self.batch.start, self.batch.stop, device=device)
        head = torch.arange(self.heads.start, self.heads.stop, device=device)
        tile = torch.arange(self.first, self.first + self.count, device=device) * self.sizes.tile
        query = tile[:, None] + torch.arange(self.sizes.tile, device=device)
        key = tile[:, None] + torch.arange(self.sizes.span, device=device)
        key = key + (self.sizes.lead - self.sizes.before)
        query = at_most(query, self.sizes.n - 1)
        return (
            batch[:, None, None, None, None],
            head[:, None, None, None],
            query[..., None],
            key[:, None],
        )

    def kept_keys(self, key_mask: Tensor | None, device: torch.device) -> Tensor:
        """Which keys exist and are kept by a mask: ``(b or 1, h or 1, g, 1, s)``.

        Args:
            key_mask: ``(batch, heads or 1, m)``.
        """
        if key_mask is None:
            key = torch.arange(*self.key_range, device=device)
            kept = ((key >= 0) & (key < self.sizes.m))[None, None]
        else:
            heads = self.heads if key_mask.shape[1] > 1 else slice(None)
            kept = self._cut(key_mask[self.batch, heads, :, None], *self.key_range)[..., 0]
        return kept.unfold(-1, self.sizes.span, self.sizes.tile)[..., None, :]

    def put_queries(self, out: Tensor, tiles: Tensor) -> None:
        """Writes ``(b, h, g, t, d)`` to the queries in ``out`` ``(batch, heads, n, d)``."""
        start, stop = self.query_range[0], min(self.query_range[1], self.sizes.n)
        out[self.batch, self.heads, start:stop] = tiles.flatten(2, 3)[:, :, : stop - start]

    def add_keys(self, total: Tensor, tiles: Tensor) -> None:
        """Adds ``(b, h, g, s, d)`` to the keys in ``total`` ``(batch, kv_heads, m, d)``."""
        sizes, (start, stop) = self.sizes, self.key_range
        low, high = max(start, 0), min(stop, sizes.m)
        if low >= high:
            return
        if total.shape[1] != sizes.heads:
            kv_heads = self.kv_heads.stop - self.kv_heads.start
            tiles = tiles.view(tiles.shape[0], kv_heads, -1, *tiles.shape[2:]).sum(2)
        heads = self.heads if total.shape[1] == sizes.heads else self.kv_heads
        shared = tiles[:, :, 0] if self.count == 1 else self._summed(tiles)
        total[self.batch, heads, low:high] += shared[:, :, low - start : high - start]

    def _summed(self, tiles: Tensor) -> Tensor:
        """``(b, h, g, s, d)`` summed over the tiles that share a key: ``(b, h, keys, d)``."""
        # Neighbouring tiles share keys, but first pieces overlap no first pieces, and so on.
        size, pieces = self.sizes.tile, self.sizes.pieces
        b, h, count, _, d = tiles.shape
        by_piece = tiles.new_zeros(b, h, count + pieces - 1, size, d)
        for piece in range(pieces):
            part = tiles[..., piece * size : (piece + 1) * size, :]
            by_piece[:, :, piece : piece + count, : part.shape[-2]] += part
        return by_piece.flatten(2, 3)

    def _overlapping(self, keys: Tensor) -> Tensor:
        """The keys of each tile, ``(b, h, g, s, d)``, out of all tiles' keys."""
        size, span, pieces = self.sizes.tile, self.sizes.span, self.sizes.pieces
        if not self.whole:
            return keys.unfold(2, span, size).transpose(-1, -2)
        # No unfold in a compiler: on the CPU, with several threads, torch 2.11 to 2.13 add up its
        # gradient in wrong places.
        padded = F.pad(keys, (0, 0, 0, pieces * size - span))
        by_piece = self._apart(padded, self.count + pieces - 1)
        parts = [by_piece[:, :, piece : piece + self.count] for piece in range(pieces)]
        return torch.cat(parts, dim=3)[..., :span, :]

    def _apart(self, x: Tensor, count: int) -> Tensor:
        """``count`` tiles or pieces one after the other, as ``(b, h, g, t, d)``."""
        size = self.sizes.tile
        if self.sizes.any_length:  # a view would guard on what the length is divided by
            return x.unfold(2, size, size).transpose(-1, -2)
        return x.view(*x.shape[:2], count, size, x.shape[3])

    def joined(self, x: Tensor) -> Tensor:
        """``(b, h, g, t, ...)`` as ``(b, h, queries, ...)``, without those past the last query."""
        queries, x = self.sizes.n - self.first * self.sizes.tile, x.flatten(2, 3)
        if self.sizes.any_length:  # a slice would guard on it being shorter
            return x.index_select(2, torch.arange(queries, device=x.device))
        return x[:, :, :queries]

    def _cut(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Indices ``start`` to ``stop`` of ``x``'s third dimension, zeros outside of it."""
        if self.whole:  # `x` is inside; to compare a symbolic length would guard on it
            return F.pad(x, (0, 0, -start, stop - x.shape[2]))
        low, high = max(start, 0), min(stop, x.shape[2])
        if low >= high:
            return x.new_zeros((*x.shape[:2], stop - start, x.shape[3]))
        x = x[:, :, low:high]
        return x if (low, high) == (start, stop) else F.pad(x, (0, 0, low - start, stop - high))

    @property
    def query_range(self) -> tuple[int, int]:
        """First query of the tiles, and the one after their last."""
        start = self.first * self.sizes.tile
        return start, start + self.count * self.sizes.tile

    @property
    def key_range(self) -> tuple[int, int]:
        """First key of the tiles, and the one after their last."""
        start, stop = self.query_range
        lead = self.sizes.lead
        return start + lead - self.sizes.before, stop + lead + self.sizes.after


def every_tile(sizes: Sizes) -> Tiles:
    """All tiles at once."""
    batch, heads, kv_heads = slice(0, sizes.batch), slice(0, sizes.heads), slice(0, sizes.kv_heads)
    return Tiles(sizes, batch, heads, kv_heads, 0, sizes.tiles, whole=True)


def some_at_a_time(sizes: Sizes, scores: int) -> Iterator[Tiles]:
    """Portions of about ``scores`` scores: of one tile, of one head or of whole batch entries."""
    if 0 in (sizes.batch, sizes.heads, sizes.n):
        return
    everything = replace(every_tile(sizes), whole=False)
    tile_scores = sizes.tile * sizes.span
    if sizes.by_tile:
        yield from _of_one_tile(everything, scores // tile_scores)
        return
    entries = scores // max(1, sizes.heads * sizes.tiles * tile_scores)
    for entry in range(0, sizes.batch, max(1, entries)):
        if entries:
            yield replace(everything, batch=slice(entry, min(entry + entries, sizes.batch)))
            continue
        count = max(1, scores // tile_scores)
        # Heads come last, since what hides keys is mostly the same for all heads.
        for first in range(0, sizes.tiles, count):
            for head in range(sizes.heads):
                kv_head = head * sizes.kv_heads // sizes.heads
                yield Tiles(
                    sizes,
                    slice(entry, entry + 1),
                    slice(head, head + 1),
                    slice(kv_head, kv_head + 1),
                    first,
                    min(count, sizes.tiles - first),
                )


def _of_one_tile(everything: Tiles, most: int) -> Iterator[Tiles]:
    """Portions of a tile of ``most`` heads or fewer, whole groups of a key head."""
    sizes = everything.sizes
    group = sizes.heads // sizes.kv_heads
    count = max(1, most // group)
    for entry, tile in product(range(sizes.batch), range(sizes.tiles)):
        for first in range(0, sizes.kv_heads, count):
            stop = min(first + count, sizes.kv_heads)
            yield replace(
                everything,
                batch=slice(entry, entry + 1),
                heads=slice(first * group, stop * group),
                kv_heads=slice(first, stop),
                first=tile,
                count=1,
            )
