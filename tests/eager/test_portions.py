"""The eager path works in portions; their size must make no difference to what comes out."""

from unittest.mock import patch

import placed
import pytest
import torch
from budget import gradients
from eager_cases import check_case, layer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases

from flexlocal import LocalAttention, Window, attention_map, local_attention
from flexlocal.eager import attend as eager
from flexlocal.eager import autograd

PORTIONS = st.sampled_from([1, 100, 700, 3000, 20000])
"""Scores at a time: one tile of one head, some tiles, a head, some batch entries, all at once."""


def portions_of(scores):
    return patch.object(autograd, "_SCORES_ON_CPU", scores)


@settings(max_examples=120)
@given(case=cases(), scores=PORTIONS)
def test_outputs_and_gradients(case, scores):
    with portions_of(scores):
        check_case(case, torch.float32)


@settings(max_examples=40)
@given(case=placed.placed(), scores=PORTIONS)
def test_outputs_and_gradients_at_positions_of_their_own(case, scores):
    with portions_of(scores):
        placed.check(case, backend="eager")


@settings(max_examples=30)
@given(case=cases(), scores=PORTIONS)
def test_dropout_drops_the_same(case, scores):
    call = case.tensors(torch.float64)
    layer = layer_of(case)
    layer.dropout.p = 0.4
    found = []
    for at_a_time in (scores, 2**20):
        torch.manual_seed(0)
        with portions_of(at_a_time):
            out = case.run(layer, call)
            found.append((out, *gradients(out, call).values()))
    for some, all_at_once in zip(*found, strict=True):
        torch.testing.assert_close(some, all_at_once, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lead_and_length", [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
def test_nothing_in_nothing_out(lead_and_length):
    """No batch entries, no heads or no tokens are no portions."""
    x = torch.randn(*lead_and_length, 6, requires_grad=True)
    layer = LocalAttention(4, dropout=0.0)
    batch, _, n = lead_and_length
    mask = torch.ones(batch, n, dtype=torch.bool)
    assert layer(x, x, x, mask=mask).shape == x.shape
    if not batch:
        assert layer(x[:, 0], x[:, 0], x[:, 0], mask=mask).numel() == 0
    assert layer(x[0] if batch else x, *[x[0] if batch else x] * 2, mask=mask[:1]).numel() == 0
    out = layer(x, x, x)
    assert out.shape == x.shape
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("n", [10, 64, 150, 300])
@pytest.mark.parametrize("causal", [True, False])
def test_a_look_beyond_the_sequence_costs_nothing(n, causal, monkeypatch):
    """On each side of a tile lie no more keys than the sequence has."""
    spans, as_it_is = [], eager.formula_of
    note = lambda *of: spans.append(of[3].span) or as_it_is(*of)  # noqa: E731
    monkeypatch.setattr(eager, "formula_of", note)
    q, k, v = (torch.randn(1, 2, n, size, requires_grad=True) for size in (4, 4, 5))
    bias = torch.randn(2, 32, 32 * (201 if causal else 401))
    found = []
    for looks in (200, 10):
        some = {"look_backward": looks, "look_forward": 0 if causal else looks}
        start, stop = 32 * (200 - looks), 32 * (201 if causal else 201 + looks)
        for near in (None, bias[..., start:stop]):
            window = Window(32, causal=causal, **some)
            out = local_attention(q, k, v, window, attn_bias=near)
            weights = attention_map(q, k, window, attn_bias=near, dense=True)
            found.append((out, weights, *torch.autograd.grad(out.sum(), (q, k, v))))
    for far, near in zip(found[:2], found[2:], strict=True):
        for one, other in zip(far, near, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert max(spans) < 2 * n + 64
