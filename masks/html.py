"""Pictures of masks and block maps as HTML: for a notebook, or a page of their own.

The pictures are SVG, one rectangle for each run of equal cells, in units of one cell; they follow
the reader's light or dark theme, and pointing at a row says what its query sees. Token pictures
are squares side by side, block maps tiles with gaps, the partial ones hatched.
"""

from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from .symbols import BLOCKS, HIDDEN, SHADES, TOKENS, Kind, used_of

if TYPE_CHECKING:
    from .block_map import BlockMap
    from .description import Description
    from .picture import MaskPicture

_PIXELS = 560
_MOST_NUMBERS = 12
_MOST_LINES = 32


def page(picture: "MaskPicture", cells: int) -> str:
    """A page with the token picture, the numbers and the block map."""
    return _page(picture.title, token_html(picture, cells) + block_html(picture.blocks, 64))


def block_page(map_: "BlockMap", cells: int) -> str:
    """A page with the block map."""
    return _page(f"block map of {map_.title}", block_html(map_, cells))


def token_html(picture: "MaskPicture", cells: int) -> str:
    """The token picture and the numbers, as an element."""
    step = picture.step(cells)
    grid, kinds = picture.grid(step)
    unit = "a square is one query and one key"
    if step > 1:
        unit = f"a square is {step} queries by {step} keys, shaded by the share of pairs seen"
    size = picture.rule.size
    room = size > 1 if step == 1 else size >= 2 * step
    edge = size / step if room and max(picture.n, picture.n_keys) <= size * _MOST_LINES else 0
    tips = [_tip(picture, row, step) for row in range(len(grid))]
    drawing = _drawing("tokens", grid, kinds, step, edge, ("query", "key"), tips)
    return _element(
        picture.words, f"{picture.title}; {unit}", drawing, kinds, grid, picture.describe()
    )


def block_html(map_: "BlockMap", cells: int) -> str:
    """The block map, as an element."""
    step = map_.step(cells)
    grid = map_.states(step).tolist()
    group = "" if step == 1 else f"; a tile is {step} x {step} blocks"
    drawing = _drawing("blocks", grid, BLOCKS, step, 0, ("query block", "key block"), [])
    title = "Block map: what a kernel computes, not the mask"
    return _element(title, map_.title + group, drawing, BLOCKS, grid, None)


def _drawing(
    name: str,
    grid: list[list[int]],
    kinds: tuple[Kind, ...],
    step: int,
    edge: float,
    axes: tuple[str, str],
    tips: list[str],
) -> str:
    rows, columns = len(grid), len(grid[0])
    cell = min(24.0, _PIXELS / max(rows, columns))
    left, top, wide, high = 74, 44, columns * cell, rows * cell
    parts = [
        f'<svg role="img" aria-label="{name}" width="{left + wide + 24:g}" '
        f'height="{top + high + 8:g}">'
    ]
    for at, axis in enumerate(axes):  # query, then key
        length, middle = (rows, top + high / 2) if at == 0 else (columns, left + wide / 2)
        turn = f' transform="rotate(-90 12 {middle:g})"' if at == 0 else ""
        place = f'x="12" y="{middle:g}"' if at == 0 else f'x="{middle:g}" y="14"'
        parts.append(f'<text class="axis" {place}{turn}>{axis}</text>')
        for number, label in _numbers(length, edge, step):
            middle = (number + (0.5 if step == 1 else 0)) * cell
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
    for row, places in enumerate(grid):
        tip = f"<title>{escape(tips[row])}</title>" if tips else ""
        parts.append(f"<g>{tip}")
        if name == "blocks":
            parts += [_tile(row, column, kinds[kind]) for column, kind in enumerate(places)]
        else:
            # Hidden places too where they have something to say when pointed at.
            parts.append(f'<rect class="row" y="{row}" width="{columns}" height="1"/>')
            column = 0
            for kind, group in groupby(places):
                run = len(list(group))
                if kind != HIDDEN:
                    parts.append(
                        f'<rect class="{kinds[kind].name}" x="{column}" y="{row}" '
                        f'width="{run}" height="1"/>'
                    )
                column += run
        parts.append("</g>")
    if name == "tokens" and cell >= 8:
        parts.append(_lines("grid", rows, columns, 1))
    if edge:
        parts.append(_lines("edge", rows, columns, edge))
    parts.append(f'</svg><rect class="frame" x="{left}" y="{top}" width="{wide:g}" ')
    parts.append(f'height="{high:g}"/></svg>')
    return "".join(parts)


def _tile(row: int, column: int, kind: Kind) -> str:
    tile = (
        f'<rect class="{kind.name}" x="{column + 0.08:g}" y="{row + 0.08:g}" '
        'width="0.84" height="0.84"/>'
    )
    if kind.name != "partial":
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


def _tip(picture: "MaskPicture", row: int, step: int) -> str:
    if step == 1:
        return picture.query(row)
    return f"queries {row * step} to {min((row + 1) * step, picture.n) - 1}"


def _element(
    title: str,
    subtitle: str,
    drawing: str,
    kinds: tuple[Kind, ...],
    grid: list[list[int]],
    numbers: "Description | None",
) -> str:
    used = used_of(grid, kinds)
    name = "blocks" if kinds is BLOCKS else "tokens"
    legend = "".join(f"<span>{_sign(kind, name)}{escape(kind.words)}</span>" for kind in used)
    rows = "" if numbers is None else _table(numbers)
    return (
        f'<div class="flexlocal"><style>{_STYLE}</style><h3>{escape(title)}</h3>'
        f"<p>{escape(subtitle)}</p>{drawing}<p>{legend}</p>{rows}</div>"
    )


def _sign(kind: Kind, name: str) -> str:
    shape = _tile(0, 0, kind) if name == "blocks" else f'<rect class="{kind.name}" {_UNIT}/>'
    return f'<svg class="{name} sign" viewBox="0 0 1 1">{shape}</svg>'


def _table(numbers: "Description") -> str:
    rows = [*numbers.rows(), *(("advice", line) for line in numbers.advice)]
    cells = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _page(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>'
        f"{escape(title)}</title><style>:root{{color-scheme:light dark}}"
        "body{margin:1.5em}@media(prefers-color-scheme:dark){body{background:#111}}"
        f"</style></head>\n<body>{body}</body></html>\n"
    )


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
