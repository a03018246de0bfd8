"""Shared queries and keys: a token is its own key only when it sees no other."""

from dataclasses import asdict

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import windows

from flexlocal.masks import Segments, Window, but_itself_mod, itself_last, mask_mod


def expected(visible):
    """(n, n) booleans: the visible keys without the diagonal, unless nothing else is left."""
    others = visible & ~torch.eye(len(visible), dtype=torch.bool)
    return torch.where(others.any(1, keepdim=True), others, visible)


@given(windows(), st.integers(1, 40), st.none() | st.integers(1, 3))
def test_by_the_window_alone(rule, n, windows_each):
    window = Window(**asdict(rule))
    layout = window if windows_each is None else Segments(window, windows_each, n)
    slots = n if windows_each is None else layout.key_slots(n)
    query, slot = torch.arange(n)[:, None], torch.arange(slots)
    visible = but_itself_mod(layout, window, n)(0, 0, query, slot)
    # Kernels leave keys out that are not there, and slots of other segments.
    visible &= mask_mod(layout)(0, 0, query, slot)
    seen = torch.zeros(n, n, dtype=torch.bool)
    key = layout.key_position(query, slot).expand_as(visible)
    seen[query.expand_as(visible)[visible], key[visible]] = True
    assert visible.sum() == seen.sum()
    assert torch.equal(seen, expected(rule.mask(n)))


def test_the_score_of_a_token_with_itself():
    score = torch.randn(12, 12)
    window, token = Window(4, causal=True, look_backward=0), torch.arange(12)
    found = itself_last(window, window, 12)(score, 0, 0, token[:, None], token)
    first = token % 4 == 0  # of its window, sees nothing else
    own = torch.where(first, 0.0, -5e4)
    assert torch.equal(found, score.diagonal_scatter(own))
