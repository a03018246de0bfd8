"""The inspector's pictures and numbers, read back and compared with the brute-force oracle."""

import re
from dataclasses import asdict
from xml.etree import ElementTree

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import EXAMPLES, windows

from flexlocal.masks import Segments, Window, block_mask, inspect
from flexlocal.masks.view.symbols import BLOCKS, SHADES, TOKENS, shade


@st.composite
def masks(draw, longest=40):
    """A window, a length and a key mask or None, with the dense mask that they stand for."""
    rule, n = draw(windows()), draw(st.integers(1, longest))
    key_mask = None
    if draw(st.booleans()):
        key_mask = torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    seen = rule.mask(n)
    struck = torch.zeros_like(seen) if key_mask is None else seen & ~key_mask
    return Window(**asdict(rule)), n, key_mask, seen & ~struck, struck


def kinds_of(seen, struck):
    """(n, n) of HIDDEN, STRUCK, SEEN, OWN as numbers."""
    kinds = torch.where(struck, 1, torch.where(seen, 2, 0))
    return kinds + (torch.eye(len(seen), dtype=torch.long) & seen)


def read_text(text, kinds, plain):
    """A text picture's rows: the label, and the places of its characters in `kinds`."""
    signs = {kind.plain if plain else kind.character: i for i, kind in enumerate(kinds)}
    grid = []
    for line in text.splitlines():
        row = re.fullmatch(r" *(\d+)  (.*)", line)
        if row:
            cells = re.findall(r"\[.\]|\S", re.sub(r"[│|]", "", row[2]))
            grid.append((int(row[1]), [signs[cell] for cell in cells]))
    return grid


@settings(max_examples=3 * EXAMPLES)
@given(masks(), st.booleans())
def test_text_is_the_mask(mask, plain):
    window, n, key_mask, seen, struck = mask
    text = inspect(window, n, key_mask=key_mask).text(color=False, plain=plain)
    found = read_text(text, TOKENS, plain)
    assert [label for label, _ in found] == list(range(n))
    assert [row for _, row in found] == kinds_of(seen, struck).tolist()
    if plain:
        assert text.isascii()


@given(masks())
def test_colors_change_no_character(mask):
    window, n, key_mask, *_ = mask
    picture = inspect(window, n, key_mask=key_mask)
    colored = picture.text(color=True, plain=False)
    assert "\033[38;5;" in colored
    assert re.sub(r"\033\[[\d;]*m", "", colored) == picture.text(color=False, plain=False)


@given(windows(), st.integers(1, 40))
def test_lines_of_a_text_stand_at_the_edges_of_windows(rule, n):
    text = inspect(Window(**asdict(rule)), n).text(color=False, plain=False)
    expected = [j for j in range(1, n) if rule.size > 1 and j % rule.size == 0]
    for line in text.splitlines():
        row = re.fullmatch(r" *\d+  (.*)", line)
        if row:
            runs = [len(part.replace(" ", "")) for part in row[1].split("│")]
            assert [sum(runs[: k + 1]) for k in range(len(runs) - 1)] == expected
    assert sum(set(line) <= set(" ─┼") and "─" in line for line in text.splitlines()) == len(
        expected
    )


