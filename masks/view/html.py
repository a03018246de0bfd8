"""Pictures as HTML: for a notebook, or a page of their own.

The pictures are SVG, one rectangle for each row of equal cells, in units of one cell. They follow
the reader's light or dark theme, and pointing at a row says what it shows. Tokens are squares
side by side, blocks tiles with gaps, the partial ones hatched.
"""

from collections.abc import Sequence
from html import escape
from itertools import groupby

from .drawing import Drawing
from .symbols import BLOCKS, HIDDEN, SHADES, TOKENS, Kind

_PIXELS = 560
_LARGEST_CELL = 24.0
_MOST_NUMBERS = 12
_AXIS_LENGTH = 90
"""Pixels along the side that the name of the queries' axis needs."""


def html(drawing: Drawing, numbers: Sequence[tuple[str, str]] = ()) -> str:
    """The drawing as an element.

    Args:
        drawing: what to show.
        numbers: names and values for a table under it.
    """
    name = _name(drawing)
    unit = drawing.unit(
        "a tile" if drawing.tiled else "a square", "shaded by the share of pairs seen"
    )
    legend = "".join(
        f"<span>{_sign(kind, name)}{escape(kind.words)}</span>" for kind in drawing.used
    )
    subtitle = f"{drawing.subtitle}; {unit}"
    return element(drawing.title, subtitle, f"{_svg(drawing)}<p>{legend}</p>{_table(numbers)}")


def table(title: str, subtitle: str, rows: Sequence[tuple[str, str]]) -> str:
    """Names and values as an element."""
    return element(title, subtitle, _table(rows))


def element(title: str, subtitle: str, body: str) -> str:
    """``body``, which is HTML, under a heading; brings its own style."""
    return (
        f'<div class="flexlocal"><style>{_STYLE}</style><h3>{escape(title)}</h3>'
        f"<p>{escape(subtitle)}</p>{body}</div>"
    )


def page(title: str, *elements: str) -> str:
    """A page of its own that holds the elements."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>'
        f"{escape(title)}</title><style>:root{{color-scheme:light dark}}"
        "body{margin:1.5em}@media(prefers-color-scheme:dark){body{background:#111}}"
        f"</style></head>\n<body>{''.join(elements)}</body></html>\n"
    )


def _name(drawing: Drawing) -> str:
    """The class of the drawing's elements."""
    return "blocks" if drawing.tiled else "tokens"


def _svg(drawing: Drawing) -> str:
    name, kinds = _name(drawing), drawing.kinds
    rows, columns = len(drawing.grid), len(drawing.grid[0])
    cell = min(_LARGEST_CELL, _PIXELS / max(rows, columns))
    wide, high = columns * cell, rows * cell
    edge = drawing.lines / drawing.step
    # Queries' axis may be shorter than its name. Above it there is room, below it room is made.
    missing = max(0.0, _AXIS_LENGTH - high) / 2
    left, top = 74, 44
    parts = [
        f'<svg role="img" aria-label="{name}" width="{left + wide + 24:g}" '
        f'height="{top + high + max(8, missing):g}">'
    ]
    for at, axis in enumerate(drawing.axes):
        length, middle = (rows, top + high / 2) if at == 0 else (columns, left + wide / 2)
        turn = f' transform="rotate(-90 12 {middle:g})"' if at == 0 else ""
        place = f'x="12" y="{middle:g}"' if at == 0 else f'x="{middle:g}" y="14"'
        parts.append(f'<text class="axis" {place}{turn}>{axis}</text>')
        for number, label in _numbers(length, edge, drawing.step):
            middle = (number + (0.5 if drawing.step == 1 else 0)) * cell
            where = (
                f'class="side" x="{left - 6}" y="{top + middle + 4:g}"'
                if at == 0
                else f'class="head" x="{left + middle:g}" y="{top - 6}"'
            )
            parts.append(f"<text {where}>{label}</text>")
    parts.append(
        f'<svg class="{name}" x="{left}" y="{top}" width="{wide:g}" height="{high:g}" '
        f'viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" shape-rendering="crispEdges">'
        f'<rect class="ground" width="{columns}" height="{rows}"/>'
    )
    for row, cells in enumerate(drawing.grid):
        tip = f"<title>{escape(drawing.tips[row])}</title>" if drawing.tips else ""
        parts.append(f"<g>{tip}")
        if drawing.tiled:
            parts += [_tile(row, column, kinds[kind]) for column, kind in enumerate(cells)]
        else:
            # The whole row too, so that hidden cells show the tip when pointed at.
            parts.append(f'<rect class="row" y="{row}" width="{columns}" height="1"/>')
            parts += _squares(row, cells, kinds)
        parts.append("</g>")
    if not drawing.tiled and cell >= 8:
        parts.append(_lines("grid", rows, columns, 1))
    if edge:
        parts.append(_lines("edge", rows, columns, edge))
    parts.append(f'</svg><rect class="frame" x="{left}" y="{top}" width="{wide:g}" ')
    parts.append(f'height="{high:g}"/></svg>')
    return "".join(parts)


