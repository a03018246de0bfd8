"""`LocalCache` by itself: its memory, what empties it, what takes tokens back, what it refuses."""

import pytest
import torch

from flexlocal import LocalAttention, LocalCache, Window, explain, local_attention

SLIDING = Window.sliding(7)


def cache_of(window=SLIDING, batch=2, kv_heads=3, head_size=4, **more):
    more = {"dtype": torch.float64, "device": "cpu", **more}
    return LocalCache(window, batch, kv_heads, head_size, **more)


def tokens(n, batch=2, heads=3, head_size=4, dtype=torch.float64):
    return torch.randn(3, batch, heads, n, head_size, dtype=dtype)


def write(cache, n=1, **more):
    return local_attention(*tokens(n), cache.window, cache=cache, **more)


@pytest.mark.parametrize(
    ("window", "slots"),
    [
        (Window.sliding(7), 7),
        (Window.sliding(1), 1),
        (Window(4, True, 2, 0, True), 9),
        (Window(4, True, 2, 0, False), 12),
        (Window.chunked(5), 5),
    ],
)
def test_memory_is_that_of_a_window(window, slots):
    cache = cache_of(window, v_head_size=6, dtype=torch.bfloat16)
    assert cache.slots == slots
    numbers = 2 * (3 * slots * (4 + 6) * 2 + slots * 4 + 2 * 4 + 8)  # in bytes, for two rows
    assert cache.nbytes == numbers
    assert cache_of(window, rewindable=3).slots == slots + 3


@pytest.mark.slow
def test_memory_does_not_grow():
    window = Window.sliding(256)
    cache = cache_of(window, batch=1, kv_heads=1)
    q, k, v = tokens(20_000, batch=1, heads=1)
    memory = [cache.keys, cache.values, cache.positions, cache.lengths]
    places = [x.data_ptr() for x in memory]
    kept = []
    with torch.no_grad():
        for token in range(20_000):
            new = [x[:, :, token : token + 1] for x in (q, k, v)]
            out = local_attention(*new, window, cache=cache)
            if token % 1000 == 999:
                kept.append(out)
        whole = local_attention(q, k, v, window, backend="eager")[:, :, 999::1000]
    torch.testing.assert_close(torch.cat(kept, dim=2), whole)
    assert places == [
        x.data_ptr() for x in (cache.keys, cache.values, cache.positions, cache.lengths)
    ]
    assert cache.nbytes == sum(x.untyped_storage().nbytes() for x in memory) + 12


@pytest.mark.parametrize("rows", [1, [1], torch.tensor([1]), torch.tensor([False, True])])
def test_reset_forgets_rows(rows):
    cache = cache_of()
    write(cache, 9)
    kept = cache.keys[0].clone()
    cache.reset(rows)
    assert cache.lengths.tolist() == [9, 0]
    assert torch.equal(cache.keys[0], kept)
    assert not cache.keys[1].any() and not cache.values[1].any()
    q, k, v = tokens(1)
    out = local_attention(q, k, v, SLIDING, cache=cache)
    assert torch.equal(out[1], v[1])  # it sees itself alone
    assert not torch.equal(out[0], v[0])


def test_reset_forgets_a_row_of_nans():
    cache = cache_of()
    nan = tokens(9)
    nan[:, 1] = torch.nan
    local_attention(*nan, SLIDING, cache=cache)
    cache.reset()
    assert write(cache).isfinite().all()


def test_rewind_goes_back_as_far_as_it_was_made_for():
    cache = cache_of(rewindable=2)
    write(cache, 9)
    cache.rewind(2)
    assert cache.lengths.tolist() == [7, 7]
    with pytest.raises(ValueError, match="tokens must be at least 0, and leave each row"):
        cache.rewind(1)
    write(cache, 1)
    with pytest.raises(ValueError, match="less rewindable, 2"):
        cache.rewind(torch.tensor([2, 0]))
    cache.rewind(torch.tensor([1, 0]))
    assert cache.lengths.tolist() == [7, 8]


def test_a_cache_made_in_inference_mode_serves_outside():
    with torch.inference_mode():
        cache = cache_of()
        write(cache, 3)
    write(cache, 2)
    with torch.inference_mode():
        write(cache, 1)
    assert cache.lengths.tolist() == [6, 6]


