"""`Window`: its bounds, their inverses, its mask_mod and its words, against the plain list."""

import dataclasses
import re
from dataclasses import asdict

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import windows

from flexlocal.masks import Window, mask_mod

FAR = 60  # windows of space on both sides, so that no end of the sequence cuts a bound


def sees(rule, i, j, n):
    return oracle.visible(i, j, n, rule.size, **rule.letters)


@given(windows(), st.integers(1, 60))
def test_bounds_are_the_rule(rule, n):
    window = Window(**asdict(rule))
    for i in range(n):
        first, last = window.first_key(i), window.last_key(i)
        for j in range(n):
            assert (first <= j <= last) == sees(rule, i, j, n), (i, j)


@given(windows(), st.integers(1, 60))
def test_inverse_bounds_are_the_rule(rule, n):
    window = Window(**asdict(rule))
    for j in range(n):
        first, last = window.first_query(j), window.last_query(j)
        for i in range(n):
            assert (first <= i <= last) == sees(rule, i, j, n), (i, j)


@given(windows(), st.data())
def test_bounds_know_no_ends(rule, data):
    """Deep inside a sequence a bound is the first or last token itself, not merely outside it."""
    window = Window(**asdict(rule))
    here = FAR * rule.size + data.draw(st.integers(0, 3 * rule.size))
    n = 2 * here
    around = range(here - 5 * rule.size, here + 5 * rule.size)
    keys = [j for j in around if sees(rule, here, j, n)]
    assert (window.first_key(here), window.last_key(here)) == (keys[0], keys[-1])
    queries = [i for i in around if sees(rule, i, here, n)]
    assert (window.first_query(here), window.last_query(here)) == (queries[0], queries[-1])
    # near the start the same distances hold: nothing is clipped to [0, n)
    offset = here % rule.size
    start = here - offset
    for bound in (window.first_key, window.last_key, window.first_query, window.last_query):
        assert bound(offset) == bound(here) - start


@given(windows(), st.integers(1, 60))
def test_tensors_and_ints_agree(rule, n):
    window = Window(**asdict(rule))
    for dtype in (torch.int64, torch.int32):
        index = torch.arange(n, dtype=dtype)
        for bound in (window.first_key, window.last_key, window.first_query, window.last_query):
            plain = [bound(i) for i in range(n)]
            assert all(type(x) is int for x in plain)
            found = bound(index)
            assert found.shape == (n,)
            assert not found.is_floating_point()
            assert found.tolist() == plain


@given(windows(), st.integers(1, 40))
def test_mask_mod_is_the_rule(rule, n):
    function = mask_mod(Window(**asdict(rule)))
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    zero = torch.tensor(0)
    found = function(zero, zero, i, j)
    assert found.dtype == torch.bool
    assert torch.equal(found.expand(n, n), rule.mask(n))


def test_mask_mod_is_named_after_its_parameters():
    """Pictures and benchmarks label themselves with it; equal rules have equal names."""
    rules = [
        Window(37),
        Window(41),
        Window(37, causal=True),
        Window(37, look_forward=0),
        Window(37, look_backward=3),
        Window(37, look_forward=2),
        Window(37, exact=True),
    ]
    names = [mask_mod(rule).__name__ for rule in rules]
    assert len(set(names)) == len(rules), names
    assert all(str(rule.size) in name for rule, name in zip(rules, names, strict=True))
    assert mask_mod(Window(37)).__name__ == names[0]


def most_keys(rule):
    """The most keys that a query sees, far from both ends."""
    start = FAR * rule.size
    n = 2 * start
    around = range(start - 5 * rule.size, start + 6 * rule.size)
    return max(sum(sees(rule, i, j, n) for j in around) for i in range(start, start + rule.size))


@given(windows())
def test_repr_counts_the_keys(rule):
    most = most_keys(rule)
    text = repr(Window(**asdict(rule)))
    assert re.search(rf"at most {most} keys?\b", text), f"{most} keys at most are not in {text!r}"
    if not rule.exact:
        return
    # every query reaches equally far: the words say how far
    here = FAR * rule.size
    for word, reach in (("before", -1), ("after", 1)):
        count = sum(sees(rule, here, here + reach * x, 2 * here) for x in range(1, here))
        said = re.search(rf"the (\d+) {word} it", text)
        assert (int(said[1]) if said else 0) == count, f"{count} keys {word} are not in {text!r}"


