"""Attentions over different keys as one."""

import math

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexlocal import Window, local_attention, merge_attention


def dense(q, k, v, hidden):
    """Output and log-sum-exp of dense attention, by definition."""
    scores = (q @ k.mT).masked_fill(hidden, -math.inf)
    blind = hidden.all(-1)
    weights = scores.masked_fill(blind[..., None], 0.0).softmax(-1)
    out = (weights @ v).masked_fill(blind[..., None], 0.0)
    return out, scores.logsumexp(-1)


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**16))
def test_it_is_attention_over_both(n, first, second, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, length, size, generator=generator, dtype=torch.float64, requires_grad=True)
        for length, size in ((n, 4), (first + second, 4), (first + second, 3))
    )
    hidden = torch.rand(2, n, first + second, generator=generator) < 0.6
    parts = (slice(0, first), slice(first, None))
    (out_a, lse_a), (out_b, lse_b) = (
        dense(q, k[:, part], v[:, part], hidden[..., part]) for part in parts
    )
    found, expected = merge_attention(out_a, lse_a, out_b, lse_b), dense(q, k, v, hidden)
    for ours, true in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, true)
    seen = ~hidden.all(-1)
    grads = [
        torch.autograd.grad(out.sum() + lse[seen].sum(), (q, k, v))
        for out, lse in (found, expected)
    ]
    for ours, true in zip(*grads, strict=True):
        torch.testing.assert_close(ours, true)


def test_global_tokens():
    """The first tokens besides a window, as in StreamingLLM."""
    q, k, v = (torch.randn(2, 3, 50, size, dtype=torch.float64) for size in (8, 8, 5))
    window, first = Window.sliding(9), 4
    local = local_attention(
        q, k, v, window, mask=(torch.arange(50) >= first)[None], return_lse=True
    )
    there = torch.arange(50)[:, None] < torch.arange(first)
    ours, _ = merge_attention(*local, *dense(q / 8**0.5, k[:, :, :first], v[:, :, :first], there))
    seen = oracle.dense_mask(50, 8, causal=True, exact=True)
    seen[:, :first] = ~there
    expected, _ = dense(q / 8**0.5, k, v, ~seen)
    torch.testing.assert_close(ours, expected)


def test_half_precision_is_merged_in_float32():
    out, lse = torch.randn(5, 3).bfloat16(), torch.randn(5)
    merged, total = merge_attention(out, lse, out, lse)
    assert merged.dtype == torch.bfloat16 and total.dtype == torch.float32
    assert torch.equal(merged, out)
    torch.testing.assert_close(total, lse + math.log(2))


@pytest.mark.parametrize(
    ("place", "wrong", "says"),
    [
        (0, 3.0, "out_a must be a tensor, got type float"),
        (0, torch.randn(5), r"out_a must have the shape \(\*lead, n, d_v\), got \(5,\)"),
        (1, torch.randn(2, 5), r"lse_a must have the shape \(4, 5\), got \(2, 5\)"),
        (2, torch.randn(4, 5, 2), r"out_b must have the shape \(4, 5, 3\), got \(4, 5, 2\)"),
        (3, torch.zeros(4, 5, dtype=torch.long), "lse_b must be of a floating-point dtype, got"),
        (3, torch.empty(4, 5, device="meta"), "lse_b must be on out_a's device cpu, got meta"),
    ],
)
def test_what_does_not_fit_is_refused(place, wrong, says):
    arguments = [torch.randn(4, 5, 3), torch.randn(4, 5), torch.randn(4, 5, 3), torch.randn(4, 5)]
    arguments[place] = wrong
    with pytest.raises((ValueError, TypeError), match=f"^{says}"):
        merge_attention(*arguments)


@pytest.mark.parametrize("n", [30, 83])
def test_the_recipe_of_global_tokens(n):
    """A window over all but the first tokens, and these for everyone: disjoint keys."""
    first = 4
    q, k, v = (torch.randn(2, 3, n, size, dtype=torch.float64) for size in (8, 8, 5))
    others = (torch.arange(n) >= first)[None]
    near = local_attention(q, k, v, Window.sliding(9), mask=others, return_lse=True)
    everyones = local_attention(
        q, k[:, :, :first], v[:, :, :first], Window.chunked(n), q_offset=0, return_lse=True
    )
    ours, lse = merge_attention(*near, *everyones)
    seen = oracle.dense_mask(n, 8, causal=True, exact=True)
    seen[:, :first] = torch.arange(n)[:, None] >= torch.arange(first)
    expected, sums = dense(q / 8**0.5, k, v, ~seen)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(lse, sums)


def test_the_recipe_of_dilated_windows():
    apart, keys, n = 3, 5, 60
    q, k, v = (torch.randn(2, 4, n, size, dtype=torch.float64) for size in (8, 8, 5))
    cut = [x.unflatten(2, (n // apart, apart)).transpose(2, 3) for x in (q, k, v)]
    found = local_attention(*cut, Window.sliding(keys)).transpose(2, 3).flatten(2, 3)
    back = torch.arange(n)[:, None] - torch.arange(n)
    seen = (back >= 0) & (back % apart == 0) & (back < keys * apart)
    expected, _ = dense(q / 8**0.5, k, v, ~seen)
    torch.testing.assert_close(found, expected)