def test_bounds_of_a_row_that_writes_nothing():
    cache = cache_of()
    kept = torch.tensor([[True, False, True], [False, False, False]])
    out = write(cache, 3, mask=kept)
    assert cache.lengths.tolist() == [2, 0]
    assert not out[1].any() and not out[0][:, 1].any()


def test_explain_says_the_path_and_writes_nothing():
    cache = cache_of()
    for n in (1, 30):
        choice = explain(*tokens(n), SLIDING, cache=cache)
        assert choice.backend == "eager" and "on cpu" in choice.reason
    assert cache.lengths.tolist() == [0, 0]
    layer = LocalAttention(6, causal=True, exact_windowsize=True).eval()
    assert layer.explain(*tokens(1), cache=cache).backend == "eager"


def test_autocast_writes_its_dtype():
    cache = cache_of(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out = local_attention(*tokens(3, dtype=torch.float32), SLIDING, cache=cache)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"window": Window(4)}, ValueError, "window must be causal for a cache"),
        ({"window": 4}, TypeError, "window must be a Window, got 4 of type int"),
        ({"batch": 0}, ValueError, "batch must be at least 1, got 0"),
        ({"kv_heads": 2.0}, TypeError, "kv_heads must be an int"),
        ({"head_size": 0}, ValueError, "head_size must be"),
        ({"v_head_size": -1}, ValueError, "v_head_size must be"),
        ({"rewindable": -1}, ValueError, "rewindable must be"),
        ({"dtype": torch.int64}, ValueError, "dtype must be a floating-point dtype"),
    ],
)
def test_a_cache_refuses(more, error, words):
    with pytest.raises(error, match=words):
        cache_of(**more)


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"cache": {}}, TypeError, "cache must be a LocalCache or None, got type dict"),
        ({"window": Window.sliding(6)}, ValueError, "cache must have the window"),
        ({"documents": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, "documents must be None"),
        ({"q_offset": 5}, ValueError, "q_offset must be None with a cache"),
        ({"dropout": 0.5}, ValueError, "dropout must be 0 with a cache, got 0.5"),
        ({"k": tokens(1, heads=1)[1]}, ValueError, r"k must have the shape \(2, 3, 1, 4\)"),
        ({"q": tokens(2)[0]}, ValueError, "k must have q's length 2"),
        ({"mask": torch.ones(1, 1, dtype=torch.bool)}, ValueError, "mask must have a row for each"),
        ({"mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, "mask must have the shape"),
        ({"q": tokens(1)[0].requires_grad_()}, ValueError, "torch.no_grad()"),
        ({"sinks": torch.zeros(4)}, ValueError, "sinks must have the shape"),
        ({"attn_bias": torch.zeros(3, 6, 6)}, ValueError, "attn_bias must have the shape"),
        ({"softcap": -1.0}, ValueError, "softcap must be"),
    ],
)
def test_a_call_with_a_cache_refuses(more, error, words):
    q, k, v = tokens(1)
    call = {"q": q, "k": k, "v": v, "window": SLIDING, "cache": cache_of(), **more}
    if call["k"] is not k:
        call["v"] = call["k"]
        call["q"] = call["q"][:, :1]
    with pytest.raises(error, match=words):
        local_attention(**call)
    if isinstance(call["cache"], LocalCache):
        assert call["cache"].lengths.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda cache: cache.rewind(1), ValueError, "tokens must be at most rewindable, 0"),
        (lambda cache: cache.rewind(-1), ValueError, "tokens must be at least 0"),
        (lambda cache: cache.rewind(0.5), TypeError, "tokens must be an int"),
        (lambda cache: cache.rewind(torch.zeros(3).long()), ValueError, "tokens must be an int or"),
        (lambda cache: cache.reset(5), IndexError, "out of"),
        (lambda cache: cache.reset(torch.ones(3).bool()), ValueError, "rows must be of shape"),
        (lambda cache: cache.reset(0.5), ValueError, "rows must be"),
    ],
)
def test_what_changes_a_cache_refuses(call, error, words):
    with pytest.raises(error, match=words):
        call(cache_of())
