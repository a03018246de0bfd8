"""One token a row on a processor: the slice of the ring it sees, against a mask over the ring."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from flexlocal import LocalCache, Rotary, Window, explain, local_attention, step


@st.composite
def stories(draw):
    """A cache, how many tokens each row has at first, and what comes then: tokens taken back."""
    window = Window(
        draw(st.integers(1, 9)),
        causal=True,
        look_backward=draw(st.integers(0, 2)),
        look_forward=0,
        exact=draw(st.booleans()),
    )
    batch, kv_heads, groups = draw(st.tuples(*[st.integers(1, 3)] * 3))
    rewindable = draw(st.integers(0, 2))
    lengths = draw(st.lists(st.integers(1, 40), min_size=batch, max_size=batch))
    if draw(st.booleans()):
        lengths = lengths[:1] * batch
    back = draw(st.lists(st.integers(0, rewindable), min_size=1, max_size=8))
    return window, kv_heads, groups, rewindable, lengths, back


def told(story, rotary):
    """The outputs of a story, and its cache."""
    window, kv_heads, groups, rewindable, lengths, back = story
    batch, generator = len(lengths), torch.Generator().manual_seed(7)
    cache = LocalCache(
        window, batch, kv_heads, 6, v_head_size=5, dtype=torch.float64, device="cpu",
        rewindable=rewindable,
    )  # fmt: skip

    def write(n, mask=None):
        sizes = (kv_heads * groups, 6), (kv_heads, 6), (kv_heads, 5)
        q, k, v = (
            torch.randn(batch, heads, n, size, generator=generator, dtype=torch.float64)
            for heads, size in sizes
        )
        return local_attention(q, k, v, window, mask=mask, cache=cache, rotary=rotary)

    n = max(lengths)
    write(n, torch.arange(n) < torch.tensor(lengths)[:, None])
    outs, taken = [], 0  # tokens taken back since the longest
    for tokens in back:
        outs.append(write(1))
        taken = max(0, taken - 1)
        tokens = min(tokens, rewindable - taken)
        cache.rewind(tokens)
        taken += tokens
    return outs, cache


@given(stories(), st.booleans())
def test_the_same_as_under_a_mask(story, rotates):
    rotary = Rotary(6).double() if rotates else None
    outs, cache = told(story, rotary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "slice_of", lambda *call: None)
        others, other = told(story, rotary)
    for ours, true in zip(outs, others, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-9)
    for name in ("keys", "values", "positions", "lengths"):
        assert torch.equal(getattr(cache, name), getattr(other, name))


@pytest.mark.parametrize("heads", [2, 6])
def test_in_16_bits(heads):
    window = Window.sliding(9)
    cache = LocalCache(window, 3, 2, 8, v_head_size=4, dtype=torch.bfloat16, device="cpu")
    q, k, v = (
        torch.randn(3, x, 20, d, dtype=torch.bfloat16) for x, d in ((heads, 8), (2, 8), (2, 4))
    )
    outs = [
        local_attention(*(x[:, :, i : i + 1] for x in (q, k, v)), window, cache=cache)
        for i in range(20)
    ]
    true = local_attention(q.double(), k.double(), v.double(), window)
    torch.testing.assert_close(torch.cat(outs, dim=2).double(), true, rtol=2e-2, atol=2e-2)


def served(cache, batch=2, n=1, **more):
    """Whether a call is one of a slice, as `explain` says before it."""
    q, k, v = torch.randn(3, batch, 2, n, 4)
    said = explain(q, k, v, cache.window, cache=cache, **more).reason
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        attend = step.attend
        patch.setattr(step, "attend", lambda *call: seen.append(call) or attend(*call))
        local_attention(q, k, v, cache.window, cache=cache, **more)
    assert said.endswith("; a slice of the ring, without a mask") == bool(seen)
    return bool(seen)


def test_which_calls_they_are():
    window = Window.sliding(5)
    cache = LocalCache(window, 2, 2, 4, dtype=torch.float32, device="cpu")
    assert all(served(cache) for _ in range(12))  # before the ring is full and after it
    assert served(cache, rotary=Rotary(4))
    assert served(cache, backend="eager")
    assert not served(cache, n=2)
    assert not served(cache, softcap=2.0)
    assert not served(cache, sinks=torch.zeros(2))
    assert not served(cache, attn_bias=torch.zeros(2, window.size, window.span))
    assert not served(cache, shared_qk=True)
    assert not served(cache, return_lse=True)
    assert not served(cache, mask=torch.tensor([[True], [False]]))
    assert served(cache)  # of rows whose lengths differ now, with all slots seen in each


def test_no_number_is_looked_at_where_operators_are_recorded():
    """Whatever calls of the kind did before."""
    cache = LocalCache(Window.sliding(5), 2, 2, 4, dtype=torch.float32, device="cpu")
    assert served(cache)
    with FlopCounterMode(display=False):
        assert not served(cache)
    assert served(cache)


def test_slots_that_close_the_ring_are_no_slice():
    cache = LocalCache(Window.sliding(4), 1, 2, 4, dtype=torch.float32, device="cpu", rewindable=2)
    found = [served(cache, batch=1) for _ in range(12)]
    assert found == [True] * 6 + [False] * 3 + [True] * 3
    rows = LocalCache(Window.sliding(4), 2, 2, 4, dtype=torch.float32, device="cpu")
    assert not served(rows, mask=torch.tensor([[True], [False]]))
    assert not served(rows)  # the rows have one key and none before this one