def _squares(row: int, cells: Sequence[int], kinds: Sequence[Kind]) -> list[str]:
    """A rectangle for each row of equal neighbours that are not hidden."""
    parts, column = [], 0
    for kind, equal in groupby(cells):
        width = len(list(equal))
        if kind != HIDDEN:
            parts.append(
                f'<rect class="{kinds[kind].name}" x="{column}" y="{row}" '
                f'width="{width}" height="1"/>'
            )
        column += width
    return parts


def _tile(row: int, column: int, kind: Kind) -> str:
    tile = (
        f'<rect class="{kind.name}" x="{column + 0.08:g}" y="{row + 0.08:g}" '
        'width="0.84" height="0.84"/>'
    )
    if not kind.hatched:
        return tile
    strokes = "".join(
        f"M{column + x0:g} {row + y0:g}L{column + x1:g} {row + y1:g}"
        for x0, y0, x1, y1 in (
            (0.08, 0.5, 0.5, 0.08),
            (0.08, 0.92, 0.92, 0.08),
            (0.5, 0.92, 0.92, 0.5),
        )
    )
    return f'{tile}<path class="hatch" d="{strokes}"/>'


def _lines(name: str, rows: int, columns: int, every: float) -> str:
    down = "".join(f"M{_multiple(every, k):g} 0V{rows}" for k in range(1, _count(columns, every)))
    across = "".join(f"M0 {_multiple(every, k):g}H{columns}" for k in range(1, _count(rows, every)))
    return f'<path class="{name}" d="{down}{across}"/>'


def _multiple(every: float, k: int) -> float:
    return round(every * k, 6)


def _count(length: int, every: float) -> int:
    return -int(-length // every)


def _numbers(length: int, edge: float, step: int) -> list[tuple[float, int]]:
    """Places on an axis, in cells, and the tokens there: at windows' edges where there are some."""
    every = edge if edge and length >= 3 * edge else 1
    while length > every * _MOST_NUMBERS:
        every *= 2
    return [(k * every, round(k * every * step)) for k in range(_count(length, every))]


def _sign(kind: Kind, name: str) -> str:
    shape = _tile(0, 0, kind) if name == "blocks" else f'<rect class="{kind.name}" {_UNIT}/>'
    return f'<svg class="{name} sign" viewBox="0 0 1 1">{shape}</svg>'


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>" if rows else ""


_UNIT = 'width="1" height="1"'


def _style() -> str:
    """The sheet: light by default, dark where the reader's system or notebook is."""
    kinds = (*TOKENS, *SHADES, *BLOCKS)
    light = "".join(f"--{kind.name}:{kind.color};" for kind in kinds)
    dark = "".join(f"--{kind.name}:{kind.dark};" for kind in kinds)
    light += "--ink:#222;--pale:#666;--ground:#f4f4f4;--wall:#e8e8e8;--line:#fff;"
    dark += "--ink:#eee;--pale:#aaa;--ground:#262626;--wall:#333;--line:#111;"
    fills = "".join(f".flexlocal .{kind.name}{{fill:var(--{kind.name})}}" for kind in kinds)
    return (
        f".flexlocal{{{light}color:var(--ink);font:14px/1.4 system-ui,sans-serif}}"
        f"@media(prefers-color-scheme:dark){{.flexlocal{{{dark}}}}}"
        f'[data-jp-theme-light="true"] .flexlocal{{{light}}}'
        f'[data-jp-theme-light="false"] .flexlocal,.vscode-dark .flexlocal{{{dark}}}'
        ".vscode-light .flexlocal{" + light + "}"
        ".flexlocal h3{font-size:16px;margin:.6em 0 0}"
        ".flexlocal p{margin:.2em 0 .4em;color:var(--pale)}"
        ".flexlocal span{margin-right:1.2em;white-space:nowrap;color:var(--ink)}"
        ".flexlocal svg{max-width:none;vertical-align:middle}"
        ".flexlocal text{fill:var(--ink);font-size:11px}"
        ".flexlocal .axis{font-size:14px;text-anchor:middle}"
        ".flexlocal .side{text-anchor:end}.flexlocal .head{text-anchor:middle}"
        ".flexlocal .ground{fill:var(--ground)}.flexlocal .blocks .ground{fill:var(--wall)}"
        ".flexlocal .row{fill:transparent}"
        ".flexlocal .frame{fill:none;stroke:var(--ink)}"
        ".flexlocal path{fill:none;vector-effect:non-scaling-stroke}"
        ".flexlocal .grid{stroke:var(--line);stroke-width:.8}"
        ".flexlocal .edge{stroke:var(--ink);stroke-width:1.2}"
        ".flexlocal .hatch{stroke:var(--full);stroke-width:1.2}"
        ".flexlocal .sign{width:14px;height:14px;margin-right:.4em;"
        "outline:1px solid var(--pale)}"
        ".flexlocal table{border-collapse:collapse;margin:.4em 0}"
        ".flexlocal th,.flexlocal td{text-align:left;padding:.1em 1em .1em 0;font-weight:normal;"
        "background:none;color:var(--ink);font-size:14px;vertical-align:top}"
        ".flexlocal th{color:var(--pale);white-space:nowrap}" + fills
    )


_STYLE = _style()
