"""Descriptions: every number counted by brute force, and a million tokens described in little."""

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import EXAMPLES, windows

from flexlocal import LocalAttention
from flexlocal.masks import Window, inspect

ROOT = Path(__file__).parents[2]


@settings(max_examples=4 * EXAMPLES)
@given(
    windows(),
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(1, 16),
    st.integers(1, 16),
    st.integers(1, 99),
)
def test_every_number_is_counted(rule, n, m, query_block, key_block, head_size):
    found = inspect(
        Window(**asdict(rule)),
        n,
        n_keys=m,
        block_size=(query_block, key_block),
        head_size=head_size,
    ).describe()
    seen = rule.mask(n, m)
    per_query = seen.sum(1)
    states = oracle.block_states(seen, query_block, key_block)
    needed, visited = int(seen.sum()), int((states > 0).sum())
    computed = visited * query_block * key_block

    assert (found.queries, found.keys) == (n, m)
    assert (found.least_keys, found.most_keys) == (int(per_query.min()), int(per_query.max()))
    assert found.mean_keys == pytest.approx(needed / n, rel=1e-12)
    assert found.blind_queries == int((per_query == 0).sum())
    assert found.scores == needed
    assert found.share == pytest.approx(needed / (n * m), rel=1e-12)
    assert (found.empty_blocks, found.partial_blocks, found.full_blocks) == tuple(
        int((states == state).sum()) for state in range(3)
    )
    assert found.computed == computed
    assert found.waste == pytest.approx(computed / needed if needed else 1.0, rel=1e-12)
    assert found.flops == needed * head_size * 4
    assert found.computed_flops == computed * head_size * 4
    assert found.dense_mask_bytes == n * m
    assert any("no key" in line for line in found.advice) == bool((per_query == 0).any())


@settings(max_examples=2 * EXAMPLES)
@given(windows(), st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 16))
def test_hidden_keys_are_not_counted(rule, keep, block):
    key_mask = torch.tensor(keep)
    n = len(keep)
    seen = rule.mask(n) & key_mask
    found = inspect(Window(**asdict(rule)), n, key_mask=key_mask, block_size=block).describe()
    per_query = seen.sum(1)
    assert found.scores == int(seen.sum())
    assert (found.least_keys, found.most_keys) == (int(per_query.min()), int(per_query.max()))
    assert found.blind_queries == int((per_query == 0).sum())
    assert found.full_blocks == int((oracle.block_states(seen, block, block) == 2).sum())
    if found.scores == 0:
        assert found.waste in (1.0, float("inf"))


def test_the_text_says_the_numbers():
    found = inspect(Window(5, causal=True), 20, block_size=4, head_size=16).describe()
    text = str(found)
    for words in (
        "window_5_back_1_forward_0_causal, 20 queries, 20 keys",
        "a query sees at most 10 keys",
        "1 least, 10 most, 6.75 mean",
        "135, 33.8% of 20 x 20",
        "13 empty, 10 partial, 2 full, of 25 with 4 x 4 tokens",
        "192, 1.42 per score needed",
        "8.64 kFLOP needed, 12.3 kFLOP computed, forward, per head of 16",
        "(a dense one: 400 B)",
    ):
        assert words in text


