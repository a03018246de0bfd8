"""Pictures as PNG files: squares for tokens, tiles with gaps for blocks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .drawing import Drawing
from .sheet import INK, PALE_INK, File, Sheet
from .symbols import BLOCKS, STRUCK, Kind

if TYPE_CHECKING:
    from matplotlib.artist import Artist

_MOST_SINGLE = 64
"""Tokens up to which each has a frame of its own."""


def png(drawing: Drawing, file: File) -> None:
    """Writes the drawing as a PNG.

    Args:
        drawing: what to show.
        file: a path or a binary file.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message says what to install.
    """
    cell, places = ("tile", "blocks") if drawing.tiled else ("pixel", "tokens")
    step, subtitle = drawing.step, drawing.subtitle
    if step > 1:
        subtitle += f"; one {cell} is {step} x {step} {places}"
    sheet = Sheet(*drawing.shape, drawing.title, subtitle)
    with sheet.style():
        signs = (_tiles if drawing.tiled else _squares)(drawing, sheet)
        sheet.edges(drawing.lines)
        down, across = drawing.axes
        sheet.label(across, down, drawing.edge, offset=0.5 if step == 1 else 0)
        sheet.legend(signs)
        colors = [kind.color for kind in drawing.kinds]
        sheet.save(file, ["blocks" if drawing.tiled else "tokens", step, drawing.grid, colors])


def _squares(drawing: Drawing, sheet: Sheet) -> "Sequence[tuple[Artist, str]]":
    """Draws the cells side by side; returns the legend."""
    from matplotlib.patches import Patch

    rows, columns = len(drawing.grid), len(drawing.grid[0])
    colors = [_rgb(kind) for kind in drawing.kinds]
    sheet.axes.imshow(
        [[colors[kind] for kind in row] for row in drawing.grid],
        extent=(0, columns * drawing.step, rows * drawing.step, 0),
        interpolation="nearest",
        aspect="auto",
    )
    sheet.axes.set_xlim(0, drawing.shape[1])  # imshow widens them to its cells
    sheet.axes.set_ylim(drawing.shape[0], 0)
    if drawing.step == 1 and max(drawing.shape) <= _MOST_SINGLE:
        for draw, length in ((sheet.axes.axvline, columns), (sheet.axes.axhline, rows)):
            for place in range(1, length):
                draw(place, color="white", linewidth=0.8)
        _cross_out(drawing, sheet)
    words = "" if drawing.step == 1 else " of the pairs seen"
    return [
        (Patch(facecolor=kind.color, edgecolor=PALE_INK, lw=0.5), kind.words + words)
        for kind in drawing.used
    ]


def _tiles(drawing: Drawing, sheet: Sheet) -> "Sequence[tuple[Artist, str]]":
    """Draws the cells as tiles with gaps; returns the legend."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Patch, Rectangle

    sheet.axes.set_facecolor("#e8e8e8")
    step, signs = drawing.step, []
    empty, *_, full = BLOCKS
    for kind in drawing.used:
        tiles = [
            Rectangle(((column + 0.08) * step, (row + 0.08) * step), 0.84 * step, 0.84 * step)
            for row, cells in enumerate(drawing.grid)
            for column, cell in enumerate(cells)
            if drawing.kinds[cell] is kind
        ]
        edge = "#dddddd" if kind is empty else full.color
        hatch = "////" if kind.hatched else None
        sheet.axes.add_collection(
            PatchCollection(tiles, facecolor=kind.color, edgecolor=edge, hatch=hatch, linewidth=0.6)
        )
        sign = Patch(facecolor=kind.color, edgecolor=edge, hatch=hatch, linewidth=0.6)
        signs.append((sign, kind.words))
    return signs


def _rgb(kind: Kind) -> list[float]:
    """Red, green and blue, 0 to 1."""
    return [int(kind.color[at : at + 2], 16) / 255 for at in (1, 3, 5)]


def _cross_out(drawing: Drawing, sheet: Sheet) -> None:
    """Crosses on the keys that the key mask hides, among cells of one token."""
    rows = len(drawing.grid)
    struck = [
        (column + 0.5, row + 0.5)
        for row, cells in enumerate(drawing.grid)
        for column, cell in enumerate(cells)
        if cell == STRUCK
    ]
    if struck:
        x, y = zip(*struck, strict=True)
        sheet.axes.scatter(
            x, y, marker="x", color=INK, linewidths=1.0, s=4000 / max(rows, 8) ** 1.5
        )
