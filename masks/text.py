"""Pictures of masks and block maps for a terminal: in colour where it is one, plain elsewhere.

A token picture has one character for each token pair and a line at each window's edge; a longer
mask shades cells of several tokens. A block map has a bracketed letter for each block.
"""

import os
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from .symbols import BLOCKS, SHADES, TOKENS, Kind, used_of

if TYPE_CHECKING:
    from .block_map import BlockMap
    from .picture import MaskPicture

_WIDE = 32
"""Columns up to which characters are spaced, so that cells look square."""


def token_text(picture: "MaskPicture", color: bool | None, plain: bool | None, cells: int) -> str:
    """The token picture; arguments as ``MaskPicture.text``."""
    step = picture.step(cells)
    size = picture.rule.size
    grid, kinds = picture.grid(step)
    legend = "one character is one query and one key"
    if step > 1:
        legend = f"one character is {step} queries by {step} keys, shaded by the share seen"
    # Lines at the edges of windows, where these end with a character and leave room for it.
    edge = size // step if size % step == 0 and size > step * (1 if step == 1 else 3) else 0
    lines = _drawn(grid, kinds, step, edge, color, plain)
    return "\n".join([picture.title, picture.words, "", *lines, "", legend])


def block_text(map_: "BlockMap", color: bool | None, plain: bool | None, cells: int) -> str:
    """The block map; arguments as ``MaskPicture.text``."""
    step = map_.step(cells)
    grid = map_.states(step).tolist()
    group = "" if step == 1 else f"; one character is {step} x {step} blocks"
    head = [f"block map of {map_.title}", f"what a kernel computes, not the mask{group}", ""]
    lines = _drawn(grid, BLOCKS, step, 0, color, plain, unit=" block")
    return "\n".join(head + lines)


def _drawn(
    grid: list[list[int]],
    kinds: Sequence[Kind],
    step: int,
    edge: int,
    color: bool | None,
    plain: bool | None,
    unit: str = "",
) -> list[str]:
    """The rows of a grid with labels at its sides, lines every ``edge`` cells, a legend below."""
    color = _is_terminal() if color is None else color
    plain = not _can_write() if plain is None else plain
    bar, dash, cross, right, down = "|-+>v" if plain else "│─┼→↓"
    columns, run, width = len(grid[0]), edge or len(grid[0]), len(kinds[0].plain)
    gap = " " if columns <= _WIDE and width == 1 else ""
    side = f"query{unit} {down}"
    margin = max(len(side), len(str((len(grid) - 1) * step)))

    start = [
        margin + 2 + column * (width + len(gap)) + column // run * len(bar + gap)
        for column in range(columns)
    ]
    every = edge or 1  # the closest labels that leave two spaces between them
    while every * (width + len(gap)) < len(str(columns * step)) + 2:
        every += edge or 1
    head = f"{side:>{margin}}"
    for column in range(0, columns, every):
        head = head.ljust(start[column]) + str(column * step)
    lines = [" " * (margin + 2) + f"key{unit} {right}", head]

    dashes = [
        dash * (min(run, columns - column) * (width + len(gap)))
        for column in range(0, columns, run)
    ]
    between = " " * (margin + 2) + (cross + dash * len(gap)).join(dashes)
    for row, places in enumerate(grid):
        if edge and row and row % edge == 0:
            lines.append(between)
        parts = [
            _run(places[column : column + run], kinds, gap, color, plain)
            for column in range(0, columns, run)
        ]
        lines.append(f"{row * step:>{margin}}  " + (gap + bar + gap).join(parts))
    used = used_of(grid, kinds)
    legend = "   ".join(f"{_sign(kind, color, plain)} {kind.words}" for kind in used)
    return [*lines, "", legend]


def _run(places: list[int], kinds: Sequence[Kind], gap: str, color: bool, plain: bool) -> str:
    parts = []
    for kind, group in groupby(places):
        count = len(list(group))
        character = kinds[kind].plain if plain else kinds[kind].character
        parts.append(_colored(gap.join([character] * count), kinds[kind], color))
    return gap.join(parts)


def _sign(kind: Kind, color: bool, plain: bool) -> str:
    return _colored(kind.plain if plain else kind.character, kind, color)


def _colored(text: str, kind: Kind, color: bool) -> str:
    return f"\033[38;5;{kind.ansi}m{text}\033[0m" if color else text


def _is_terminal() -> bool:
    """Whether standard output is a terminal that wants colours (https://no-color.org)."""
    asked = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return asked and sys.stdout is not None and sys.stdout.isatty()


def _can_write() -> bool:
    """Whether standard output's encoding holds the characters."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        "".join(kind.character for kind in (*TOKENS, *SHADES)).encode(encoding)
        "│─┼→↓".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
