"""Documents in a row and parts of a sequence, through what users call."""

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import EXAMPLES, windows

from flexlocal import (
    LocalAttention,
    LocalCache,
    Rotary,
    Window,
    explain,
    local_attention,
    local_attention_varlen,
)
from flexlocal.masks import documents_from_cu_seqlens

W = Window(7, causal=True)
RULES = {
    "standing": W,
    "both ways": Window(5),
    "sliding": Window.sliding(9),
    "sliding both ways": Window.left_right(4, 6),
}


def tensors(n, dtype=torch.float64, heads=4, kv_heads=2, batch=2):
    sizes = ((heads, 8), (kv_heads, 8), (kv_heads, 5))
    return [torch.randn(batch, h, n, d, dtype=dtype, requires_grad=True) for h, d in sizes]


def differentiated(out, inputs):
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return out, *torch.autograd.grad((out * cotangent).sum(), inputs)


MORE = {
    "plain": {},
    "rotary": {"rotary": Rotary(8)},
    "xpos": {"rotary": Rotary(8, True, 6.0)},
    "bias": {},
    "shared_qk": {"shared_qk": True},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("more", MORE)
def test_documents_are_calls_of_their_own(rule, more):
    lengths = [13, 1, 40, 7, 22]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = inputs = tensors(sum(lengths), torch.float32)
    arguments = dict(MORE[more])
    if more == "bias":
        arguments["attn_bias"] = torch.randn(4, rule.size, rule.span)
    documents = documents_from_cu_seqlens(cu, sum(lengths))
    packed = local_attention(q, k, v, rule, documents=documents, **arguments)
    alone = [
        local_attention(*(x[:, :, start:stop] for x in inputs), rule, **arguments)
        for start, stop in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)
    ]
    ours, theirs = (differentiated(x, inputs) for x in (packed, torch.cat(alone, dim=2)))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=4e-6)


def test_varlen_is_packing_without_a_batch():
    lengths = [9, 0, 30, 4]
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    total = sum(lengths) + 3  # tokens past the last document
    q, k, v = (torch.randn(total, h, d, dtype=torch.float64) for h, d in ((4, 8), (2, 8), (2, 5)))
    out, lse = local_attention_varlen(q, k, v, W, cu, softcap=2.0, return_lse=True)
    assert out.shape == (total, 4, 5) and lse.shape == (4, total)
    torch.testing.assert_close(local_attention_varlen(q, k, v, W, cu, softcap=2.0), out)
    for start, stop in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        one = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        expected, sums = oracle.attend(*one, 7, causal=True, softcap=2.0, lse=True)
        torch.testing.assert_close(out[start:stop], expected[0].transpose(0, 1))
        torch.testing.assert_close(lse[:, start:stop], sums[0])
    assert not out[-3:].any() and (lse[:, -3:] == -math.inf).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.randn(2, 9, 2, 8)}, r"q must have the shape \(total, heads, d\), got \(2, 9"),
        ({"k": [1]}, "k must be a tensor, got type list"),
        ({"cu_seqlens": [0, 9]}, "cu_seqlens must be a tensor, got type list"),
        ({"cu_seqlens": torch.tensor([0.0, 9.0])}, "cu_seqlens must be of an integer dtype"),
        (
            {"cu_seqlens": torch.tensor([[0, 9]])},
            r"cu_seqlens must have the shape \(documents \+ 1,\), got \(1, 2\)",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 9], device="meta")},
            "cu_seqlens must be on q's device",
        ),
    ],
)
def test_what_varlen_refuses(change, says):
    x = torch.randn(9, 2, 8)
    call = {"q": x, "k": x, "v": x, "window": W, "cu_seqlens": torch.tensor([0, 9])}
    with pytest.raises((ValueError, TypeError), match=f"^{says}"):
        local_attention_varlen(**{**call, **change})
    with pytest.raises((ValueError, TypeError), match=f"^{says}"):
        explain(**{**call, **change})