def shares_of(seen, step):
    rows, columns = (-(-size // step) for size in seen.shape)
    return torch.tensor(
        [
            [
                seen[r * step : (r + 1) * step, c * step : (c + 1) * step].double().mean().item()
                for c in range(columns)
            ]
            for r in range(rows)
        ],
        dtype=torch.float64,
    )


@settings(max_examples=2 * EXAMPLES)
@given(masks(longest=60), st.integers(1, 12))
def test_long_masks_are_shaded_by_their_shares(mask, cells):
    window, n, key_mask, seen, _ = mask
    picture = inspect(window, n, key_mask=key_mask)
    step = picture.step(cells)
    assert -(-n // step) <= cells and (step == 1 or -(-n // (step // 2)) > cells)
    shares = shares_of(seen, step)
    assert torch.allclose(picture.shares(step), shares, rtol=0, atol=1e-12)
    if step == 1:
        return
    found = read_text(picture.text(color=False, plain=True, cells=cells), SHADES, plain=True)
    assert [label for label, _ in found] == list(range(0, n, step))
    assert [row for _, row in found] == [[shade(x) for x in row] for row in shares.tolist()]


def test_shades_tell_none_some_and_all():
    assert [shade(x) for x in (0.0, 1e-9, 1 / 3, 0.34, 2 / 3, 0.67, 1 - 1e-9, 1.0)] == [
        0, 1, 1, 2, 2, 3, 3, 4,
    ]  # fmt: skip


def drawing(html, name):
    """The inner drawing called ``name``, as an element."""
    page = ElementTree.fromstring(re.sub(r"<!DOCTYPE html>|<meta[^>]*>", "", html))
    (found,) = [x for x in page.iter("svg") if x.get("class") == name]
    return found


def read_html(html, kinds):
    """(rows, columns) of a token picture's kinds, from its rectangles."""
    found = drawing(html, "tokens")
    _, _, columns, rows = map(int, found.get("viewBox").split())
    names = {kind.name: i for i, kind in enumerate(kinds)}
    grid = torch.zeros(rows, columns, dtype=torch.long)
    for x in found.iter("rect"):
        if x.get("class") in names:
            row, column, width = (int(x.get(name)) for name in ("y", "x", "width"))
            assert x.get("height") == "1" and not grid[row, column : column + width].any()
            grid[row, column : column + width] = names[x.get("class")]
    return grid


@settings(max_examples=2 * EXAMPLES)
@given(masks())
def test_html_is_the_mask(mask):
    window, n, key_mask, seen, struck = mask
    picture = inspect(window, n, key_mask=key_mask)
    for html in (picture._repr_html_(), picture.html()):
        assert torch.equal(read_html(html, TOKENS), kinds_of(seen, struck))
    tips = [x.text for x in drawing(picture.html(), "tokens").iter("title")]
    for i, tip in enumerate(tips):
        assert tip == picture.query(i)


@given(masks(longest=60))
def test_html_of_long_masks_is_shaded(mask):
    window, n, key_mask, seen, _ = mask
    picture = inspect(window, n, key_mask=key_mask)
    step = picture.step(10)
    if step > 1:
        expected = [[shade(x) for x in row] for row in shares_of(seen, step).tolist()]
        assert read_html(picture.html(cells=10), SHADES).tolist() == expected


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
    segments = Segments(window, segment, n)
    picture = inspect(segments, n, n_keys=segments.key_slots(n))
    expected = rule.mask(n)
    assert torch.equal(picture.dense().sum(1), expected.sum(1))
    assert ((picture.kinds() == 3).sum(1) == 1).all()
    assert picture.describe().scores == int(expected.sum())


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
    if len(re.findall("more intervals", words)):
        return  # shortened, see below
    assert keys(r"keys?: (.*), the query") == expected
    assert keys(r"key mask: (.*)") == struck[i].nonzero().flatten().tolist()
    if expected:
        assert f"query {i} sees {len(expected)} key" in words
        assert ("own included" in words) == (i in expected)
    else:
        assert f"query {i} sees no key" in words


def test_many_runs_are_shortened():
    key_mask = torch.arange(60) % 2 == 0
    words = inspect(Window(60), 60, key_mask=key_mask).query(1)
    assert "sees 30 keys: 0, 2, 4, 6, 8, 10, 12, 14 and 22 more intervals up to 58" in words
    assert "own not among them" in words


# Block maps


def block_grid(picture):
    """The three states, and the empty blocks that may be partial: those with a kept key."""
    seen = picture.dense()
    expected = oracle.block_states(seen, *picture.block_size)
    cautious = torch.zeros_like(expected, dtype=torch.bool)
    if picture.key_mask is not None:
        whole = oracle.dense_mask(
            picture.n, picture.rule.size, causal=picture.rule.causal,
            b=picture.rule.look_backward, f=picture.rule.ahead, exact=picture.rule.exact,
        )  # fmt: skip
        kept = oracle.block_states(picture.key_mask.expand(picture.n, -1), *picture.block_size) > 0
        cautious = (expected == 0) & kept & (oracle.block_states(whole, *picture.block_size) > 0)
    return expected, cautious


@settings(max_examples=3 * EXAMPLES)
@given(masks(longest=60), st.integers(1, 16), st.integers(1, 16))
def test_block_map_is_the_block_states(mask, query_block, key_block):
    window, n, key_mask, *_ = mask
    picture = inspect(window, n, key_mask=key_mask, block_size=(query_block, key_block))
    expected, cautious = block_grid(picture)
    states = picture.blocks.states()
    assert torch.equal(torch.where(cautious & (states == 1), 0, states), expected)
    assert picture.blocks.count() == tuple(int((states == x).sum()) for x in range(3))

    text = picture.blocks.text(color=False, plain=True, cells=64)
    assert [row for _, row in read_text(text, BLOCKS, plain=True)] == states.tolist()
    assert "not the mask" in text and not any(kind.plain in text for kind in TOKENS[2:])

    names = {kind.name: i for i, kind in enumerate(BLOCKS)}
    tiles = [
        (int(float(x.get("y"))), int(float(x.get("x"))), names[x.get("class")])
        for x in drawing(picture.blocks.html(), "blocks").iter("rect")
        if x.get("class") in names
    ]
    rows, columns = states.shape
    assert sorted(tiles) == [(r, c, int(states[r, c])) for r in range(rows) for c in range(columns)]


@given(masks(longest=60), st.integers(1, 6), st.integers(1, 5))
def test_block_maps_of_many_blocks_are_grouped(mask, block, step):
    window, n, key_mask, *_ = mask
    blocks = inspect(window, n, key_mask=key_mask, block_size=block).blocks
    fine, grouped = blocks.states(), blocks.states(step)
    for r, row in enumerate(grouped.tolist()):
        for c, state in enumerate(row):
            part = fine[r * step : (r + 1) * step, c * step : (c + 1) * step]
            assert state == (0 if (part == 0).all() else 2 if (part == 2).all() else 1)


@given(masks(longest=60), st.integers(1, 16))
def test_bytes_of_the_block_mask(mask, block):
    window, n, *_ = mask
    lists = [
        "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
        "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
    ]  # fmt: skip
    built = block_mask(window, n, n, block_size=block)
    size = sum(x.numel() * x.element_size() for x in (getattr(built, name) for name in lists))
    assert inspect(window, n, block_size=block).describe().block_mask_bytes == size


# Arguments


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((Window(4), 0), ValueError, ["n must be at least 1", "0"]),
        ((Window(4), 2.0), TypeError, ["n must be an int", "2.0"]),
        ((Window(4), True), TypeError, ["n must be an int", "True"]),
        (("4", 8), TypeError, ["rule must be a Window or an int", "'4'"]),
        ((True, 8), TypeError, ["rule must be a Window or an int", "True"]),
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


def test_printing_is_plain_where_there_is_no_terminal(monkeypatch, capsys):
    picture = inspect(Window(2), 4)
    print(picture)
    assert "\033" not in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\033" in str(picture) and "\033" in str(picture.blocks)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in str(picture)


def test_printing_keeps_to_what_standard_output_can_write(monkeypatch):
    class Old:
        encoding = "ascii"
        isatty = staticmethod(lambda: False)

    monkeypatch.setattr("sys.stdout", Old())
    assert str(inspect(Window(2), 4)).isascii()
    assert str(inspect(Window(2), 400)).isascii()
