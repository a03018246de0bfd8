"""``mask``, ``attention_map``, ``explain``: what the layer would do, before it does it."""

from inspect import signature

import oracle
import pytest
import torch
from hypothesis import given, settings
from strategies import EXAMPLES, cases

from flexlocal import (
    LocalAttention,
    Window,
    attention_map,
    explain,
    local_attention,
    local_attention_varlen,
)


@settings(max_examples=2 * EXAMPLES)
@given(cases())
def test_the_mask_is_the_one_that_attention_uses(case):
    call = case.tensors()
    layer = LocalAttention(**case.arguments(), backend="eager")
    key_mask = None if call.mask is None else call.mask[0]
    found = layer.mask(case.n, key_mask=key_mask, window_size=case.override).dense()
    expected = oracle.dense_mask(case.n, case.W, **case.window.letters)
    assert torch.equal(found, expected if key_mask is None else expected & key_mask)


@settings(max_examples=3 * EXAMPLES)
@given(cases())
def test_the_weights_are_the_oracles(case):
    call = case.tensors()
    layer = LocalAttention(**case.arguments(), backend="eager")
    named = {case.mask_name: call.mask, "attn_bias": call.bias, "window_size": case.override}
    dense = layer.attention_map(call.q, call.k, dense=True, **named)
    expected = oracle.weights(
        call.q, call.k, case.window.size,
        causal=case.window.causal, look_backward=case.window.look_backward,
        look_forward=case.window.look_forward, exact=case.window.exact, scale=case.scale,
        shared_qk=case.shared_qk, rotary=case.rotary, xpos=case.xpos, base=case.base,
        bias=call.bias, mask=call.mask, override=case.override,
    )  # fmt: skip
    assert dense.shape == (*call.q.shape[:-1], case.n)
    # rotary's tables are fp32
    assert torch.allclose(dense, expected, rtol=0, atol=2e-5 if case.rotary else 1e-12)

    windowed = layer.attention_map(call.q, call.k, **named)
    window = Window(case.W, case.window.causal, case.window.look_backward, case.window.look_forward)
    assert windowed.shape == (*call.q.shape[:-1], window.span)
    for i in range(case.n):
        for column in range(window.span):
            key = (i // case.W - window.look_backward) * case.W + column
            value = dense[..., i, key] if 0 <= key < case.n else torch.zeros(())
            assert torch.equal(windowed[..., i, column], value.expand(windowed.shape[:-2]))


def test_the_output_is_the_weights_times_the_values():
    layer = LocalAttention(8, causal=True, dim=6, dropout=0.5).eval()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 32, size, generator=generator) for size in (6, 6, 5))
    assert torch.allclose(layer.attention_map(q, k, dense=True) @ v, layer(q, k, v), atol=1e-6)


def test_what_a_hidden_key_holds_reaches_no_weight():
    layer = LocalAttention(8, causal=True)
    q, k = torch.randn(2, 2, 16, 4).unbind()
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[:, 3] = False
    clean = layer.attention_map(q, k, mask=mask)
    k[:, 3] = torch.nan
    assert torch.equal(layer.attention_map(q, k, mask=mask), clean)


def test_dropout_is_left_out():
    layer = LocalAttention(8, dropout=0.5)
    q, k = torch.randn(2, 16, 4).unbind()
    assert torch.allclose(layer.attention_map(q, k).sum(-1), torch.ones(16))


def test_gradients_flow_through_the_map():
    q, k = torch.randn(2, 9, 4, dtype=torch.float64).unbind()
    q, k = q.requires_grad_(), k.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: attention_map(*x, Window(3)), (q, k))
    assert torch.autograd.gradcheck(lambda *x: attention_map(*x, Window(3), dense=True), (q, k))


def test_grouped_keys_and_low_precision():
    layer = LocalAttention(5, dropout=0.0)
    q, k = torch.randn(3, 4, 10, 6), torch.randn(3, 2, 10, 6)
    grouped = layer.attention_map(q, k)
    assert torch.allclose(grouped, layer.attention_map(q, k.repeat_interleave(2, dim=1)))
    assert layer.attention_map(q.bfloat16(), k.bfloat16()).dtype == torch.float32


def test_long_sequences_keep_to_their_windows():
    layer = LocalAttention(16, causal=True)
    q, k = torch.randn(2, 2**14, 4).unbind()
    assert layer.attention_map(q, k).shape == (2**14, 32)
    with pytest.raises(ValueError, match="dense must be False for q of length 16384"):
        layer.attention_map(q, k, dense=True)


def test_errors_are_those_of_the_call():
    layer = LocalAttention(8)
    q = torch.zeros(12, 4)
    with pytest.raises(ValueError, match="multiple of window_size 8"):
        layer.attention_map(q, q)
    with pytest.raises(ValueError, match="mask must be boolean"):
        layer.attention_map(q[:8], q[:8], torch.ones(1, 8))
    with pytest.raises(ValueError, match=r"attn_bias must have the shape \(heads, 8, 24\)"):
        layer.attention_map(q[:8], q[:8], attn_bias=torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="window_size must be None"):
        layer.attention_map(q[:8], q[:8], window_size=4)
    with pytest.raises(ValueError, match="n must be a multiple of window_size 8.*got 12"):
        layer.mask(12)
    with pytest.raises(ValueError, match="window_size must be None"):
        layer.mask(8, window_size=4)
    with pytest.raises(TypeError, match="n must be an int"):
        layer.mask(8.0)
    assert LocalAttention(8, autopad=True).mask(12).n == 12


@pytest.mark.parametrize(
    ("explains", "calls"),
    [(explain, local_attention), (LocalAttention.explain, LocalAttention.forward)],
)
def test_explain_takes_what_a_call_takes(explains, calls):
    # An exporter's surplus is refused, and what other ranks hold decides no path.
    taken = [name for name in signature(calls).parameters if name not in ("surplus", "lengths")]
    asked = [name for name in signature(explains).parameters if name != "cu_seqlens"]
    assert asked == taken


def test_explain_takes_what_varlen_takes():
    taken = signature(local_attention_varlen).parameters
    assert set(taken) <= set(signature(explain).parameters)


def test_explain_judges_what_a_call_would():
    layer, q = LocalAttention(4), torch.zeros(8, 4)
    assert layer.explain(q, dropout_seed=torch.tensor(1)).backend == "eager"
    with pytest.raises(ValueError, match="dropout_seed must be a 0-d int64 tensor"):
        layer.explain(q, dropout_seed=torch.tensor(1.0))


def test_a_printed_layer_shows_its_settings():
    given = {"dim": 8, "use_xpos": True, "autopad": True, "shared_qk": True, "scale": 0.0}
    given |= {"dropout": 0.3, "backend": "flex", "kernel_options": {"BLOCK_M": 64}}
    for name, value in given.items():
        base = {"xpos_scale_base": 3} | ({"dim": 8} if name == "use_xpos" else {})
        assert repr(LocalAttention(4, **base, **{name: value})) != repr(LocalAttention(4, **base))
