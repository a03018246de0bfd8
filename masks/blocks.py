"""From a rule's bounds to FlexAttention's BlockMask, without evaluating the mask.

A row of the grid of blocks is a short run (``runs``), so that the whole grid costs time and memory
linear in the sequence.

FlexAttention wants the partial and the full blocks in lists of their own. Where a list has no
gaps its kernels need not look blocks up one by one (``lists_have_gaps``).

Block masks: https://pytorch.org/docs/stable/nn.attention.flex_attention.html
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks

from .arguments import check_block_size, check_count
from .buffer import written_out
from .clip import at_least, at_most
from .keys import padding_mod
from .rule import MaskMod, Rule, mask_mod
from .runs import Runs, Side, kept_blocks, runs_of_both, trimmed, widths

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True)
class Band:
    """The states of the blocks that one side's blocks touch.

    ``states`` is ``(batch, heads, rows, width)`` with EMPTY, PARTIAL or FULL; ``columns`` is
    ``(rows, width)``, the block that each state belongs to; both integer.
    """

    states: Tensor
    columns: Tensor


def block_mask(
    rule: Rule,
    n_queries: int,
    n_keys: int,
    *,
    block_size: int | tuple[int, int] = 128,
    device: torch.device | str = "cpu",
    key_mask: Tensor | None = None,
    full_width: bool = False,
) -> BlockMask:
    """The BlockMask of ``rule`` for ``n_queries`` queries and ``n_keys`` key slots.

    Args:
        rule: the mask rule, a ``Window`` for instance.
        n_queries: queries, at least 1.
        n_keys: key slots, at least 1.
        block_size: tokens in a sparse block, or ``(queries, keys)`` in one.
        device: where the index tensors live.
        key_mask: boolean ``(batch, n)`` or ``(batch, heads, n)``, by key position, True = keep.
            Blocks whose keys are all hidden become empty, others that hold a hidden one partial.
        full_width: index tensors as wide as the grid, which compiled FlexAttention wants on the
            CPU, and torch to print a BlockMask or make it dense, instead of as wide as the band.

    Returns:
        A BlockMask with forward and transposed lists, int32, of batch and heads 1 or
        ``key_mask``'s. A block that sticks out past the last query or key is partial.

    Raises:
        ValueError: a number out of range, or a key mask of another shape.
        TypeError: a number is no int.
    """
    check_count("n_queries", n_queries)
    check_count("n_keys", n_keys)
    lengths, sizes = (n_queries, n_keys), check_block_size(block_size)
    kept, mod = None, mask_mod(rule)
    if key_mask is not None:
        if key_mask.dtype != torch.bool or key_mask.dim() not in (2, 3):
            raise ValueError(
                "key_mask must be boolean of shape (batch, n) or (batch, heads, n), "
                f"got {key_mask.dtype} of shape {tuple(key_mask.shape)}"
            )
        by_head = key_mask[:, None] if key_mask.dim() == 2 else key_mask
        kept = rule.in_slots(by_head[..., None])[..., 0]
        if kept.shape[-1] != n_keys:
            raise ValueError(
                f"key_mask must be for n_keys {n_keys}, got one for {kept.shape[-1]} key slots"
            )
        mod = and_masks(mod, padding_mod(kept))
    if kept is None:
        lists = block_lists(rule, lengths, sizes, device, full_width=full_width)
    else:
        lists = _exact_lists(rule, lengths, sizes, device, kept, full_width)
    return from_lists(lengths, lists, sizes, mod)


def block_lists(
    rule: Rule,
    lengths: tuple[int, int],
    block_size: tuple[int, int],
    device: torch.device | str,
    kept: Tensor | None = None,
    *,
    full_width: bool = False,
    one_list: bool = False,
) -> tuple[Tensor, ...]:
    """The index tensors of a kernel's block mask: counts and indices of partial and full blocks.

    As ``block_mask`` has them but for a key mask, with which they name some empty blocks, and some
    full ones, as partial; see ``runs.trimmed``. That takes a few small kernels, exact lists many.

    Args:
        lengths: queries and key slots.
        kept: boolean ``(batch, heads, slots)``, the slots that a key mask keeps.
        one_list: name full blocks as partial ones; there are no lists of full ones then.

    Returns:
        For queries and for keys, the partial and the full list, each ``(batch, heads, rows)`` and
        ``(batch, heads, rows, width)``: eight tensors, or four with ``one_list``.
    """
    queries, keys = map(Side, lengths, block_size)
    both, wide = runs_of_both(rule, queries, keys, device), widths(rule, queries, keys)
    if kept is not None:
        both = trimmed(*both, kept_blocks(kept, keys.block), wide[0])
    grid = keys.blocks, queries.blocks
    if full_width:
        wide = grid
    lists: list[Tensor] = []
    for runs, blocks, width in zip(both, grid, wide, strict=True):
        if one_list:
            runs = replace(runs, last_full=runs.first_full - 1)
        partial, full = _lists_of_runs(runs, blocks, width)
        lists += partial if one_list else partial + full
    return tuple(map(written_out, lists))


def lists_have_gaps(rule: Rule, lengths: tuple[int, int], block: int) -> bool:
    """Whether a list of ``block_lists`` may name blocks that are no neighbours.

    Where there is neither a key mask, which leaves gaps wherever it hides keys, nor ``one_list``,
    which leaves none.

    Args:
        rule: the mask rule.
        lengths: queries and key slots.
        block: tokens in a sparse block.
    """
    # Partial blocks lie on both sides of the full ones, unless windows begin and end with blocks.
    return not rule.aligned_to(block) or any(length % block for length in lengths)


def from_lists(
    lengths: tuple[int, int],
    lists: Sequence[Tensor],
    block_size: tuple[int, int],
    mod: MaskMod,
) -> BlockMask:
    """The BlockMask of ``block_lists`` and a mask_mod, for ``(queries, keys)`` tokens."""
    half = len(lists) // 2
    kv, q = ([*side, None, None][:4] for side in (lists[:half], lists[half:]))
    return BlockMask(lengths, *kv, *q, block_size, mod)  # type: ignore[call-arg, arg-type]


def _lists_of_runs(runs: Runs, blocks: int, width: int) -> list[tuple[Tensor, Tensor]]:
    """The partial and the full blocks of each row: counts ``(batch, heads, rows)`` and indices.

    By formula, from the ends of the runs alone.
    """
    first_full = torch.maximum(runs.first, runs.first_full)[..., None]
    full_count = at_least(torch.minimum(runs.last, runs.last_full)[..., None] - first_full + 1, 0)
    count = at_least(runs.last - runs.first + 1, 0)[..., None] - full_count
    place = torch.arange(width, device=runs.first.device)
    partial = runs.first[..., None] + place
    partial = partial + torch.where(partial < first_full, 0, full_count)  # those after the run
    return [
        (_by_head(counts[..., 0], 3), _by_head(at_most(indices, blocks - 1), 4))
        for counts, indices in ((count, partial), (full_count, first_full + place))
    ]


def _by_head(x: Tensor, dimensions: int) -> Tensor:
    """int32, with sizes of 1 for batch and heads where there are none."""
    x = x.to(torch.int32)
    return x if x.dim() == dimensions else x[None, None]


def _exact_lists(
    rule: Rule,
    lengths: tuple[int, int],
    block_size: tuple[int, int],
    device: torch.device | str,
    kept: Tensor,
    full_width: bool,
) -> tuple[Tensor, ...]:
    """As ``block_lists``, where the mask decides block by block."""
    queries, keys = map(Side, lengths, block_size)
    rows, columns = runs_of_both(rule, queries, keys, device)
    wide, (some, every) = widths(rule, queries, keys), kept_blocks(kept, keys.block)
    across, down = _band(rows, keys.blocks, wide[0]), _band(columns, queries.blocks, wide[1])
    across = _with_keys(across, some[..., across.columns], every[..., across.columns])
    down = _with_keys(down, some[..., None], every[..., None])
    lists = []
    for band, blocks in ((across, keys.blocks), (down, queries.blocks)):
        for count, indices in (_listed(band, PARTIAL), _listed(band, FULL)):
            more = blocks - indices.shape[-1] if full_width else 0
            lists += [count, F.pad(indices, (0, more))]
    return tuple(map(written_out, lists))


def _band(runs: Runs, blocks: int, width: int) -> Band:
    column = runs.first[:, None] + torch.arange(width, device=runs.first.device)
    touched = column <= runs.last[:, None]
    full = (runs.first_full[:, None] <= column) & (column <= runs.last_full[:, None])
    states = touched.to(torch.int32) + (touched & full).to(torch.int32)
    return Band(states[None, None], at_most(column, blocks - 1))


def _with_keys(band: Band, some: Tensor, every: Tensor) -> Band:
    states = torch.where(every, band.states, at_most(band.states, PARTIAL))
    return Band(torch.where(some, states, EMPTY), band.columns)


def _listed(band: Band, state: int) -> tuple[Tensor, Tensor]:
    """The blocks in ``state``: counts ``(batch, heads, rows)`` and indices, first in each row."""
    chosen = band.states == state
    width = chosen.shape[-1]
    rank = chosen.cumsum(-1) - 1
    # The blocks in other states share one place past the end, which is cut off.
    target = torch.where(chosen, rank, width)
    indices = torch.zeros(*chosen.shape[:-1], width + 1, dtype=torch.int32, device=chosen.device)
    columns = band.columns.to(torch.int32).expand(chosen.shape)
    return chosen.sum(-1, dtype=torch.int32), indices.scatter(-1, target, columns)[..., :width]