def test_what_is_told_of_varlen():
    x = torch.randn(9, 2, 8)
    call = {"q": x, "k": x, "v": x, "window": W, "cu_seqlens": torch.tensor([0, 9])}
    assert explain(**call).backend == "eager"
    with pytest.raises(ValueError, match="^documents must be None where cu_seqlens gives them"):
        explain(**call, documents=torch.zeros(9).long())
    with pytest.raises(ValueError, match="^cu_seqlens must be None with a cache"):
        explain(**call, cache=LocalCache(W, 1, 2, 8, dtype=torch.float32, device="cpu"))


@settings(max_examples=EXAMPLES)
@given(windows(), st.integers(1, 60), st.data())
def test_a_part_of_the_queries_drops_what_the_whole_call_drops(rule, n, data):
    window = Window(rule.size, rule.causal, rule.look_backward, rule.look_forward, rule.exact)
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    first = data.draw(st.integers(0, max(0, start - window.before - window.size)))
    q, k, v = tensors(n)
    dropped = {"dropout": 0.4, "dropout_seed": torch.tensor(3)}
    whole = local_attention(q, k, v, window, **dropped)
    offsets = {"q_offset": start, "kv_offset": first}
    if data.draw(st.booleans()):
        offsets = {name: torch.tensor([x, x]) for name, x in offsets.items()}
    part = local_attention(
        q[:, :, start:stop], k[:, :, first:], v[:, :, first:], window, **dropped, **offsets
    )
    torch.testing.assert_close(part, whole[:, :, start:stop])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rows_with_padding_on_the_left_are_rows_alone(rule):
    q, k, v = tensors(31)
    padding = torch.tensor([4, 11])
    rotary = Rotary(8)
    found = local_attention(q, k, v, rule, rotary=rotary, q_offset=-padding, kv_offset=-padding)
    for row, pad in enumerate(padding.tolist()):
        alone = (x[row, :, pad:] for x in (q, k, v))
        q_row, k_row, v_row = (x[None] for x in alone)
        expected = local_attention(q_row, k_row, v_row, rule, rotary=rotary)[0]
        torch.testing.assert_close(found[row, :, pad:], expected)
        assert not found[row, :, :pad].any()


def test_few_queries_cost_what_their_window_costs(monkeypatch):
    """No operator of the eager path is given as many tokens as there are keys."""
    layer = LocalAttention(16, causal=True, dim=8, dropout=0.0, backend="eager")
    n, m = 3, 4096
    q, k, v = (torch.randn(1, 2, length, 8) for length in (n, m, m))
    for offset in (m - n, torch.tensor([m - n])):
        with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
            found = layer(q, k, v, q_offset=offset)
        views = (
            "slice",
            "narrow",
            "expand",
            "gather",
            "select",
            "as_strided",
            "unsqueeze",
            "alias",
        )
        wide = {
            event.name
            for event in profile.events()
            for shape in event.input_shapes
            if m in shape and not any(view in event.name for view in views)
        }
        assert not wide, f"took all keys: {sorted(wide)}"
        expected = layer(F.pad(q, (0, 0, m - n, 0)), k, v)[:, :, -n:]
        torch.testing.assert_close(found, expected)


def test_a_layer_takes_what_the_function_takes():
    layer = LocalAttention(
        8, causal=True, dim=8, dropout=0.0, softcap=3.0, theta=500.0, backend="eager"
    )
    q, k, v = (torch.randn(2, 3, 21, size) for size in (8, 8, 5))  # no multiple of the window
    sinks, documents = torch.randn(3), torch.arange(21) // 8
    more = {"sinks": sinks, "documents": documents, "return_lse": True}
    found = layer(q, k, v, **more)
    rotary = Rotary(8, theta=500.0)
    expected = local_attention(
        q, k, v, Window(8, causal=True), softcap=3.0, rotary=rotary, backend="eager", **more
    )
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert str(layer.explain(q, **more)).startswith("eager: asked for by name; documents are calls")
    offset = {"q_offset": 16, "kv_offset": 3}
    part = layer(q[:, :, :5], k, v, **offset)
    assert part.shape == (2, 3, 5, 5)
    assert layer.mask(5, n_keys=21, **offset).query(0).startswith("query 0 sees 9 keys: 5 to 13")
    assert "softcap=3.0" in repr(layer)
    assert "theta=500.0" in repr(layer)
