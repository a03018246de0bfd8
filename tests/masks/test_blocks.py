"""Block masks: the three states of every block, recovered from both lists, against brute force.

Neither `BlockMask.to_dense()` nor eager flex_attention can tell a full block from a partial one,
so that the lists themselves are read.
"""

from dataclasses import asdict

import oracle
import pytest
import rules
import torch
from block_grids import blocks_that_keep, listed
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import EXAMPLES, windows
from torch.nn.attention.flex_attention import create_block_mask

from flexlocal.masks import Window, block_mask, mask_mod

LISTS = [
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
]


def states(found, batch, head, rows, columns, transposed):
    """(rows, columns): 0 empty, 1 partial, 2 full; the key side's lists when transposed."""
    names = LISTS[4:] if transposed else LISTS[:4]
    number, indices, full_number, full_indices = (getattr(found, x)[batch, head] for x in names)
    shape = (columns, rows) if transposed else (rows, columns)
    partial = listed(number, indices, *shape)
    full = listed(full_number, full_indices, *shape)
    assert not (partial & full).any(), "a block is both partial and full"
    grid = partial.long() + 2 * full.long()
    return grid.T if transposed else grid


def check(found, masks, query_block, key_block, cautious=None):
    """masks (batch, heads, n_queries, n_keys): the tokens that the block mask must stand for.

    cautious: booleans (batch, heads, rows, columns), the empty blocks that may be listed as
    partial, which costs time but changes no result.
    """
    assert tuple(found.BLOCK_SIZE) == (query_block, key_block)
    assert tuple(found.shape) == tuple(masks.shape)
    for name in LISTS:
        assert getattr(found, name).dtype == torch.int32, name
        assert getattr(found, name).shape[:2] == masks.shape[:2], name
    for batch, heads in enumerate(masks):
        for head, mask in enumerate(heads):
            expected = oracle.block_states(mask, query_block, key_block)
            for transposed in (False, True):
                grid = states(found, batch, head, *expected.shape, transposed)
                if cautious is not None:
                    grid[cautious[batch, head] & (grid == 1)] = 0
                assert torch.equal(grid, expected), f"transposed={transposed}\n{grid}\n{expected}"


def tokens_of(found):
    """The dense mask that the block mask's own mask_mod stands for."""
    batch, heads, n_queries, n_keys = found.shape
    ranges = (torch.arange(x) for x in (batch, heads, n_queries, n_keys))
    b, h, i, j = torch.meshgrid(*ranges, indexing="ij")
    return found.mask_mod(b, h, i, j)


block_sizes = st.integers(1, 16)


@settings(max_examples=9 * EXAMPLES)
@given(windows(), st.integers(1, 60), block_sizes, block_sizes)
def test_three_states(rule, n, query_block, key_block):
    found = block_mask(Window(**asdict(rule)), n, n, block_size=(query_block, key_block))
    check(found, rule.mask(n)[None, None], query_block, key_block)


@settings(max_examples=2 * EXAMPLES)
@given(windows(), st.integers(1, 50), st.integers(1, 50), block_sizes, block_sizes)
def test_three_states_when_queries_and_keys_differ_in_number(rule, n, m, query_block, key_block):
    found = block_mask(Window(**asdict(rule)), n, m, block_size=(query_block, key_block))
    check(found, rule.mask(n, m)[None, None], query_block, key_block)


@settings(max_examples=3 * EXAMPLES)
@given(
    windows(),
    st.integers(1, 50),
    block_sizes,
    block_sizes,
    st.integers(1, 3),
    st.none() | st.integers(1, 3),
    st.sampled_from([0.0, 0.5, 0.9, 0.97, 1.0]),
    st.integers(0, 2**16),
)
def test_three_states_with_a_key_mask(rule, n, query_block, key_block, batch, heads, share, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, n) if heads is None else (batch, heads, n)
    key_mask = torch.rand(shape, generator=generator) < share
    key_mask[0] = key_mask[0] | (torch.arange(n) < n // 2)  # a run of kept keys: full blocks
    found = block_mask(
        Window(**asdict(rule)), n, n, block_size=(query_block, key_block), key_mask=key_mask
    )
    by_head = key_mask[:, None] if heads is None else key_mask
    masks = rule.mask(n)[None, None] & by_head[:, :, None, :]
    # Blocks with a kept key may stay partial though the window's part of them is hidden.
    kept = blocks_that_keep(by_head, key_block)
    empty = torch.stack(
        [
            torch.stack([oracle.block_states(mask, query_block, key_block) for mask in heads]) == 0
            for heads in masks
        ]
    )
    cautious = empty & kept[:, :, None, :]
    cautious &= oracle.block_states(rule.mask(n), query_block, key_block) > 0
    check(found, masks, query_block, key_block, cautious)
    assert torch.equal(tokens_of(found), masks), "its mask_mod must hide the same keys"


@settings(max_examples=EXAMPLES)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=4),
    st.integers(1, 50),
    block_sizes,
    block_sizes,
    st.booleans(),
    st.integers(0, 2**16),
)
def test_three_states_of_a_rule_that_differs_by_entry(back, n, query_block, key_block, hide, seed):
    """A rule that this folder's package knows nothing of, whose numbers are in a tensor."""
    back = torch.tensor(back)
    rule, masks = rules.WindowOfEachEntry(back, 20), rules.visible_of_entries(back, n)
    key_mask = cautious = None
    if hide:
        key_mask = torch.rand(len(back), n, generator=torch.Generator().manual_seed(seed)) < 0.8
        plain = masks
        masks = masks & key_mask[:, None, None, :]
        kept = blocks_that_keep(key_mask[:, None], key_block)
        touched, empty = (
            torch.stack(
                [torch.stack([oracle.block_states(m, query_block, key_block) for m in heads])
                 for heads in which]
            )
            for which in (plain, masks)
        )  # fmt: skip
        cautious = (touched > 0) & (empty == 0) & kept[:, :, None, :]
    found = block_mask(
        rule,
        n,
        n,
        block_size=(query_block, key_block),
        key_mask=key_mask,
        entries=(len(back), 1),
    )
    check(found, masks, query_block, key_block, cautious)
    assert torch.equal(tokens_of(found), masks)