def test_a_notebook_shows_the_numbers_as_a_table():
    found = inspect(Window(4), 8, key_mask=torch.arange(8) < 0).describe()
    shown = ElementTree.fromstring(found._repr_html_())
    cells = ["".join(x.itertext()) for tag in ("th", "td") for x in shown.iter(tag)]
    names, values = cells[: len(cells) // 2], cells[len(cells) // 2 :]
    assert list(zip(names, values, strict=True)) == [
        *found.rows(), *(("advice", line) for line in found.advice)
    ]  # fmt: skip
    assert found.advice and shown.find("h3").text == found.words
    assert shown.find("p").text == found.title


def test_the_layer_gives_its_head_size():
    assert LocalAttention(4, dim=32).mask(8).describe().head_size == 32
    assert LocalAttention(4).mask(8).describe().head_size == 64


# Advice


def advice(window, n, **options):
    return inspect(window, n, **options).describe().advice


def test_no_advice_where_nothing_is_wasted():
    assert advice(Window(128, causal=True), 1024) == ()
    assert advice(Window(256, exact=True), 4096) == ()


def test_windows_that_end_inside_blocks():
    (line,) = advice(Window(100, look_backward=0, look_forward=0), 3200)
    assert "window_size 100 is no multiple of the block 128" in line
    assert "window_size 128" in line
    better = inspect(Window(128, look_backward=0, look_forward=0), 3200).describe()
    assert (
        better.waste < inspect(Window(100, look_backward=0, look_forward=0), 3200).describe().waste
    )


BLOCKS = [16, 64, 128, (64, 128), (128, 64), (48, 64)]


@given(st.integers(1, 300), st.integers(0, 3), st.booleans(), st.sampled_from(BLOCKS))
def test_the_reach_it_advises_visits_the_same_blocks(size, back, causal, block):
    window = Window(size, causal, back, exact=True)
    for line in advice(window, 2048, block_size=block):
        found = re.search(r"a reach of (\d+) keys back(?: and (\d+) ahead)? visits the same", line)
        if not found:
            continue
        more_back, more_ahead = int(found[1]), int(found[2] or 0)
        wider = Window(1, causal, more_back, more_ahead, exact=True)
        mine, theirs = (inspect(x, 2048, block_size=block).describe() for x in (window, wider))
        assert mine.computed == theirs.computed
        assert mine.scores < theirs.scores


@pytest.mark.parametrize(
    ("window", "n", "options", "words"),
    [
        (
            Window(64, exact=True),
            4096,
            {},
            "a reach of 128 keys back and 128 ahead visits the same",
        ),
        (
            Window(100, causal=True, exact=True),
            3200,
            {},
            "a reach of 100 keys back is no multiple of the block 128",
        ),
        (Window(16), 16, {}, "every query sees every key"),
        (Window(4, causal=True, look_backward=0, exact=True), 512, {}, "one key only"),
        (Window(8), 100, {}, "fits into one block, which a kernel computes whole"),
        (Window(4), 8, {"key_mask": torch.arange(8) < 0}, "8 queries see no key"),
    ],
)
def test_advice(window, n, options, words):
    assert any(words in line for line in advice(window, n, **options))


@pytest.mark.parametrize(
    ("window", "n", "options"),
    [
        (Window(5), 100, {"block_size": (4, 128)}),  # 25 blocks
        (Window(3), 7, {"key_mask": torch.zeros(7, dtype=torch.bool)}),  # none
        (Window(128), 128, {}),  # nothing is wasted
    ],
)
def test_one_block_is_spoken_of_where_there_is_one(window, n, options):
    assert not any("one block" in line for line in advice(window, n, **options))


# A million tokens

MILLION = """
import resource, torch
from flexlocal.masks import Window, inspect
inspect(Window(4), 8).describe()  # loads what loads late
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
window = Window(256, causal=True, exact=True)
for key_mask in (None, torch.ones(2**20, dtype=torch.bool)):
    picture = inspect(window, 2**20, key_mask=key_mask)
    found = picture.describe()
    print(found.scores, found.most_keys, found.full_blocks)
    picture.text(), picture.html(), picture.blocks.text(), picture.query(2**19), str(found)
print((peak() - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux counts it")
def test_a_million_tokens_take_little_memory():
    done = subprocess.run(
        [sys.executable, "-c", MILLION], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *numbers, megabytes = done.stdout.splitlines()
    n, reach = 2**20, 256
    scores = n * (reach + 1) - reach * (reach + 1) // 2
    assert numbers == 2 * [f"{scores} {reach + 1} {n // 128 - 1}"]
    assert float(megabytes) < 100


def test_very_wide_windows_are_counted_without_a_grid():
    """2**32 blocks, more than half of them visited."""
    n, size = 2**20, 2**19
    found = inspect(Window(size, causal=True), n, block_size=16).describe()
    blocks = n // 16
    assert found.scores == n * (n + 1) // 2
    assert found.partial_blocks == blocks
    assert found.full_blocks == blocks * (blocks - 1) // 2
