"""Padding is a query too: NaN or inf there must not reach the gradients of real tokens.

Nor, as a key, what a processor computes in inference, where padding is not always cleared.
"""

from functools import partial

import pytest
import torch
from features import PLAIN, feature

from flexlocal import LocalAttention, Window, local_attention
from flexlocal.eager import attend

CASE = feature("mask", n=150)
REAL = torch.arange(150) < torch.tensor([[90], [150]])  # the first entry is padded on the right


def results(run, poison, **more):
    """Output and gradients of real tokens, whose loss leaves padding out."""
    call = CASE.tensors(torch.float32)
    padding = ~REAL[:, None, :, None]
    q, k, v = (
        x.detach().masked_fill(padding, poison).requires_grad_() for x in (call.q, call.k, call.v)
    )
    bias = torch.randn(3, 32, 96, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out = run(q, k, v, mask=REAL, attn_bias=bias, **more)
    loss = (out * call.cotangent).masked_fill(padding, 0.0).sum()
    return out.masked_fill(padding, 0.0), *torch.autograd.grad(loss, (q, k, v, bias))


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("poison", [torch.nan, -torch.inf])
def test_no_gradient_of_a_real_token(poison, rotary):
    """tests/flex/test_fused_gradients.py has the same of the flex path."""
    run = LocalAttention(**{**CASE.arguments(), "dim": CASE.d if rotary else None})
    poisoned, clean = results(run, poison), results(run, 0.0)
    for found, expected in zip(poisoned, clean, strict=True):
        assert expected.isfinite().all() and expected.any()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_nor_of_a_log_sum_exp_nor_of_a_map():
    """With sinks, which have a gradient of their own."""
    found = []
    for poison in (torch.nan, 0.0):
        q, k = (
            torch.randn(2, 3, 20, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
        )
        keep = torch.arange(20) < torch.tensor([[9], [20]])
        q, k = (x.masked_fill(~keep[:, None, :, None], poison).requires_grad_() for x in (q, k))
        sinks = torch.zeros(3, requires_grad=True)
        out, lse = local_attention(q, k, k, Window(4), mask=keep, sinks=sinks, return_lse=True)
        loss = (out.sum(-1) + lse).masked_fill(~keep[:, None], 0.0).sum()
        found.append(torch.autograd.grad(loss, (q, k, sinks)))
        layer = LocalAttention(4, autopad=True)
        weights = layer.attention_map(q, k, mask=keep).masked_fill(~keep[:, None, :, None], 0.0)
        found[-1] += torch.autograd.grad(weights.square().sum(), (q, k))
    for poisoned, clean in zip(*found, strict=True):
        assert clean.isfinite().all() and clean.any()
        torch.testing.assert_close(poisoned, clean)


def test_a_finite_query_of_padding_is_computed_as_ever():
    """The mask hides keys: what such a query sees is not zeros."""
    call, keep = PLAIN.tensors(torch.float32), torch.zeros(2, 384, dtype=torch.bool)
    keep[:, 0] = True
    out = LocalAttention(128, causal=True, dropout=0.0)(call.q, call.k, call.v, mask=keep)
    torch.testing.assert_close(out[:, :, 5], call.v[:, :, 0])


@pytest.mark.parametrize("n_keys", [20, 24])
def test_queries_that_stand_elsewhere_are_not_the_mask_s(n_keys):
    """At an offset the mask says nothing of queries: a NaN is theirs to show."""
    q, k = torch.randn(1, 1, 20, 8, requires_grad=True), torch.randn(1, 1, n_keys, 8)
    q = q.index_fill(2, torch.tensor([3]), torch.nan)
    keep = torch.ones(1, n_keys, dtype=torch.bool)
    keep[:, 3] = False
    out = local_attention(q, k, k, Window(4), mask=keep, q_offset=n_keys - 16)
    assert out[..., 3, :].isnan().all() and out[..., 4:, :].isfinite().all()


@pytest.mark.parametrize("more", [{}, {"softcap": 30.0}], ids=["the kernel", "tiles"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 3e38, 1e25])
@pytest.mark.parametrize("place", ["k", "v"])
def test_inference_reads_no_padding_that_does_harm(place, poison, more):
    """Nor finite padding whose products with a query are not."""
    tensors = {name: torch.randn(3, 2, 30, 8) for name in "qkv"}
    mask = torch.arange(30) < torch.tensor([30, 17, 0])[:, None]
    tensors["q"][0, 0, 0] = 1e15
    call = partial(local_attention, window=Window(8), mask=mask, backend="eager", **more)
    expected = call(**tensors)
    tensors[place].transpose(0, 1)[:, ~mask] = poison
    found = call(**tensors)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("poisoned", [False, True])
def test_inference_clears_no_padding_in_vain(poisoned, monkeypatch):
    cleared, as_it_is = [], attend.without_padding
    noted = lambda *given: cleared.append(given) or as_it_is(*given)  # noqa: E731
    monkeypatch.setattr(attend, "without_padding", noted)
    q, k, v = (torch.randn(2, 3, 30, 8) for _ in range(3))
    mask = torch.arange(30)[None] < 17
    if poisoned:
        v[:, :, 20] = torch.nan
    local_attention(q, k, v, Window(8), mask=mask, backend="eager")
    assert len(cleared) == 2 * poisoned
