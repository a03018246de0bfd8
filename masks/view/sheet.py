"""A sheet to draw on: a matplotlib figure with key and query axes, and the PNG it becomes.

matplotlib is an extra and is loaded here only, when a picture is asked for. Pictures do not
depend on the user's matplotlib style. A PNG's text says what it shows (``Title``,
``Description``), where the drawn cells lie (``Cells``: left, top, right and bottom in pixels) and
what was drawn (``Digest``, the same whatever version of matplotlib drew it).
"""

import hashlib
import json
import textwrap
from collections.abc import Sequence
from os import PathLike
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

File = str | PathLike[str] | IO[bytes]

INK, PALE_INK = "#222222", "#666666"
_DOTS_PER_INCH = 100
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 7.0, 0.9, 0.2, 1.3, 0.75  # inches, of page and margins
_MOST_TICKS = 12
_MOST_DIGITS = 7
"""Digits of a number that fit beside an axis's name; longer numbers are set smaller."""


class Sheet:
    """A figure of ``rows`` queries by ``columns`` keys, drawn inside ``with sheet.style():``.

    Args:
        rows, columns: tokens or blocks on the axes.
        title: the first line, what is seen.
        subtitle: the second line, the parameters.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message says what to install.
    """

    def __init__(self, rows: int, columns: int, title: str, subtitle: str) -> None:
        _need_matplotlib()
        from matplotlib.figure import Figure

        self.rows, self.columns, self.title, self.subtitle = rows, columns, title, subtitle
        self._middle = 0.5
        with self.style():
            across = _WIDTH - _LEFT - _RIGHT
            down = across * min(max(rows / columns, 0.3), 2.0)
            self.height = _TOP + down + _BOTTOM
            self.figure = Figure(figsize=(_WIDTH, self.height), dpi=_DOTS_PER_INCH)
            box = _LEFT / _WIDTH, _BOTTOM / self.height, across / _WIDTH, down / self.height
            self.axes: Axes = self.figure.add_axes(box)
            self.axes.set_xlim(0, columns)
            self.axes.set_ylim(rows, 0)
            self.axes.xaxis.tick_top()
            self.axes.xaxis.set_label_position("top")

    @staticmethod
    def style() -> Any:
        """matplotlib's own defaults, whatever the user's are."""
        import matplotlib.style

        return matplotlib.style.context("default")

    def label(self, keys: str, queries: str, size: int, offset: float) -> None:
        """Names the axes and numbers them.

        Args:
            keys, queries: the names of the axes across and down.
            size: places in a window; numbers stand at multiples of it where it is not too wide.
            offset: how far into its place a number stands, as a share.
        """
        self.axes.set_xlabel(keys, fontsize=12)
        self.axes.set_ylabel(queries, fontsize=12)
        for axis, length in ((self.axes.xaxis, self.columns), (self.axes.yaxis, self.rows)):
            every = _every(length, size)
            places = range(0, length, every)
            axis.set_ticks([place + offset for place in places], [f"{place}" for place in places])
            digits = len(str(places[-1]))
            axis.set_tick_params(labelsize=9 * min(1.0, _MOST_DIGITS / digits))

    def edges(self, size: int) -> None:
        """Lines where windows of ``size`` places end; none where it is 0."""
        if size == 0:
            return
        for draw, length in ((self.axes.axvline, self.columns), (self.axes.axhline, self.rows)):
            for place in range(size, length, size):
                draw(place, color=INK, linewidth=1.0)

    def legend(self, entries: "Sequence[tuple[Artist, str]]") -> None:
        """Signs and words below the picture, in a row or two."""
        if entries:
            self.figure.legend(
                [sign for sign, _ in entries],
                [words for _, words in entries],
                loc="center",
                bbox_to_anchor=(self._middle, 0.5 * _BOTTOM / self.height),
                ncol=len(entries) if len(entries) < 4 else -(-len(entries) // 2),
                frameon=False,
                fontsize=10,
                handlelength=1.4,
                columnspacing=1.4,
            )

    def scale(self, image: "AxesImage") -> None:
        """The colours of ``image`` with their numbers, below the picture at its right."""
        box = 0.45, 0.42 * _BOTTOM / self.height, 0.42, 0.14 / self.height
        bar = self.figure.colorbar(image, cax=self.figure.add_axes(box), orientation="horizontal")
        bar.ax.tick_params(labelsize=8)
        self._middle = 0.25  # of what else stands below

    def save(self, file: File, drawn: object, colors: int = 64) -> None:
        """Writes the PNG.

        Args:
            file: a path or a binary file.
            drawn: what a digest of the picture is taken of, as JSON takes it.
            colors: as many are kept, which keeps the file small.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from PIL import Image, PngImagePlugin

        place = 1 - 0.14 / self.height
        for text, wide, size, color in (
            (self.title, 74, 12, INK),
            (self.subtitle, 96, 9, PALE_INK),
        ):
            lines = textwrap.wrap(text, wide)
            self.figure.text(
                0.5, place, "\n".join(lines), ha="center", va="top", fontsize=size, color=color
            )
            place -= len(lines) * size / 55 / self.height
        box, height = self.axes.get_window_extent(), self.figure.bbox.height
        cells = box.x0, height - box.y1, box.x1, height - box.y0
        what = json.dumps([self.title, self.subtitle, self.rows, self.columns, drawn])
        about = PngImagePlugin.PngInfo()
        about.add_text("Title", self.title)
        about.add_text("Description", self.subtitle)
        about.add_text("Software", "flexlocal")
        about.add_text("Cells", " ".join(f"{place:.2f}" for place in cells))
        about.add_text("Digest", hashlib.sha256(what.encode()).hexdigest())
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
        image = image.convert("RGB").quantize(colors, dither=Image.Dither.NONE)
        image.save(file, format="PNG", optimize=True, pnginfo=about)


def _every(length: int, size: int) -> int:
    """The distance of numbers on an axis: a few windows, or a round part of a wide one."""
    if length > size * _MOST_TICKS:
        every = size
        while length > every * _MOST_TICKS:
            every *= 2
        return every
    return size if length >= 3 * size else max(1, size // 4)


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'pictures need matplotlib, which is not installed: pip install "flexlocal[inspect]"',
            name="matplotlib",
        ) from error
