"""The picture of a mask as an object: its mask, its arguments, the entry that it shows."""

from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import masks, read_text
from strategies import windows

from flexlocal.masks import KeyLayout, Window, inspect
from flexlocal.masks.view.symbols import TOKENS


@given(masks())
def test_dense_is_the_mask(mask):
    window, n, key_mask, seen, _ = mask
    found = inspect(window, n, key_mask=key_mask).dense()
    assert found.dtype == torch.bool and torch.equal(found, seen)


@given(windows(), st.integers(1, 30), st.integers(1, 30))
def test_queries_and_keys_may_differ_in_number(rule, n, m):
    picture = inspect(Window(**asdict(rule)), n, n_keys=m)
    assert torch.equal(picture.dense(), rule.mask(n, m))
    found = read_text(picture.text(color=False, plain=True), TOKENS, plain=True)
    assert [len(row) for _, row in found] == [m] * n
    assert picture.describe().scores == int(rule.mask(n, m).sum())


@given(windows(), st.integers(1, 4), st.integers(1, 40))
def test_layouts_of_keys_are_shown_in_slots(rule, segment, n):
    """A rule that is no window: every query sees as many slots as keys, its own key in one."""
    window = Window(**asdict(rule))
    segments = KeyLayout(window, segment, n)
    picture = inspect(segments, n, n_keys=segments.all_slots)
    expected = rule.mask(n)
    assert torch.equal(picture.dense().sum(1), expected.sum(1))
    assert ((picture.kinds() == 3).sum(1) == 1).all()
    assert picture.describe().scores == int(expected.sum())


def test_pictures_are_drawn_on_the_cpu_whatever_the_default():
    keep = torch.arange(40) % 7 > 0

    def drawn():
        picture = inspect(Window(5, causal=True), 40, key_mask=keep, block_size=8)
        words = [picture.text(), picture.text(cells=8), picture.blocks.text(), picture.query(9)]
        return [*words, str(picture.describe()), picture.html(), picture.dense().tolist()]

    with torch.device("meta"):
        found = drawn()
    assert found == drawn()


def test_one_entry_of_a_batch_is_a_key_mask():
    keep = torch.arange(8) < 5
    assert torch.equal(
        inspect(4, 8, key_mask=keep[None]).dense(), inspect(Window(4), 8, key_mask=keep).dense()
    )


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((Window(4), 0), ValueError, ["n must be at least 1", "0"]),
        ((Window(4), 2.0), TypeError, ["n must be an int", "2.0"]),
        ((Window(4), True), TypeError, ["n must be an int", "True"]),
        (("4", 8), TypeError, ["rule must be a Window, another Rule or an int", "'4'"]),
        ((True, 8), TypeError, ["rule must be a Window, another Rule or an int", "True"]),
        ((0, 8), ValueError, ["rule must be at least 1", "0"]),
        ((Window(4), 8, {"n_keys": 0}), ValueError, ["n_keys", "0"]),
        ((Window(4), 8, {"block_size": 0}), ValueError, ["block_size", "0"]),
        ((Window(4), 8, {"block_size": "8"}), TypeError, ["block_size", "'8'"]),
        ((Window(4), 8, {"block_size": (8, 8, 8)}), TypeError, ["block_size", "(8, 8, 8)"]),
        ((Window(4), 8, {"head_size": 0}), ValueError, ["head_size", "0"]),
        ((Window(4), 8, {"key_mask": [True] * 8}), TypeError, ["key_mask", "list"]),
        ((Window(4), 8, {"key_mask": torch.ones(8)}), ValueError, ["key_mask", "float32"]),
        (
            (Window(4), 8, {"key_mask": torch.ones(3, 8, dtype=torch.bool)}),
            ValueError,
            ["key_mask", "(8,)", "(3, 8)"],
        ),
        (
            (Window(4), 8, {"key_mask": torch.ones(7, dtype=torch.bool)}),
            ValueError,
            ["key_mask", "(8,)", "(7,)"],
        ),
    ],
    ids=str,
)
def test_errors(arguments, kind, words):
    rule, n, *named = arguments
    with pytest.raises(kind) as raised:
        inspect(rule, n, **(named[0] if named else {}))
    for word in words:
        assert word in str(raised.value)


def test_errors_of_a_picture():
    picture = inspect(Window(4), 10)
    with pytest.raises(ValueError, match="query must be at least 0 and below 10, got 10"):
        picture.query(10)
    with pytest.raises(ValueError, match="got -1"):
        picture.query(-1)
    with pytest.raises(TypeError, match="1.5"):
        picture.query(1.5)
    with pytest.raises(ValueError, match="cells must be at least 1, got 0"):
        picture.text(cells=0)
    with pytest.raises(ValueError, match="cells must be at least 1, got 0"):
        picture.blocks.text(cells=0)
    with pytest.raises(TypeError, match="cells must be an int, got 2.5"):
        picture.blocks.text(cells=2.5)
    with pytest.raises(ValueError, match=r"at most 16777216.*8192 times 8192.*png"):
        inspect(Window(4), 8192).dense()
