"""PNGs: their pixels read back to the mask that they show, and their text."""

from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import at, drawn, nearest
from PIL import Image
from strategies import windows

from flexlocal.masks import Window, bias_map, heat_map, inspect
from flexlocal.masks.view.symbols import BLOCKS, SHADES, TOKENS, shade

FEW = settings(max_examples=6)  # a PNG takes a fifth of a second


@FEW
@given(windows(), st.integers(2, 20), st.integers(0, 2**16))
def test_pixels_are_the_mask(rule, n, seed):
    key_mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.7
    seen = rule.mask(n)
    kinds = torch.where(seen & ~key_mask, 1, torch.where(seen, 2, 0))
    kinds += torch.eye(n, dtype=torch.long) & seen & key_mask
    image = drawn(inspect(Window(**asdict(rule)), n, key_mask=key_mask).png)
    assert nearest(at(image, n, n), TOKENS) == kinds.tolist()


@FEW
@given(windows(), st.integers(30, 60), st.integers(8, 20))
def test_pixels_of_long_masks_are_the_shares(rule, n, cells):
    picture = inspect(Window(**asdict(rule)), n)
    step = picture.step(cells)
    expected = []
    for r in range(0, n, step):
        rows = rule.mask(n)[r : r + step].double()
        expected.append([shade(rows[:, c : c + step].mean().item()) for c in range(0, n, step)])
    image = drawn(picture.png, cells=cells)
    left, top, right, bottom = map(float, image.text["Cells"].split())
    token = (right - left) / n
    pixels = image.convert("RGB")

    def color(r, c):
        """The most frequent colour within a cell: windows' edges may cross it."""
        middle = [(low + min(low + step, n)) / 2 * token for low in (c, r)]
        around = [
            pixels.getpixel((round(left + middle[0] + x), round(top + middle[1] + y)))
            for x in (-5, -2, 0, 2, 5)
            for y in (-5, -2, 0, 2, 5)
        ]
        return max(set(around), key=around.count)

    found = [[color(r, c) for c in range(0, n, step)] for r in range(0, n, step)]
    assert nearest(found, SHADES) == expected
    assert f"one pixel is {step} x {step} tokens" in image.text["Description"]


@FEW
@given(windows(), st.integers(2, 40), st.integers(3, 10))
def test_pixels_of_block_maps_are_the_block_states(rule, n, block):
    blocks = inspect(Window(**asdict(rule)), n, block_size=block).blocks
    states = blocks.states()
    image = drawn(blocks.png)
    rows, columns = states.shape
    # Several places, since the partial tiles are hatched: the most frequent one counts.
    places = [
        nearest(at(image, rows, columns, y, x), BLOCKS)
        for y, x in ((0.3, 0.3), (0.3, 0.7), (0.7, 0.3), (0.45, 0.6), (0.62, 0.37))
    ]
    for r in range(rows):
        for c in range(columns):
            votes = {place[r][c] for place in places}
            state = int(states[r, c])
            assert votes == {state} if state != 1 else 1 in votes and 0 not in votes
    assert "not the mask" in image.text["Title"]


def test_axes_are_not_transposed_and_edges_are_drawn():
    image = drawn(inspect(Window(4, causal=True), 8).png)
    (first, *_, last) = at(image, 8, 8)
    assert nearest([first], TOKENS) == [[3, 0, 0, 0, 0, 0, 0, 0]]  # query 0 is the upper row
    assert nearest([last], TOKENS) == [[2, 2, 2, 2, 2, 2, 2, 3]]
    pixels, (left, top, right, bottom) = (
        image.convert("L"),
        map(float, image.text["Cells"].split()),
    )
    middle, lower = round((left + right) / 2), round(bottom - 20)
    assert min(pixels.getpixel((middle + d, lower)) for d in (-1, 0, 1)) < 60  # keys 3 | 4
    beside, half = round(right - 20), round((top + bottom) / 2)
    assert min(pixels.getpixel((beside, half + d)) for d in (-1, 0, 1)) < 60  # queries 3 | 4


def test_neither_lines_nor_crosses_stand_where_there_are_none_to_show():
    lines_at_every_token = drawn(inspect(Window(1, look_backward=9), 20).png)
    crosses_on_shades = drawn(inspect(Window(2, exact=True), 40).png, cells=10)
    for image in (lines_at_every_token, crosses_on_shades):
        left, top, right, bottom = map(float, image.text["Cells"].split())
        inside = image.convert("RGB").crop((left + 4, top + 4, right - 4, bottom - 4))
        assert all(max(color) > 100 for _, color in inside.getcolors())  # ink is 0x22


def test_long_numbers_push_no_name_off_the_page():
    image = drawn(inspect(Window(2**20), 2**24).png).convert("L")
    assert image.crop((0, 0, 3, image.height)).getextrema() == (255, 255)


def test_the_text_of_a_png_says_what_it_shows():
    window = Window(5, causal=True)
    first = drawn(inspect(window, 20).png).text
    assert first["Title"] == window.words
    assert first["Description"] == "window_5_back_1_forward_0_causal, 20 queries, 20 keys"
    again, other, longer = (
        drawn(inspect(x, n).png).text["Digest"]
        for x, n in ((window, 20), (Window(5, causal=True, exact=True), 20), (window, 25))
    )
    assert again == first["Digest"]
    assert len({again, other, longer}) == 3


def test_a_style_of_the_user_changes_nothing(tmp_path):
    import matplotlib

    plain = drawn(inspect(Window(3), 9).png)
    with matplotlib.rc_context({"figure.facecolor": "black", "font.size": 30, "text.color": "r"}):
        styled = drawn(inspect(Window(3), 9).png)
        inspect(Window(3), 9).png(tmp_path / "a.png")
    assert plain.convert("RGB").tobytes() == styled.convert("RGB").tobytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == plain.size


def test_a_million_tokens_are_drawn():
    picture = inspect(Window(256, causal=True, exact=True), 2**20)
    assert "2048 x 2048 tokens" in drawn(picture.png).text["Description"]
    assert "128 x 128 blocks" in drawn(picture.blocks.png).text["Description"]


@pytest.mark.usefixtures("no_matplotlib")
def test_a_missing_matplotlib_says_what_to_install(tmp_path):
    picture = inspect(Window(4), 8)
    window, weights = Window(4), torch.zeros(8, 12)
    for draw in (
        picture.png,
        picture.blocks.png,
        lambda file: heat_map(weights, window, file),
        lambda file: bias_map(weights[:4], window, file),
    ):
        with pytest.raises(ModuleNotFoundError) as raised:
            draw(tmp_path / "x.png")
        assert 'pip install "flexlocal[inspect]"' in str(raised.value)
    assert picture.text() and picture.html() and picture.describe()
