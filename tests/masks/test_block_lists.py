"""The lists of blocks that kernels get: what they name, and whether they have gaps."""

from dataclasses import asdict

import oracle
import pytest
import torch
from block_grids import blocks_that_keep, listed
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import EXAMPLES, windows

from flexlocal.masks import KeyLayout, Window
from flexlocal.masks import block_lists as listing
from flexlocal.masks.block_intervals import Grid, Side
from flexlocal.masks.block_lists import lists_have_gaps

block_sizes = st.integers(1, 16)


def block_lists(rule, lengths, sizes, *more, **options):
    """The lists of a rule for kernels, on the CPU."""
    queries, keys = (Side(length, size) for length, size in zip(lengths, sizes, strict=True))
    return listing.block_lists(Grid(rule, queries, keys), "cpu", *more, **options)


def laid_out(rule, n, windows_each):
    """The window itself, or xpos's layout of it, with its number of key slots."""
    window = Window(**asdict(rule))
    if windows_each is None:
        return window, n
    layout = KeyLayout(window, windows_each, n)
    return layout, layout.all_slots


@settings(max_examples=6 * EXAMPLES)
@given(
    windows(), st.integers(1, 90), st.none() | st.integers(1, 5), st.integers(1, 8), st.booleans()
)
def test_lists_without_gaps(rule, n, windows_each, block, one_list):
    """Kernels that are told so take each block's neighbour for the next one of the list."""
    layout, slots = laid_out(rule, n, windows_each)
    lists = block_lists(layout, (n, slots), (block, block), one_list=one_list)
    assert len(lists) == (4 if one_list else 8)
    gaps = False
    for counts, indices in zip(lists[::2], lists[1::2], strict=True):
        for count, row in zip(counts[0, 0].tolist(), indices[0, 0], strict=True):
            gaps |= bool((row[:count].diff() != 1).any())
    assert not gaps or (not one_list and lists_have_gaps(layout, (n, slots), block))


@pytest.mark.parametrize("size", [128, 256, 96])
@pytest.mark.parametrize("n", [1024, 1000])
@pytest.mark.parametrize("exact", [False, True])
def test_where_lists_have_no_gaps(size, n, exact):
    """It would be safe to say that there are always some, and slow."""
    window = Window(size, causal=True, exact=exact)
    whole = n % 128 == 0 and size % 128 == 0 and not exact
    assert lists_have_gaps(window, (n, n), 128) is not whole


def grids(lists, batch, head, rows, columns, one_list):
    """The partial and the full blocks (rows, columns) that each side of ``block_lists`` names."""
    for side in range(2):
        shape = (columns, rows) if side else (rows, columns)
        each = 2 if one_list else 4
        partial, *full = (
            listed(count[batch, head], indices[batch, head], *shape)
            for count, indices in zip(
                lists[side * each : (side + 1) * each : 2],
                lists[side * each + 1 : (side + 1) * each : 2],
                strict=True,
            )
        )
        full = full[0] if full else torch.zeros_like(partial)
        assert not (partial & full).any(), "a block is both partial and full"
        yield (partial.T, full.T) if side else (partial, full)


@settings(max_examples=EXAMPLES)
@given(windows(), st.integers(1, 60), block_sizes)
def test_one_list_names_what_two_name(rule, n, block):
    window, rows = Window(**asdict(rule)), -(-n // block)
    two, one = (
        grids(
            block_lists(window, (n, n), (block, block), one_list=one_list),
            *(0, 0, rows, rows),
            one_list,
        )
        for one_list in (False, True)
    )
    for (partial, full), (every, none) in zip(two, one, strict=True):
        assert torch.equal(partial | full, every)
        assert not none.any()


def from_the_first(chosen):
    """The places of each row from its first chosen one on."""
    return chosen.cumsum(1) > 0


def to_the_last(chosen):
    """The places of each row up to its last chosen one."""
    return from_the_first(chosen.flip(1)).flip(1)


def longest_run(chosen):
    """How many neighbours are chosen in each row at most."""
    length = best = torch.zeros(len(chosen), dtype=torch.long)
    for column in chosen.long().unbind(1):
        length = (length + 1) * column
        best = torch.maximum(best, length)
    return best


@settings(max_examples=3 * EXAMPLES)
@given(
    windows(),
    st.integers(1, 90),
    block_sizes,
    block_sizes,
    st.sampled_from(["after", "before", "both", "scattered"]),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_lists_of_kernels_with_a_key_mask(rule, n, query_block, key_block, where, one_list, seed):
    """Nothing that a query sees is left out, nothing that it does not see is full."""
    generator = torch.Generator().manual_seed(seed)
    place, (low, high) = torch.arange(n), sorted(torch.randint(n + 1, (2,), generator=generator))
    kept = {
        "after": place < low,
        "before": place >= low,
        "both": (place >= low) & (place < high),
        "scattered": torch.rand(n, generator=generator) < 0.9,
    }[where]
    kept = torch.stack([kept, torch.ones_like(kept)])[:, None]  # batch, heads
    sizes, rows, columns = (query_block, key_block), -(-n // query_block), -(-n // key_block)
    window = Window(**asdict(rule))
    lists = block_lists(window, (n, n), sizes, kept, one_list=one_list)
    assert len(lists) == (4 if one_list else 8)
    plain = oracle.block_states(rule.mask(n), *sizes)
    for batch in range(2):
        states = oracle.block_states(rule.mask(n) & kept[batch], *sizes)
        some = (plain > 0) & blocks_that_keep(kept, key_block)[batch, 0]
        # From the first to the last block that keeps a key; a key block is listed or not.
        between = from_the_first(some) & to_the_last(some)
        for side, (partial, full) in enumerate(grids(lists, batch, 0, rows, columns, one_list)):
            named = partial | full
            assert torch.equal(named, some if side else between)
            assert not (full & (states != 2)).any()
            if one_list:
                assert not full.any()
            elif side or batch or where in ("after", "before"):
                assert torch.equal(full, states == 2)
            else:  # the blocks before the first hole, or those after the last
                count = full.sum(1)
                assert torch.equal(count, longest_run(full)), "they are neighbours"
                whole = plain == 2
                holed = whole & (states != 2)
                before = (whole & ~from_the_first(holed)).sum(1)
                after = (whole & ~to_the_last(holed)).sum(1)
                assert torch.equal(count, torch.maximum(before, after))
