"""The bias in a score_mod, over all that a kernel scores: whole blocks, hidden pairs among them."""

from dataclasses import asdict

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import windows

from flexlocal.masks import Window
from flexlocal.mods.bias import added, bias_place, with_margin


def scored(rule, n, block):
    """(queries, keys) of every pair in blocks that hold a visible pair, by the plain rule."""
    visible = rule.mask(n)
    blocks = visible.unflatten(0, (-1, block)).unflatten(2, (-1, block)).any(3).any(1)
    whole = blocks.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return whole.nonzero(as_tuple=True), visible


@given(windows(), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 4), st.booleans())
def test_bias_of_all_pairs_that_a_kernel_scores(rule, block, blocks, margin):
    """The right entry for each visible pair, and no look-up beyond the table for any other."""
    n, b, f = block * blocks, rule.look_backward, rule.ahead
    window = Window(**asdict(rule))
    bias = torch.arange(2 * rule.size * window.span, dtype=torch.float64) + 1
    bias = bias.view(2, rule.size, window.span)
    (query, key), visible = scored(rule, n, block)
    wide = window.block_margin(block) if margin else None
    table = with_margin(bias, wide) if wide is not None else bias
    add = added(table, bias_place(window, 3, 2, wide)).value
    for head in range(3):
        batch = torch.tensor(1)
        # Beyond the table this raises; in a negative place it would read another row unseen.
        found = add(
            torch.zeros(len(query), dtype=bias.dtype), batch, torch.tensor(head), query, key
        )
        start = (query // rule.size - b) * rule.size
        seen = visible[query, key]
        expected = bias[(3 + head) % 2, query[seen] % rule.size, (key - start)[seen]]
        assert torch.equal(found[seen], expected)
    assert window.span == (1 + b + f) * rule.size


@given(windows(), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 6))
def test_the_margin_reaches_every_key_of_a_block(rule, block, blocks):
    window = Window(**asdict(rule))
    (query, key), _ = scored(rule, block * blocks, block)
    column = key - (query // rule.size - rule.look_backward) * rule.size
    margin = window.block_margin(block)
    assert (column >= -margin).all()
    assert (column < window.span + margin).all()
