"""Pictures for a terminal: in colour where it is one, plain elsewhere.

A token has one character, a block a bracketed letter. Lines stand at the edges of windows.
"""

import os
import sys
from collections.abc import Sequence
from itertools import groupby

from .drawing import Drawing
from .symbols import SHADES, TOKENS, Kind

_WIDE = 32
"""Columns up to which characters are spaced, so that cells look square."""


def text(drawing: Drawing, color: bool | None = None, plain: bool | None = None) -> str:
    """The drawing as lines of characters.

    Args:
        drawing: what to show.
        color: with ANSI colours; ``None`` asks whether standard output is a terminal, and
            honours ``NO_COLOR``.
        plain: ASCII only; ``None`` asks whether standard output can write more.
    """
    color = _is_terminal() if color is None else color
    plain = not _can_write() if plain is None else plain
    legend = "   ".join(
        f"{_colored(_character(kind, plain), kind, color)} {kind.words}" for kind in drawing.used
    )
    cell = "one letter" if drawing.tiled else "one character"
    unit = drawing.unit(cell, "shaded by the share seen")
    head = [drawing.subtitle, drawing.title, ""]
    return "\n".join([*head, *_rows(drawing, color, plain), "", legend, "", unit])


def _rows(drawing: Drawing, color: bool, plain: bool) -> list[str]:
    """The grid with labels at its sides and lines at the edges of windows."""
    grid, kinds, step, edge = drawing.grid, drawing.kinds, drawing.step, _edge(drawing)
    bar, dash, cross, right, down = "|-+>v" if plain else "│─┼→↓"
    columns, width = len(grid[0]), len(kinds[0].plain)
    group = edge or columns  # cells between two lines
    gap = " " if columns <= _WIDE and width == 1 else ""
    side = f"{drawing.axes[0]} {down}"
    margin = max(len(side), len(str((len(grid) - 1) * step)))

    start = [
        margin + 2 + column * (width + len(gap)) + column // group * len(bar + gap)
        for column in range(columns)
    ]
    every = edge or 1  # the closest labels that leave two spaces between them
    while every * (width + len(gap)) < len(str(columns * step)) + 2:
        every += edge or 1
    head = f"{side:>{margin}}"
    for column in range(0, columns, every):
        head = head.ljust(start[column]) + str(column * step)
    lines = [" " * (margin + 2) + f"{drawing.axes[1]} {right}", head]

    dashes = [
        dash * (min(group, columns - column) * (width + len(gap)))
        for column in range(0, columns, group)
    ]
    between = " " * (margin + 2) + (cross + dash * len(gap)).join(dashes)
    for row, cells in enumerate(grid):
        if edge and row and row % edge == 0:
            lines.append(between)
        parts = [
            _cells(cells[column : column + group], kinds, gap, color, plain)
            for column in range(0, columns, group)
        ]
        lines.append(f"{row * step:>{margin}}  " + (gap + bar + gap).join(parts))
    return lines


def _edge(drawing: Drawing) -> int:
    """Cells between lines; 0 for no lines: windows must end where characters do."""
    least = 1 if drawing.step == 1 else 3
    edge, rest = divmod(drawing.edge, drawing.step)
    return edge if rest == 0 and edge > least else 0


def _cells(cells: Sequence[int], kinds: Sequence[Kind], gap: str, color: bool, plain: bool) -> str:
    parts = []
    for kind, equal in groupby(cells):
        characters = gap.join(_character(kinds[kind], plain) for _ in equal)
        parts.append(_colored(characters, kinds[kind], color))
    return gap.join(parts)


def _character(kind: Kind, plain: bool) -> str:
    return kind.plain if plain else kind.character


def _colored(characters: str, kind: Kind, color: bool) -> str:
    return f"\033[38;5;{kind.ansi}m{characters}\033[0m" if color else characters


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