def test_repr_of_exact_causal_counts_the_own_key():
    text = repr(Window(4, causal=True, look_backward=1, exact=True))
    assert "at most 5 keys" in text
    assert "its own and the 4 before it" in text


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Window(1, causal=True, look_backward=0), "1 key: its window of 1 up to itself"),
        (Window(5, look_backward=0), "10 keys: its window of 5 and 1 window after"),
        (
            Window(5, look_backward=2),
            "20 keys: its window of 5, 2 windows before and 1 window after",
        ),
        (Window(5, exact=True), "11 keys: its own, the 5 before it and the 5 after it"),
        (Window(5, causal=True, look_backward=0, exact=True), "1 key: its own"),
    ],
    ids=lambda x: x.label if isinstance(x, Window) else "",
)
def test_the_rule_in_words(rule, words):
    assert rule.words == f"a query sees at most {words}"


def seen(window, n):
    """(n, n) booleans, from the bounds alone."""
    i, j = torch.arange(n)[:, None], torch.arange(n)
    return (window.first_key(i) <= j) & (j <= window.last_key(i))


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 50))
def test_windows_in_the_words_of_others(left, right, n):
    i, j = torch.arange(n)[:, None], torch.arange(n)
    for window, expected in (
        (Window.left_right(left, right), (j >= i - left) & (j <= i + right)),
        (Window.around(left), (i - j).abs() <= left),
        (Window.sliding(left + 1), (j <= i) & (j > i - (left + 1))),  # as Transformers has it
        (Window.chunked(left + 1), (j <= i) & (j // (left + 1) == i // (left + 1))),
    ):
        assert torch.equal(seen(window, n), expected), window
    assert Window.left_right(left, right).most_seen == left + 1 + right
    assert Window.sliding(left + 1).most_seen == left + 1
    assert Window.chunked(left + 1).most_seen == left + 1


def test_the_words_of_others_are_counted_in_ours():
    assert Window.sliding(1).words == "a query sees at most 1 key: its own"
    both = "a query sees at most 129 keys: its own, the 64 before it and the 64 after it"
    assert Window.around(64).words == both
    assert Window.left_right(64, 64) == Window.around(64) == Window(64, exact=True)
    assert Window.left_right(4095, 0) == Window.sliding(4096)
    assert Window.sliding(257) == Window(256, causal=True, exact=True)
    uneven = "a query sees at most 13 keys: its own, the 3 before it and the 9 after it"
    assert Window.left_right(3, 9).words == uneven
    assert Window.chunked(8).words == "a query sees at most 8 keys: its window of 8 up to itself"


@pytest.mark.parametrize(
    ("make", "given", "kind", "says"),
    [
        (Window.sliding, (0,), ValueError, "keys must be at least 1, got 0"),
        (Window.sliding, (2.0,), TypeError, "keys must be an int, got 2.0"),
        (Window.around, (-1,), ValueError, "reach must be at least 0, got -1"),
        (Window.left_right, (-1, 3), ValueError, "left must be at least 0, got -1"),
        (Window.left_right, (3, None), TypeError, "right must be an int, got None"),
        (Window.chunked, (0,), ValueError, "size must be at least 1, got 0"),
    ],
    ids=str,
)
def test_errors_of_the_words_of_others(make, given, kind, says):
    with pytest.raises(kind, match=f"^{says}"):
        make(*given)


def test_default_look_forward():
    assert Window(4) != Window(4, look_forward=2)
    assert Window(4).last_key(0) == 7
    assert Window(4, causal=True).last_key(0) == 0


def test_frozen_and_hashable():
    window = Window(4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        window.size = 5
    assert hash(window) == hash(Window(4))
    assert window == Window(4)
    assert window != Window(5)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"size": 0}, ValueError, ["size must be at least 1", "0"]),
        ({"size": -7}, ValueError, ["size must be at least 1", "-7"]),
        ({"size": 2.5}, TypeError, ["size must be an int", "2.5"]),
        ({"size": "8"}, TypeError, ["size must be an int", "8"]),
        ({"size": True}, TypeError, ["size must be an int", "True"]),
        ({"size": 2**62}, ValueError, ["window size times the windows", "2**62"]),
        ({"size": 4, "causal": "no"}, TypeError, ["causal must be True or False", "'no'"]),
        ({"size": 4, "exact": 1}, TypeError, ["exact must be True or False", "1"]),
        ({"size": 4, "look_backward": -1}, ValueError, ["look_backward", "-1"]),
        ({"size": 4, "look_backward": 1.5}, TypeError, ["look_backward", "1.5"]),
        ({"size": 4, "look_forward": -2}, ValueError, ["look_forward", "-2"]),
        ({"size": 4, "causal": True, "look_forward": 1}, ValueError, ["look_forward", "causal"]),
    ],
    ids=str,
)
def test_errors(arguments, kind, words):
    with pytest.raises(kind) as raised:
        Window(**arguments)
    assert str(raised.value).startswith(words[0])
    for word in words:
        assert word in str(raised.value)