@given(st.integers(0, 6), st.integers(1, 4), st.integers(1, 40), block_sizes, block_sizes)
def test_three_states_of_a_rule_that_differs_by_head(step, heads, n, query_block, key_block):
    rule, masks = rules.WiderByHead(step, heads), rules.visible_by_head(step, heads, n)
    sizes = (query_block, key_block)
    found = block_mask(rule, n, n, block_size=sizes, entries=(1, heads))
    check(found, masks, *sizes)
    assert torch.equal(tokens_of(found), masks)


@given(windows(), st.integers(1, 60), st.sampled_from([(4, 4), (8, 2), (2, 16), (3, 5)]))
def test_lists_of_torch(rule, n, block_size):
    """The slow, dense builder of torch gives the same lists."""
    rule = Window(**asdict(rule))
    ours = block_mask(rule, n, n, block_size=block_size)
    theirs = create_block_mask(mask_mod(rule), 1, 1, n, n, device="cpu", BLOCK_SIZE=block_size)
    rows, columns = -(-n // block_size[0]), -(-n // block_size[1])
    for transposed in (False, True):
        a, b = (states(x, 0, 0, rows, columns, transposed) for x in (ours, theirs))
        assert torch.equal(a, b)
    assert torch.equal(tokens_of(ours), tokens_of(theirs))


def test_default_block_size():
    """One number stands for both sides, and 128 is the default."""
    n = 300
    rule = Window(96)
    mask = oracle.dense_mask(n, 96)[None, None]
    check(block_mask(rule, n, n), mask, 128, 128)
    check(block_mask(rule, n, n, block_size=64), mask, 64, 64)


@pytest.mark.parametrize("causal", [False, True])
def test_a_million_tokens_are_cheap(causal):
    """The lists are as narrow as the band: a full grid of int32 would be 256 MiB each."""
    n, W, block = 2**20, 256, 128
    found = block_mask(Window(W, causal=causal, exact=True), n, n)
    lists = [getattr(found, name) for name in LISTS]
    assert all(x.dtype == torch.int32 for x in lists)
    assert sum(x.untyped_storage().nbytes() for x in lists) < 64 * 2**20

    # the last row and the last column, token by token
    last = n // block - 1
    letters = {"causal": causal, "b": 1, "f": 0 if causal else 1, "exact": True}
    grid = {}
    for other in range(last - 5, last + 1):
        for row, column in {(last, other), (other, last)}:
            seen = sum(
                oracle.visible(i, j, n, W, **letters)
                for i in range(row * block, (row + 1) * block)
                for j in range(column * block, (column + 1) * block)
            )
            grid[row, column] = 0 if seen == 0 else 2 if seen == block * block else 1
    for names, where in ((LISTS[:4], 0), (LISTS[4:], 1)):
        number, indices, full_number, full_indices = (getattr(found, x)[0, 0, last] for x in names)
        partial = indices[:number].tolist()
        full = full_indices[:full_number].tolist()
        assert partial == sorted(
            key[1 - where] for key, state in grid.items() if key[where] == last and state == 1
        )
        assert full == sorted(
            key[1 - where] for key, state in grid.items() if key[where] == last and state == 2
        )


@pytest.mark.parametrize(
    ("sizes", "more", "kind", "says"),
    [
        ((0, 8), {}, ValueError, "n_queries must be at least 1, got 0"),
        ((8, 2.0), {}, TypeError, "n_keys must be an int, got 2.0"),
        ((8, 8), {"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ((8, 8), {"block_size": (4, "4")}, TypeError, "block_size must be an int, got '4'"),
        ((8, 8), {"key_mask": torch.ones(8).bool()}, ValueError, r"key_mask .*batch.* \(8,\)"),
        ((8, 8), {"key_mask": torch.ones(1, 8)}, ValueError, "key_mask must be boolean.*float32"),
        ((8, 8), {"key_mask": torch.ones(1, 7).bool()}, ValueError, "key_mask .*n_keys 8.* 7"),
    ],
    ids=str,
)
def test_errors(sizes, more, kind, says):
    with pytest.raises(kind, match=says):
        block_mask(Window(4), *sizes, **more)


def test_device_is_the_one_asked_for():
    found = block_mask(Window(8), 32, 32, block_size=16, device="meta")
    assert {getattr(found, name).device.type for name in LISTS} == {"meta"}
