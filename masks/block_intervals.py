"""Which blocks a block of queries, or of keys, touches: one interval, from a rule's bounds.

A block of queries touches the key blocks between its first query's first key and its last query's
last key. A block among these is full when the last query's first key and the first query's last key
enclose it. The query blocks that touch a block of keys, for the backward pass, follow likewise from
``Rule.queries``.

Shapes: ``r`` blocks on one side, which are the rows of the grid; ``(..., r)`` is ``(r,)``, or
``(batch, heads, r)`` where a rule's tensors or a key mask decide, of size 1 for what does not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_limits.sizes import at_least, at_most
from .arguments import check_block_size
from .rule import Rule

_ALWAYS_HELD = 64
"""Index tensors of up to so many columns may be wider than the grid."""


@dataclass(frozen=True)
class Intervals:
    """The blocks that each row touches, and the full ones among them: integer ``(..., r)``.

    Both ends belong to an interval. It is empty where its last block lies below its first.
    """

    first: Tensor
    last: Tensor
    first_full: Tensor
    last_full: Tensor

    @property
    def ends(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.first, self.last, self.first_full, self.last_full


@dataclass(frozen=True)
class Side:
    """The queries or the keys, cut into blocks."""

    length: int
    block: int

    @property
    def blocks(self) -> int:
        return -(-self.length // self.block)


@dataclass(frozen=True)
class Grid:
    """A rule over blocks of queries and of key slots.

    Attributes:
        entries: batch entries and heads that the rule tells apart; 1 batch entry where it has no
            tensors.
    """

    rule: Rule
    queries: Side
    keys: Side
    entries: tuple[int, int] = (1, 1)

    def intervals(self, device: torch.device | str) -> tuple[Intervals, Intervals]:
        """The key blocks that each block of queries touches; the query blocks, for each of keys.

        All of one leading shape: kernels take the batch entries and heads of one list for those of
        all, and would read past the end of a list that has fewer.
        """
        queries, keys = self.queries, self.keys
        both = (
            _intervals(queries, keys, self._entry(self.rule.keys, device), device),
            _intervals(keys, queries, self._entry(self.rule.queries, device), device),
        )
        if self.rule.has_holes:  # no block is known to be full
            both = (
                replace(both[0], last_full=both[0].first_full - 1),
                replace(both[1], last_full=both[1].first_full - 1),
            )
        shapes = [end.shape[:-1] for side in both for end in side.ends]
        if not any(shapes):
            return both
        lead = torch.broadcast_shapes(*shapes)
        of_queries, of_keys = (
            Intervals(*(end.expand(*lead, end.shape[-1]) for end in side.ends)) for side in both
        )
        return of_queries, of_keys

    def widths(self) -> tuple[int, int]:
        """Blocks in the longest interval of a block of queries, and of keys; never too few."""
        reach = self.rule.reach
        return (
            _width(self.queries, self.keys, reach.longest(self.queries.block), reach.align),
            _width(self.keys, self.queries, reach.longest_of_keys(self.keys.block), reach.align),
        )

    def _entry(
        self,
        bounds: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
        device: torch.device | str,
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """``bounds`` as a function of tokens alone, for all batch entries and heads."""
        batch, head = (torch.arange(count, device=device) for count in self.entries)
        return lambda token: bounds(batch[:, None, None], head[None, :, None], token)


def block_intervals(
    rule: Rule,
    n_queries: int,
    n_keys: int,
    block_size: int | tuple[int, int] = 128,
    *,
    batch: int = 0,
    head: int = 0,
) -> Intervals:
    """The key blocks that each block of queries touches, ``(r,)``, on the CPU.

    They know of no key mask, which makes a block empty where it keeps no key of it, and partial
    where it does not keep every key; see ``kept_blocks``.

    Args:
        batch, head: whose intervals, where a rule differs by batch entry or head.
    """
    queries, keys = map(Side, (n_queries, n_keys), check_block_size(block_size))
    batch_entry, head_entry = (torch.tensor(number, device="cpu") for number in (batch, head))
    return _intervals(queries, keys, lambda token: rule.keys(batch_entry, head_entry, token), "cpu")


def _intervals(
    rows: Side,
    columns: Side,
    bounds: Callable[[Tensor], tuple[Tensor, Tensor]],
    device: torch.device | str,
) -> Intervals:
    """The intervals of ``columns`` that the blocks of ``rows`` touch."""
    row = torch.arange(rows.blocks, device=device)
    top = row * rows.block
    bottom = at_most(top + rows.block, rows.length) - 1
    (top_first, top_last), (bottom_first, bottom_last) = bounds(top), bounds(bottom)
    # Touched: all that any token of the row's block sees. Full: what every one of them sees.
    touched_first, touched_last = at_least(top_first, 0), at_most(bottom_last, columns.length - 1)
    full_first, full_last = at_least(bottom_first, 0), at_most(top_last, columns.length - 1)
    whole = top + rows.block <= rows.length
    return Intervals(
        first=touched_first // columns.block,
        last=torch.where(touched_first <= touched_last, touched_last // columns.block, -1),
        first_full=(full_first + columns.block - 1) // columns.block,
        last_full=torch.where(whole, (full_last + 1) // columns.block, 0) - 1,
    )


def trimmed(
    forward: Intervals, backward: Intervals, kept: tuple[Tensor, Tensor], width: int
) -> tuple[Intervals, Intervals]:
    """Intervals for kernels with a key mask, in few operations.

    A block of queries gets the key blocks from the first to the last that keeps a key. Full ones
    are those before its first hidden key or those after its last, whichever are more: all of them
    where padding is on one side.

    Args:
        forward: the intervals of key blocks.
        backward: the intervals of query blocks.
        kept: ``kept_blocks`` of the mask.
        width: key blocks in the longest interval.
    """
    some, every = kept
    blocks = some.shape[-1]
    column = forward.first[..., None] + torch.arange(width, device=some.device)
    touched = column <= forward.last[..., None]
    full = (forward.first_full[..., None] <= column) & (column <= forward.last_full[..., None])
    some_here, every_here = (at_columns(x, at_most(column, blocks - 1)) for x in kept)
    first, last = _ends(touched & some_here, column, blocks)
    first_hole, last_hole = _ends(touched & full & ~every_here, column, blocks)
    end = torch.minimum(first_hole - 1, forward.last_full)
    start = torch.maximum(last_hole + 1, forward.first_full)
    more_before = end - forward.first_full >= forward.last_full - start
    rows = Intervals(
        first,
        last,
        first_full=torch.where(more_before, forward.first_full, start),
        last_full=torch.where(more_before, end, forward.last_full),
    )
    shape = torch.broadcast_shapes(some.shape, backward.first.shape)
    columns = Intervals(
        backward.first.expand(shape),
        torch.where(some, backward.last, -1),
        backward.first_full.expand(shape),
        torch.where(every, backward.last_full, -1),
    )
    return rows, columns


def at_columns(x: Tensor, column: Tensor) -> Tensor:
    """``(batch, heads, blocks)`` at ``(..., r, width)`` columns: ``(batch, heads, r, width)``."""
    if column.dim() == 2:
        return x[..., column]
    lead = torch.broadcast_shapes(x.shape[:-1], column.shape[:-2])
    column = column.expand(*lead, *column.shape[-2:])
    found = x.expand(*lead, x.shape[-1]).gather(-1, column.flatten(-2))
    return found.view(column.shape)


def _ends(chosen: Tensor, column: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """The first and the last of a row's chosen columns; ``blocks`` and -1 where there is none."""
    return torch.where(chosen, column, blocks).amin(-1), torch.where(chosen, column, -1).amax(-1)


