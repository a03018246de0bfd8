"""Masks to draw, and their pictures read back: from text, HTML and pixels to grids of kinds."""

import io
import re
from dataclasses import asdict
from xml.etree import ElementTree

import torch
from hypothesis import strategies as st
from PIL import Image
from strategies import windows

from flexlocal.masks import Window


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


def page_of(html):
    """The page, as an element."""
    return ElementTree.fromstring(re.sub(r"<!DOCTYPE html>|<meta[^>]*>", "", html))


def drawing(html, name):
    """The inner drawing called ``name``, as an element: its cells."""
    (found,) = [x for x in page_of(html).iter("svg") if x.get("class") == name]
    return found


def outer_drawing(html, name):
    """The drawing called ``name`` with its axes, as an element."""
    (found,) = [x for x in page_of(html).iter("svg") if x.get("aria-label") == name]
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
