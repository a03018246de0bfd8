"""Presets: the windows of real models against the masks that their own sources write down."""

import pytest
import torch

from flexlocal.masks import PRESETS, Window, inspect, preset


def tril(q, kv, diagonal):
    """Whether ``torch.tril`` keeps the place, as in masks made of ones."""
    return kv - q <= diagonal


# name: (keys that a query sees at most, whether it sees one), as the source writes it
SOURCES = {
    # its own window of 512 up to itself, and one window before
    "documented-default": (
        1024,
        lambda q, kv: kv <= q and kv // 512 in (q // 512, q // 512 - 1),
    ),
    # local_attn_chunk_length=64, local_num_chunks_before=1, local_num_chunks_after=0, is_decoder
    "reformer": (128, lambda q, kv: q >= kv and 0 <= q // 64 - kv // 64 <= 1),
    # chunked_overlay: kv_idx // chunk_size == q_idx // chunk_size, and causal
    "llama-4": (8192, lambda q, kv: kv <= q and kv // 8192 == q // 8192),
    # sliding_window_overlay: kv_idx > q_idx - sliding_window, and causal
    "mistral-7b": (4096, lambda q, kv: kv > q - 4096 and kv <= q),
    # create_sliding_mask: cache_positions > positions - sliding_window_size, and causal
    "gemma-2": (4096, lambda q, kv: kv > q - 4096 and kv < q + 4096 and kv <= q),
    "gemma-3": (1024, lambda q, kv: kv > q - 1024 and kv < q + 1024 and kv <= q),
    "gemma-3-1b": (512, lambda q, kv: kv > q - 512 and kv < q + 512 and kv <= q),
    # triu(diagonal=1) is hidden, and tril(diagonal=-sliding_window)
    "gpt-oss": (128, lambda q, kv: kv - q < 1 and not tril(q, kv, -128)),
    # bias = tril(ones); bias ^ tril(bias, -window_size)
    "gpt-neo": (256, lambda q, kv: tril(q, kv, 0) != (tril(q, kv, 0) and tril(q, kv, -256))),
    # window_overlap * 2 + 1 columns, window_overlap = attention_window // 2
    "longformer": (512 // 2 * 2 + 1, lambda q, kv: abs(kv - q) <= 512 // 2),
    # abs(relative_position_ids) < block_len, block_len = local_radius + 1
    "longt5": (2 * 127 + 1, lambda q, kv: abs(kv - q) < 127 + 1),
    # abs(q_idx - kv_idx) <= sliding_window, sliding_window = local_attention // 2
    "modernbert": (2 * (128 // 2) + 1, lambda q, kv: abs(q - kv) <= 128 // 2),
}


def test_every_preset_has_its_source_here():
    assert PRESETS.keys() == SOURCES.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_the_keys_are_the_sources(name):
    most, _ = SOURCES[name]
    found = preset(name)
    assert found.keys == most == found.window.most_seen
    n = 4 * found.window.span
    assert inspect(found.window, n).describe().most_keys == most


@pytest.mark.parametrize("name", PRESETS)
def test_each_query_sees_what_the_source_says(name):
    """Queries at both sides of every edge of a window, far from the ends, and at the start."""
    _, seen = SOURCES[name]
    window = preset(name).window
    chunk = window.size + 1 if window.exact else window.size
    edges = [k * chunk for k in range(5)]
    queries = sorted({q for edge in edges for q in (edge - 1, edge, edge + 1) if q >= 0})
    n = max(queries) + 2 * window.span
    first, last = (x.tolist() for x in window.keys(0, 0, torch.tensor(queries)))
    for q, low, high in zip(queries, first, last, strict=True):
        around = range(max(0, q - 2 * window.span), min(n, q + 2 * window.span))
        expected = [kv for kv in around if seen(q, kv)]
        assert (max(low, 0), min(high, n - 1)) == (expected[0], expected[-1]), q
        assert len(expected) == expected[-1] - expected[0] + 1


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_its_source_and_its_count(name):
    found = preset(name)
    text = str(found)
    assert found.name == name and f"{found.keys} keys at most" in text
    assert found.sources and all(x.startswith("https://") and x in text for x in found.sources)
    assert found.window.words in text
    assert len(found.convention) > 30


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="preset must be one of documented-default, .*got 'x'"):
        preset("x")


def test_the_off_by_one_of_exact_windows_is_the_documented_one():
    """The page of the documented layer promises 512 keys; its code and ours give 513."""
    window = Window(512, causal=True, exact=True)
    assert inspect(window, 4096).describe().most_keys == 513
    assert "513" in preset("documented-default").convention
