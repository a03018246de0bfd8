"""One query in words, read back and compared with the brute-force oracle."""

import re
from xml.etree import ElementTree

import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import masks

from flexlocal.masks import KeyLayout, Window, inspect


@given(masks(), st.data())
def test_one_query_in_words(mask, data):
    window, n, key_mask, seen, struck = mask
    i = data.draw(st.integers(0, n - 1))
    words = inspect(window, n, key_mask=key_mask).query(i)

    def keys(pattern):
        found = re.search(pattern, words)
        runs = re.findall(r"(\d+)(?: to (\d+))?", found[1]) if found else []
        return [j for a, b in runs for j in range(int(a), int(b or a) + 1)]

    expected = seen[i].nonzero().flatten().tolist()
    if re.search("more interval", words):
        return  # shortened, see below
    assert keys(r"keys?: (.*), the query") == expected
    assert keys(r"key mask: (.*)") == struck[i].nonzero().flatten().tolist()
    if expected:
        assert f"query {i} sees {len(expected)} key" in words
        assert ("own included" in words) == (i in expected)
    else:
        assert f"query {i} sees no key" in words


def test_many_intervals_are_shortened():
    key_mask = torch.arange(60) % 2 == 0
    words = inspect(Window(60), 60, key_mask=key_mask).query(1)
    assert "sees 30 keys: 0, 2, 4, 6, 8, 10, 12, 14 and 22 more intervals up to 58" in words
    assert "own not among them" in words
    words = inspect(Window(60), 60, key_mask=key_mask & (torch.arange(60) < 18)).query(1)
    assert "12, 14 and 1 more interval up to 16" in words


def test_only_standing_windows_say_where_a_query_stands():
    sliding, standing = Window(5, causal=True, exact=True), Window(5, causal=True)
    words = "query 7 sees 6 keys: 2 to 7, the query's own included"
    assert inspect(sliding, 20).query(7) == words
    assert "it stands in window 1, tokens 5 to 9, as token 2" in inspect(standing, 20).query(7)
    layout = KeyLayout(standing, 2, 20)
    assert "stands" not in inspect(layout, 20, n_keys=layout.all_slots).query(7)


def test_words_are_a_string_that_a_notebook_shows_as_lines():
    words = inspect(Window(5, causal=True), 20).query(2)
    lines = [
        "query 2 sees 3 keys: 0 to 2, the query's own included",
        "it stands in window 0, tokens 0 to 4, as token 2 of it",
        "cut off by the sequence's ends: 5 before its start",
    ]
    assert words == "\n".join(lines) and str(words) == words and isinstance(words, str)
    shown = ElementTree.fromstring(words._repr_html_().replace("<br>", "<br/>"))
    assert list(shown.itertext()) == lines