def kept_blocks(key_mask: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Which key blocks of ``(..., n_keys)`` keep some key, and which all: ``(..., blocks)``."""
    missing = -key_mask.shape[-1] % block_size
    padded = F.pad(key_mask, (0, missing))
    blocks = padded.view(*padded.shape[:-1], -1, block_size)
    return blocks.any(-1), blocks.all(-1)


def _width(rows: Side, columns: Side, longest: int, align: int) -> int:
    # An interval begins at a multiple of `grain`: at most `columns.block - grain` into a block.
    grain = math.gcd(rows.block, align, columns.block)
    width = (longest - 1 + columns.block - grain) // columns.block + 1
    # Keep the width even if the grid is narrower: comparing the two would specialise the kernel
    # for short sequences.
    return width if width <= _ALWAYS_HELD or width < columns.blocks else columns.blocks


def block_mask_bytes(
    rule: Rule,
    n_queries: int,
    n_keys: int,
    *,
    block_size: int | tuple[int, int] = 128,
    full_width: bool = False,
) -> int:
    """Bytes of the index tensors that ``block_mask`` makes for one batch entry and head."""
    queries, keys = map(Side, (n_queries, n_keys), check_block_size(block_size))
    grid = Grid(rule, queries, keys)
    forward, backward = (keys.blocks, queries.blocks) if full_width else grid.widths()
    # Both lists hold the partial and the full blocks: a count and the indices of each row, int32.
    return 4 * 2 * (queries.blocks * (1 + forward) + keys.blocks * (1 + backward))
