"""Pictures for a terminal, read back to the mask that they show."""

import re
from dataclasses import asdict

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import kinds_of, masks, read_text, shares_of
from strategies import EXAMPLES, windows

from flexlocal.masks import Window, inspect
from flexlocal.masks.view.symbols import SHADES, TOKENS, shade


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
