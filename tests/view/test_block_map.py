"""Block maps against the states of every block, counted in the brute-force mask."""

import oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import drawing, masks, read_text
from strategies import EXAMPLES

from flexlocal.masks import block_mask, inspect
from flexlocal.masks.view.symbols import BLOCKS, TOKENS


def block_grid(picture):
    """The three states, and the empty blocks that may be partial: those with a kept key."""
    seen = picture.dense()
    expected = oracle.block_states(seen, *picture.block_size)
    cautious = torch.zeros_like(expected, dtype=torch.bool)
    if picture.key_mask is not None:
        whole = oracle.dense_mask(
            picture.n, picture.rule.size, causal=picture.rule.causal,
            b=picture.rule.look_backward, f=picture.rule.ahead, exact=picture.rule.exact,
        )  # fmt: skip
        kept = oracle.block_states(picture.key_mask.expand(picture.n, -1), *picture.block_size) > 0
        cautious = (expected == 0) & kept & (oracle.block_states(whole, *picture.block_size) > 0)
    return expected, cautious


@settings(max_examples=3 * EXAMPLES)
@given(masks(longest=60), st.integers(1, 16), st.integers(1, 16))
def test_block_map_is_the_block_states(mask, query_block, key_block):
    window, n, key_mask, *_ = mask
    picture = inspect(window, n, key_mask=key_mask, block_size=(query_block, key_block))
    expected, cautious = block_grid(picture)
    states = picture.blocks.states()
    assert torch.equal(torch.where(cautious & (states == 1), 0, states), expected)
    assert picture.blocks.count() == tuple(int((states == x).sum()) for x in range(3))

    text = picture.blocks.text(color=False, plain=True, cells=64)
    assert [row for _, row in read_text(text, BLOCKS, plain=True)] == states.tolist()
    assert "not the mask" in text and not any(kind.plain in text for kind in TOKENS[2:])


@given(masks(longest=40), st.integers(2, 16), st.integers(2, 16))
def test_html_of_a_block_map_is_its_states(mask, query_block, key_block):
    window, n, key_mask, *_ = mask
    picture = inspect(window, n, key_mask=key_mask, block_size=(query_block, key_block))
    states = picture.blocks.states()
    names = {kind.name: i for i, kind in enumerate(BLOCKS)}
    tiles = [
        (int(float(x.get("y"))), int(float(x.get("x"))), names[x.get("class")])
        for x in drawing(picture.blocks.html(), "blocks").iter("rect")
        if x.get("class") in names
    ]
    rows, columns = states.shape
    assert sorted(tiles) == [(r, c, int(states[r, c])) for r in range(rows) for c in range(columns)]


@given(masks(longest=60), st.integers(1, 6), st.integers(1, 5))
def test_block_maps_of_many_blocks_are_grouped(mask, block, step):
    window, n, key_mask, *_ = mask
    blocks = inspect(window, n, key_mask=key_mask, block_size=block).blocks
    fine, grouped = blocks.states(), blocks.states(step)
    for r, row in enumerate(grouped.tolist()):
        for c, state in enumerate(row):
            part = fine[r * step : (r + 1) * step, c * step : (c + 1) * step]
            assert state == (0 if (part == 0).all() else 2 if (part == 2).all() else 1)


@given(masks(longest=60), st.integers(1, 16))
def test_bytes_of_the_block_mask(mask, block):
    window, n, *_ = mask
    lists = [
        "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
        "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
    ]  # fmt: skip
    built = block_mask(window, n, n, block_size=block)
    size = sum(x.numel() * x.element_size() for x in (getattr(built, name) for name in lists))
    assert inspect(window, n, block_size=block).describe().block_mask_bytes == size
