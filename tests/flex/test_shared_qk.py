"""Shared queries and keys: a token is its own key only when it sees no other."""

import math
from dataclasses import asdict

import oracle
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import windows

from flexlocal.masks import KeyLayout, Window, mask_mod
from flexlocal.mods.shared_qk import (
    SELF_SCORE_OF_KERNELS,
    but_itself_mod,
    ends_alone,
    itself_last,
)


def expected(visible):
    """(n, n) booleans: the visible keys without the diagonal, unless nothing else is left."""
    others = visible & ~torch.eye(len(visible), dtype=torch.bool)
    return torch.where(others.any(1, keepdim=True), others, visible)


@given(windows(), st.integers(1, 40), st.none() | st.integers(1, 3))
def test_by_the_window_alone(rule, n, windows_each):
    window = Window(**asdict(rule))
    layout = window if windows_each is None else KeyLayout(window, windows_each, n)
    slots = n if windows_each is None else layout.all_slots
    query, slot = torch.arange(n)[:, None], torch.arange(slots)
    visible = but_itself_mod(layout, n, ends_alone(window, n))(0, 0, query, slot)
    # Kernels leave keys out that are not there, and slots of other segments.
    visible &= mask_mod(layout)(0, 0, query, slot)
    seen = torch.zeros(n, n, dtype=torch.bool)
    key = layout.seen_position(0, 0, query, slot).expand_as(visible)
    seen[query.expand_as(visible)[visible], key[visible]] = True
    assert visible.sum() == seen.sum()
    assert torch.equal(seen, expected(rule.mask(n)))


def test_the_score_of_a_token_with_itself():
    score, token = torch.randn(12, 12), torch.arange(12)
    found = itself_last(Window(4, causal=True)).value(score, 0, 0, token[:, None], token)
    own = found.diagonal()
    assert torch.equal(found, score.diagonal_scatter(own))
    torch.testing.assert_close(own, torch.full((12,), oracle.SELF_SCORE), rtol=1e-4, atol=0)


def test_a_key_that_is_seen_alone_weighs_one_in_a_kernel():
    """Which rounds the score in base 2 for the log-sum-exp, but may not round what it subtracts."""
    log2_e = torch.tensor(1.44269504, dtype=torch.float32)  # as FlexAttention's templates have it
    own = torch.tensor(SELF_SCORE_OF_KERNELS, dtype=torch.float32)
    assert own.item() == SELF_SCORE_OF_KERNELS
    total = own * log2_e
    weight = torch.exp2(own.double() * log2_e.double() - total.double())
    assert abs(weight.item() - 1) < torch.finfo(torch.float32).eps / 4
    assert total * math.log(2) == own  # dropout takes the log-sum-exp to base e
