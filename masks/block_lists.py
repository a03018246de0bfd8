"""From a rule's bounds to FlexAttention's BlockMask, by formula: the mask is never evaluated.

A row of the grid of blocks is one short interval (``block_intervals``), so that the grid costs time
and memory linear in the sequence. FlexAttention wants the partial and the full blocks in lists of
their own. Where a list has no gaps, kernels need not look its blocks up one by one
(``lists_have_gaps``).

Block masks: https://pytorch.org/docs/stable/nn.attention.flex_attention.html. Shapes are those of
``block_intervals``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks

from ..torch_limits.memory import written_out
from ..torch_limits.sizes import at_least, at_most
from .arguments import check_block_size, check_count
from .block_intervals import Grid, Intervals, Side, at_columns, kept_blocks, trimmed
from .keys import padding_mod
from .rule import MaskMod, Rule, mask_mod

EMPTY, PARTIAL, FULL = 0, 1, 2


def block_mask(
    rule: Rule,
    n_queries: int,
    n_keys: int,
    *,
    block_size: int | tuple[int, int] = 128,
    device: torch.device | str = "cpu",
    key_mask: Tensor | None = None,
    full_width: bool = False,
    entries: tuple[int, int] = (1, 1),
) -> BlockMask:
    """The BlockMask of ``rule`` for ``n_queries`` queries and ``n_keys`` keys.

    Args:
        rule: the mask rule, a ``Window`` for instance.
        n_queries: queries, at least 1.
        n_keys: keys, at least 1; key slots for a ``KeyLayout``.
        block_size: tokens in a sparse block, or ``(queries, keys)`` in one.
        device: where the index tensors live, and the rule's tensors, if it has some.
        key_mask: boolean ``(batch, n_keys)`` or ``(batch, heads, n_keys)``, True = keep. Blocks
            whose keys are all hidden become empty, others that hold a hidden one partial.
        full_width: index tensors as wide as the grid, instead of as wide as the longest interval.
            Compiled FlexAttention wants them on the CPU, and torch to print a BlockMask.
        entries: batch entries and heads of a rule that differs by these.

    Returns:
        A BlockMask with forward and transposed lists, int32, of batch and heads 1 where neither
        the rule nor ``key_mask`` has more. A block that sticks out past the last query or key is
        partial.

    Raises:
        ValueError: a number out of range, or a key mask of another shape.
        TypeError: a number is no int.
    """
    n_queries, n_keys = check_count("n_queries", n_queries), check_count("n_keys", n_keys)
    sizes = check_block_size(block_size)
    grid = Grid(rule, Side(n_queries, sizes[0]), Side(n_keys, sizes[1]), entries)
    if key_mask is None:
        lists = block_lists(grid, device, full_width=full_width)
        return from_lists((n_queries, n_keys), lists, sizes, mask_mod(rule))
    if key_mask.dtype != torch.bool or key_mask.dim() not in (2, 3):
        raise ValueError(
            "key_mask must be boolean of shape (batch, n) or (batch, heads, n), "
            f"got {key_mask.dtype} of shape {tuple(key_mask.shape)}"
        )
    kept = key_mask[:, None] if key_mask.dim() == 2 else key_mask
    if kept.shape[-1] != n_keys:
        raise ValueError(f"key_mask must be for n_keys {n_keys}, got one for {kept.shape[-1]} keys")
    lists = _exact_lists(grid, device, kept, full_width)
    mod = and_masks(mask_mod(rule), padding_mod(kept))
    return from_lists((n_queries, n_keys), lists, sizes, mod)


def block_lists(
    grid: Grid,
    device: torch.device | str,
    kept: Tensor | None = None,
    *,
    full_width: bool = False,
    one_list: bool = False,
) -> tuple[Tensor, ...]:
    """The index tensors of a kernel's block mask: counts and indices of partial and full blocks.

    Without a key mask they are those of ``block_mask``. With one, the lists of queries also name
    empty blocks between others, and name some full blocks as partial; see ``trimmed``. That takes a
    few small kernels, where exact lists take many.

    Args:
        kept: boolean ``(batch, heads, n_keys)``, the keys that a mask keeps.
        full_width: make index tensors as wide as the grid.
        one_list: list full blocks among the partial ones.

    Returns:
        For queries and for keys, the partial and the full list, each a count ``(batch, heads, r)``
        and indices ``(batch, heads, r, width)``: eight tensors, or four with ``one_list``.
    """
    both, widths = grid.intervals(device), grid.widths()
    if kept is not None:
        both = trimmed(*both, kept_blocks(kept, grid.keys.block), widths[0])
    blocks = grid.keys.blocks, grid.queries.blocks
    if full_width:
        widths = blocks
    lists: list[Tensor] = []
    for intervals, columns, width in zip(both, blocks, widths, strict=True):
        if one_list:
            intervals = replace(intervals, last_full=intervals.first_full - 1)
        partial, full = _listed_by_formula(intervals, columns, width)
        lists += partial if one_list else partial + full
    return tuple(map(written_out, lists))


def lists_have_gaps(rule: Rule, lengths: tuple[int, int], block: int) -> bool:
    """Whether a list of ``block_lists`` may leave blocks out between others.

    A key mask leaves gaps as well, wherever it hides keys; ``one_list`` closes those of the rule.

    Args:
        lengths: queries and keys.
        block: tokens in a sparse block.
    """
    # Partial blocks lie on both sides of the full ones, unless all bounds lie at edges of blocks.
    return not rule.reach.ends_with(block) or any(length % block for length in lengths)


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


def _listed_by_formula(
    intervals: Intervals, blocks: int, width: int
) -> list[tuple[Tensor, Tensor]]:
    """Counts and indices of each row's partial blocks, then of its full blocks."""
    first_full = torch.maximum(intervals.first, intervals.first_full)[..., None]
    last_full = torch.minimum(intervals.last, intervals.last_full)[..., None]
    full_count = at_least(last_full - first_full + 1, 0)
    count = at_least(intervals.last - intervals.first + 1, 0)[..., None] - full_count
    place = torch.arange(width, device=intervals.first.device)
    partial = intervals.first[..., None] + place
    partial = partial + torch.where(partial < first_full, 0, full_count)  # past the full blocks
    return [
        (_by_head(counts[..., 0], 3), _by_head(at_most(indices, blocks - 1), 4))
        for counts, indices in ((count, partial), (full_count, first_full + place))
    ]


