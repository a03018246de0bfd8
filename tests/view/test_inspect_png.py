"""PNGs: their pixels read back to the mask they show, their text, the gallery, the heat maps."""

import builtins
import io
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from strategies import windows

from flexlocal import LocalAttention
from flexlocal.masks import Window, bias_map, heat_map, inspect
from flexlocal.masks.view import gallery
from flexlocal.masks.view.symbols import BLOCKS, SHADES, TOKENS, shade

ROOT = Path(__file__).parents[2]
FEW = settings(max_examples=12)  # a PNG takes a tenth of a second


def drawn(draw, *arguments, **named):
    """The PNG that ``draw`` writes, as an image."""
    file = io.BytesIO()
    draw(*arguments, file, **named)
    return Image.open(file)


def at(image, rows, columns, y=0.25, x=0.25):
    """Colours at the same place of every cell, row by row."""
    left, top, right, bottom = map(float, image.text["Cells"].split())
    pixels = image.convert("RGB")
    return [
        [
            pixels.getpixel(
                (
                    round(left + (column + x) * (right - left) / columns),
                    round(top + (row + y) * (bottom - top) / rows),
                )
            )
            for column in range(columns)
        ]
        for row in range(rows)
    ]


def nearest(colors, kinds):
    """The place in ``kinds`` of each colour."""
    known = [tuple(int(kind.color[i : i + 2], 16) for i in (1, 3, 5)) for kind in kinds]

    def place(color):
        apart = [sum((a - b) ** 2 for a, b in zip(color, x, strict=True)) for x in known]
        return apart.index(min(apart))

    return [[place(color) for color in row] for row in colors]


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


# matplotlib is an extra


def test_a_missing_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
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


def test_no_picture_no_matplotlib():
    code = (
        "import sys, flexlocal, flexlocal.masks as m; flexlocal.LocalAttention\n"
        "p = m.inspect(m.Window(4), 8); str(p), p.html(), str(p.blocks), str(p.describe())\n"
        "print([x for x in sys.modules if x.split('.')[0] in ('matplotlib', 'PIL')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# Weights and biases


def test_a_heat_map_is_its_weights():
    layer = LocalAttention(4, causal=True, dropout=0.0)
    q, k = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(3)).unbind()
    windowed, dense = layer.attention_map(q, k), layer.attention_map(q, k, dense=True)
    image = drawn(lambda file: heat_map(windowed, layer.window, file))
    again = drawn(lambda file: heat_map(dense, layer.window, file, dense=True))
    assert image.text["Digest"] == again.text["Digest"]

    import matplotlib

    colors = at(image, 12, 12, y=0.4, x=0.4)
    visible = inspect(layer.window, 12).dense()
    scale = dense / dense.max()
    for i in range(12):
        for j in range(12):
            red, green, blue = colors[i][j]
            if visible[i, j]:
                expected = matplotlib.colormaps["viridis"](float(scale[i, j]))[:3]
                apart = max(
                    abs(a - 255 * b) for a, b in zip((red, green, blue), expected, strict=True)
                )
                assert apart < 12, (i, j)
            else:
                assert red == green == blue  # grey


def test_a_bias_is_drawn_over_its_window():
    window = Window(3, causal=True)
    bias = torch.full((3, 6), -2.0)
    bias[1, 4], bias[2, 4] = 1.0, 0.0
    bias[0, 2] = -torch.inf
    colors = at(drawn(lambda file: bias_map(bias, window, file)), 3, 6)
    import matplotlib

    for place in range(3):
        for key in range(6):
            if key > place + 3 or bias[place, key].isinf():  # hidden by the window or the bias
                assert len(set(colors[place][key])) == 1  # grey
                continue
            # white stands for 0, whatever the values
            expected = matplotlib.colormaps["PuOr"](float(bias[place, key]) / 4 + 0.5)[:3]
            for a, b in zip(colors[place][key], expected, strict=True):
                assert abs(a - 255 * b) < 12, (place, key)


def test_long_heat_maps_keep_the_windowed_layout():
    window = Window(8, causal=True)
    weights = torch.rand(2000, 16)
    image = drawn(lambda file: heat_map(weights, window, file))
    assert "by place in the query's windows, means of 4 queries" in image.text["Description"]


@pytest.mark.parametrize(
    ("draw", "shape", "words"),
    [
        (heat_map, (2, 8, 12), ["weights", "(n, 12)", "(2, 8, 12)"]),
        (heat_map, (8, 11), ["weights", "(n, 12)", "(8, 11)"]),
        (bias_map, (2, 4, 12), ["bias", "(4, 12)", "(2, 4, 12)"]),
        (bias_map, (8, 12), ["bias", "(4, 12)", "(8, 12)"]),
    ],
)
def test_errors(draw, shape, words, tmp_path):
    with pytest.raises(ValueError) as raised:
        draw(torch.zeros(shape), Window(4), tmp_path / "x.png")
    for word in words:
        assert word in str(raised.value)


# The gallery

COMMITTED = sorted((ROOT / "masks" / "gallery").glob("*.png"))


def test_the_gallery_is_current(tmp_path, capsys):
    gallery.draw(tmp_path)
    fresh = sorted((tmp_path / "gallery").glob("*.png"))
    assert [x.name for x in fresh] == [x.name for x in COMMITTED] and fresh
    for mine, theirs in zip(fresh, COMMITTED, strict=True):
        with Image.open(mine) as image, Image.open(theirs) as committed:
            said, kept = image.text, committed.text
        for name in ("Title", "Description", "Digest"):
            assert said[name] == kept[name], (
                f"{theirs.name}: python -m flexlocal.masks.view.gallery"
            )


def test_the_gallery_shows_every_picture_and_keeps_them_small():
    text = (ROOT / "masks" / "README.md").read_text()
    for picture in COMMITTED:
        assert f"(gallery/{picture.name})" in text
        assert picture.stat().st_size < 40_000
    assert text.count("![") == len(COMMITTED)


def test_the_gallery_comes_back_to_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "code", lambda: ["raise KeyError"])
    before = os.getcwd()
    with pytest.raises(KeyError):
        gallery.draw(tmp_path)
    assert os.getcwd() == before
