"""What a picture shows, ready to be drawn: all that ``text``, ``png`` and ``html`` are given."""

from dataclasses import dataclass

from .symbols import BLOCKS, Kind

_MOST_LINES = 32
"""Windows along a picture's longer side, above which lines at their edges would cover it."""


@dataclass(frozen=True)
class Drawing:
    """A grid of cells with its axes and its words.

    A *place* is a token or a block, whichever the axes count. A cell stands for ``step`` by
    ``step`` places; the last row and column of cells may stand for fewer.

    Attributes:
        title: what is seen.
        subtitle: the parameters.
        shape: places down and across.
        grid: the kind of each cell, row by row, as an index into ``kinds``.
        kinds: the kinds of cells that there are.
        step: places on a side of a cell.
        edge: places in a window, whose edges are drawn where there is room; 1 for no lines.
        axes: what a place is, down and across.
        tips: what pointing at each row says; empty for nothing.
    """

    title: str
    subtitle: str
    shape: tuple[int, int]
    grid: tuple[tuple[int, ...], ...]
    kinds: tuple[Kind, ...]
    step: int
    edge: int
    axes: tuple[str, str]
    tips: tuple[str, ...] = ()

    @property
    def tiled(self) -> bool:
        """Whether cells are blocks, drawn as tiles with gaps; tokens are squares side by side."""
        return self.kinds is BLOCKS

    @property
    def used(self) -> list[Kind]:
        """The kinds that stand in the grid, for its legend."""
        return [self.kinds[kind] for kind in sorted({kind for row in self.grid for kind in row})]

    @property
    def lines(self) -> int:
        """Places between lines at windows' edges; 0 where there is no room for lines."""
        return lines_of(self.edge, self.shape, self.step)

    def unit(self, cell: str, shaded: str = "") -> str:
        """What a cell stands for, in words.

        Args:
            cell: what a cell is called where it is drawn.
            shaded: what its shade says, where a cell stands for several tokens.
        """
        down, across = self.axes
        if self.step == 1:
            return f"{cell} is one {down} and one {across}"
        words = f"{cell} is {self.step} {_plural(down)} by {self.step} {_plural(across)}"
        return words + ("" if self.tiled or not shaded else f", {shaded}")


def lines_of(edge: int, shape: tuple[int, int], step: int = 1) -> int:
    """``edge`` where lines at every ``edge`` places have room in ``shape``, else 0."""
    wide = edge > 1 if step == 1 else edge >= 2 * step
    return edge if wide and max(shape) <= edge * _MOST_LINES else 0


def _plural(word: str) -> str:
    return "queries" if word == "query" else f"{word}s"
