"""Which blocks a block of queries, or of keys, sees: runs of neighbours, from a rule's bounds.

A block of queries sees the key blocks between its first query's first key and its last query's
last key. Among these a block is full when even the last query's first key and the first query's
last key enclose it. The key blocks' runs of query blocks, for the backward pass, follow in the
same way from the rule's inverse bounds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_block_size
from .clip import at_least, at_most
from .rule import Rule

_ALWAYS_HELD = 64
"""Columns of index tensors that are not worth cutting down to the grid's."""


@dataclass(frozen=True)
class Runs:
    """The key blocks that each block of queries sees, one run of them, and the full ones in it.

    All integer ``(rows,)``, or ``(batch, heads, rows)`` where a key mask decides; ends included. A
    run is empty where its last is below its first.
    """

    first: Tensor
    last: Tensor
    first_full: Tensor
    last_full: Tensor


@dataclass(frozen=True)
class Side:
    """The queries or the keys, cut into blocks."""

    length: int
    block: int

    @property
    def blocks(self) -> int:
        return -(-self.length // self.block)


def block_runs(
    rule: Rule,
    n_queries: int,
    n_keys: int,
    block_size: int | tuple[int, int] = 128,
    *,
    batch: int = 0,
    head: int = 0,
) -> Runs:
    """The blocks that ``block_mask`` lists for each block of queries, as runs, on the CPU.

    A key mask would make a block empty where ``kept_blocks`` says that it keeps no key, and
    partial where it does not keep every key.
    """
    queries, keys = map(Side, (n_queries, n_keys), check_block_size(block_size))

    def first(query: Tensor) -> Tensor:
        return rule.keys(batch, head, query)[0]

    def last(query: Tensor) -> Tensor:
        return rule.keys(batch, head, query)[1]

    return runs_of(queries, keys, first, last, "cpu")


def runs_of_both(
    rule: Rule, queries: Side, keys: Side, device: torch.device | str
) -> tuple[Runs, Runs]:
    """The key blocks that each block of queries sees, the query blocks that see each of keys."""
    return (
        runs_of(queries, keys, rule.first_key, rule.last_key, device),
        runs_of(keys, queries, rule.first_query, rule.last_query, device),
    )


def runs_of(
    rows: Side,
    columns: Side,
    first: Callable[[Tensor], Tensor],
    last: Callable[[Tensor], Tensor],
    device: torch.device | str,
) -> Runs:
    """The runs of ``columns`` that the blocks of ``rows`` see, between a rule's bounds."""
    row = torch.arange(rows.blocks, device=device)
    top = row * rows.block
    bottom = at_most(top + rows.block, rows.length) - 1
    # Touched: all that any token of the row's block sees. Full: what every one of them sees.
    touched_first, touched_last = at_least(first(top), 0), at_most(last(bottom), columns.length - 1)
    full_first, full_last = at_least(first(bottom), 0), at_most(last(top), columns.length - 1)
    whole = top + rows.block <= rows.length
    return Runs(
        first=touched_first // columns.block,
        last=torch.where(touched_first <= touched_last, touched_last // columns.block, -1),
        first_full=(full_first + columns.block - 1) // columns.block,
        last_full=torch.where(whole, (full_last + 1) // columns.block, 0) - 1,
    )


def trimmed(
    forward: Runs, backward: Runs, kept: tuple[Tensor, Tensor], width: int
) -> tuple[Runs, Runs]:
    """Runs for kernels with a key mask, all of whose arithmetic follows from ends of runs.

    A block of queries sees the key blocks from the first to the last that keeps a key. Full ones
    are those before its first hidden key or those after its last, whichever are more: all of them
    where padding is on one side.

    Args:
        forward: the runs of key blocks, as ``runs_of`` finds them.
        backward: the runs of query blocks.
        kept: ``kept_blocks`` of the mask.
        width: key blocks in the longest run.

    Returns:
        Both, of the mask's leading sizes.
    """
    some, every = kept
    blocks = some.shape[-1]
    column = forward.first[:, None] + torch.arange(width, device=some.device)
    place, touched = at_most(column, blocks - 1), column <= forward.last[:, None]
    full = (forward.first_full[:, None] <= column) & (column <= forward.last_full[:, None])
    first, last = _ends(touched & some[..., place], column, blocks)
    first_hole, last_hole = _ends(touched & full & ~every[..., place], column, blocks)
    end = torch.minimum(first_hole - 1, forward.last_full)
    start = torch.maximum(last_hole + 1, forward.first_full)
    more_before = end - forward.first_full >= forward.last_full - start
    rows = Runs(
        first,
        last,
        first_full=torch.where(more_before, forward.first_full, start),
        last_full=torch.where(more_before, end, forward.last_full),
    )
    columns = Runs(
        backward.first.expand_as(some),
        torch.where(some, backward.last, -1),
        backward.first_full.expand_as(some),
        torch.where(every, backward.last_full, -1),
    )
    return rows, columns


def _ends(chosen: Tensor, column: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """The first and the last of a row's chosen columns; ``blocks`` and -1 where there is none."""
    return torch.where(chosen, column, blocks).amin(-1), torch.where(chosen, column, -1).amax(-1)


def kept_blocks(key_mask: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Which key blocks of ``(..., n_keys)`` keep some key, and which all: ``(..., blocks)``."""
    missing = -key_mask.shape[-1] % block_size
    blocks = F.pad(key_mask, (0, missing)).unflatten(-1, (-1, block_size))
    return blocks.any(-1), blocks.all(-1)


def widths(rule: Rule, queries: Side, keys: Side) -> tuple[int, int]:
    """Blocks in the longest run of a block of queries, and of a block of keys; never too few."""
    return (
        _width(queries, keys, rule.most_keys, rule.size),
        _width(keys, queries, rule.most_queries, rule.size),
    )


def _width(rows: Side, columns: Side, most: Callable[[int], int], size: int) -> int:
    # A run's first key lies at a multiple of `grain`, so it begins a block or this far into it.
    grain = math.gcd(rows.block, size, columns.block)
    width = (most(rows.block) - 1 + columns.block - grain) // columns.block + 1
    # Where the grid is narrower, a short run keeps its width all the same: a compiler that asked
    # for the lesser one would make other kernels for short sequences.
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
    grid = keys.blocks, queries.blocks
    forward, backward = grid if full_width else widths(rule, queries, keys)
    # Both lists hold the partial and the full blocks: a count and the indices of each row, int32.
    return 4 * 2 * (queries.blocks * (1 + forward) + keys.blocks * (1 + backward))