def _by_head(x: Tensor, dimensions: int) -> Tensor:
    """int32, with sizes of 1 for batch and heads where there are none."""
    x = x.to(torch.int32)
    return x if x.dim() == dimensions else x[None, None]


@dataclass(frozen=True)
class _Band:
    """The states of the blocks in each row's interval.

    ``states`` is ``(batch, heads, r, width)`` with EMPTY, PARTIAL or FULL; ``columns`` is
    ``(..., r, width)``, the block that each state belongs to; both integer.
    """

    states: Tensor
    columns: Tensor


def _exact_lists(
    grid: Grid, device: torch.device | str, kept: Tensor, full_width: bool
) -> tuple[Tensor, ...]:
    """As ``block_lists``, with each block's state exactly as the mask makes it."""
    wide, (some, every) = grid.widths(), kept_blocks(kept, grid.keys.block)
    of_queries, of_keys = grid.intervals(device)
    across = _band(of_queries, grid.keys.blocks, wide[0])
    down = _band(of_keys, grid.queries.blocks, wide[1])
    here = (at_columns(x, across.columns) for x in (some, every))
    across, down = _with_keys(across, *here), _with_keys(down, some[..., None], every[..., None])
    lists = []
    for band, blocks in ((across, grid.keys.blocks), (down, grid.queries.blocks)):
        for count, indices in (_listed(band, PARTIAL), _listed(band, FULL)):
            more = blocks - indices.shape[-1] if full_width else 0
            lists += [count, F.pad(indices, (0, more))]
    return tuple(map(written_out, lists))


def _band(intervals: Intervals, blocks: int, width: int) -> _Band:
    column = intervals.first[..., None] + torch.arange(width, device=intervals.first.device)
    touched = column <= intervals.last[..., None]
    full = (intervals.first_full[..., None] <= column) & (column <= intervals.last_full[..., None])
    states = touched.to(torch.int32) + (touched & full).to(torch.int32)
    return _Band(states if states.dim() == 4 else states[None, None], at_most(column, blocks - 1))


def _with_keys(band: _Band, some: Tensor, every: Tensor) -> _Band:
    states = torch.where(every, band.states, at_most(band.states, PARTIAL))
    return _Band(torch.where(some, states, EMPTY), band.columns)


def _listed(band: _Band, state: int) -> tuple[Tensor, Tensor]:
    """The blocks in ``state``: counts ``(batch, heads, r)`` and indices, first in each row."""
    chosen = band.states == state
    width = chosen.shape[-1]
    rank = chosen.cumsum(-1) - 1
    # Blocks in other states are written to one column past the end, which is cut off.
    target = torch.where(chosen, rank, width)
    indices = torch.zeros(*chosen.shape[:-1], width + 1, dtype=torch.int32, device=chosen.device)
    columns = band.columns.to(torch.int32).expand(chosen.shape)
    return chosen.sum(-1, dtype=torch.int32), indices.scatter(-1, target, columns)[..., :width]
