"""Pictures of masks and block maps as PNG files: squares for tokens, tiles with gaps for blocks."""

from typing import TYPE_CHECKING

from .blocks import EMPTY, FULL, PARTIAL
from .sheet import INK, PALE_INK, File, Sheet
from .symbols import BLOCKS, STRUCK, Kind, used_of

if TYPE_CHECKING:
    from .block_map import BlockMap
    from .picture import MaskPicture

_MOST_SINGLE = 64
"""Tokens up to which each has a frame of its own."""


def token_png(picture: "MaskPicture", file: File, cells: int) -> None:
    """Draws the token picture; arguments as ``MaskPicture.png``."""
    step = picture.step(cells)
    grid, kinds = picture.grid(step)
    subtitle = picture.title + ("" if step == 1 else f"; one pixel is {step} x {step} tokens")
    sheet = Sheet(picture.n, picture.n_keys, picture.words, subtitle)
    with sheet.style():
        from matplotlib.patches import Patch

        rows, columns = len(grid), len(grid[0])
        sheet.axes.imshow(
            _colors(grid, kinds),
            extent=(0, columns * step, rows * step, 0),
            interpolation="nearest",
            aspect="auto",
        )
        sheet.axes.set_xlim(0, picture.n_keys)
        sheet.axes.set_ylim(picture.n, 0)
        if max(picture.n, picture.n_keys) <= _MOST_SINGLE:
            for draw, length in ((sheet.axes.axvline, columns), (sheet.axes.axhline, rows)):
                for place in range(1, length):
                    draw(place, color="white", linewidth=0.8)
            _cross_out(sheet, grid)
        if step == 1 or picture.rule.size >= 2 * step:
            sheet.edges(picture.rule.size)
        sheet.label("key", "query", picture.rule.size, offset=0.5 if step == 1 else 0)
        words = "" if step == 1 else " of the pairs seen"
        sheet.legend(
            [
                (Patch(facecolor=kind.color, edgecolor=PALE_INK, lw=0.5), kind.words + words)
                for kind in used_of(grid, kinds)
            ]
        )
        sheet.save(file, ["tokens", step, grid, [kind.color for kind in kinds]])


def block_png(map_: "BlockMap", file: File, cells: int) -> None:
    """Draws the block map; arguments as ``BlockMap.png``."""
    step = map_.step(cells)
    grid = map_.states(step).tolist()
    group = "" if step == 1 else f"; one tile is {step} x {step} blocks"
    sheet = Sheet(
        len(grid),
        len(grid[0]),
        "Block map: what a kernel computes, not the mask",
        f"{map_.title}{group}",
    )
    with sheet.style():
        from matplotlib.collections import PatchCollection
        from matplotlib.patches import Patch, Rectangle

        sheet.axes.set_facecolor("#e8e8e8")
        signs = []
        used = sorted({state for row in grid for state in row})
        for state in used:
            tiles = [
                Rectangle((column + 0.08, row + 0.08), 0.84, 0.84)
                for row, places in enumerate(grid)
                for column, place in enumerate(places)
                if place == state
            ]
            kind = BLOCKS[state]
            hatch = "////" if state == PARTIAL else None
            edge = "#dddddd" if state == EMPTY else BLOCKS[FULL].color
            sheet.axes.add_collection(
                PatchCollection(
                    tiles, facecolor=kind.color, edgecolor=edge, hatch=hatch, linewidth=0.6
                )
            )
            sign = Patch(facecolor=kind.color, edgecolor=edge, hatch=hatch, linewidth=0.6)
            signs.append((sign, kind.words))
        sheet.label("key block", "query block", 1, offset=0.5 if step == 1 else 0, step=step)
        sheet.legend(signs)
        sheet.save(file, ["blocks", step, grid, [kind.color for kind in BLOCKS]])


def _colors(grid: list[list[int]], kinds: tuple[Kind, ...]) -> list[list[list[float]]]:
    """Red, green and blue of each cell, 0 to 1."""
    rgb = [[int(kind.color[at : at + 2], 16) / 255 for at in (1, 3, 5)] for kind in kinds]
    return [[rgb[kind] for kind in row] for row in grid]


def _cross_out(sheet: Sheet, grid: list[list[int]]) -> None:
    struck = [
        (column + 0.5, row + 0.5)
        for row, places in enumerate(grid)
        for column, kind in enumerate(places)
        if kind == STRUCK
    ]
    if struck:
        x, y = zip(*struck, strict=True)
        sheet.axes.scatter(
            x, y, marker="x", color=INK, linewidths=1.0, s=4000 / max(len(grid), 8) ** 1.5
        )
