"""Rows that each see one interval of columns, counted row by row and cell by cell.

Queries see an interval of keys, and blocks of queries touch an interval of key blocks: pictures
and numbers of both are counted here, from the ends of the intervals, never from a dense mask.
Columns may be struck out (hidden keys); the ends are then ranked among the columns that are kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_count
from .clip import at_least, at_most

_ROWS_AT_A_TIME = 2**15  # torch works on so many without starting threads


@dataclass(frozen=True, eq=False)
class Intervals:
    """``rows`` rows, each of which sees one interval of ``columns`` columns.

    Args:
        rows: how many rows.
        columns: how many columns.
        bounds: from rows ``(m,)`` to the first and the last column that each sees, ``(m,)`` both;
            the last below the first for a row that sees none.
        kept: boolean ``(columns,)``, False for columns that no row sees; ``None`` for none.
    """

    rows: int
    columns: int
    bounds: Callable[[Tensor], tuple[Tensor, Tensor]]
    kept: Tensor | None = None

    def counts(self) -> Iterator[Tensor]:
        """How many columns each row sees, ``(m,)``, some rows at a time."""
        rank = self._ranks()
        for start in range(0, self.rows, _ROWS_AT_A_TIME):
            rows = torch.arange(start, min(start + _ROWS_AT_A_TIME, self.rows), device="cpu")
            first, stop = self._clipped(rows)
            yield stop - first if rank is None else rank[stop] - rank[first]

    def cells(self, step: int) -> Tensor:
        """How many pairs see each other in every cell of ``step`` rows by ``step`` columns.

        Returns:
            int64 ``(ceil(rows / step), ceil(columns / step))``.
        """
        rank = self._ranks()
        edges = at_most(
            torch.arange(-(-self.columns // step) + 1, device="cpu") * step, self.columns
        )
        if rank is not None:
            edges = rank[edges]
        lines = -(-self.rows // step)
        some = max(1, _ROWS_AT_A_TIME // max(step, len(edges)))
        found = [
            self._lines(line, min(line + some, lines), step, edges, rank)
            for line in range(0, lines, some)
        ]
        return torch.cat(found)

    def _lines(
        self, start: int, stop: int, step: int, edges: Tensor, rank: Tensor | None
    ) -> Tensor:
        rows = torch.arange(start * step, stop * step, device="cpu")
        begin, end = self._clipped(at_most(rows, self.rows - 1))
        end = torch.where(rows < self.rows, end, begin)  # rows past the last one see nothing
        # Before an edge lies what it is past a row's first column, less what it is past its end.
        begun, ended = (_passed(x.view(-1, step), step, edges, rank) for x in (begin, end))
        return (begun - ended).diff(dim=1)

    def _clipped(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The columns that each row sees, from the first up to the end, which is not seen."""
        first, last = self.bounds(rows)
        first = at_most(at_least(first, 0), self.columns)
        return first, at_least(at_most(last + 1, self.columns), first)

    def _ranks(self) -> Tensor | None:
        """How many kept columns lie before each column, ``(columns + 1,)``."""
        if self.kept is None:
            return None
        return F.pad(self.kept.cumsum(0), (1, 0))


def step_of(lengths: tuple[int, int], cells: int) -> int:
    """Places on a side of a picture's cell: the least power of two that ``cells`` allow.

    Args:
        lengths: rows and columns to be drawn.
        cells: rows and columns of the picture at most, at least 1.
    """
    check_count("cells", cells)
    wanted = -(-max(lengths) // cells)
    return 1 << (wanted - 1).bit_length()


def sides_of(length: int, step: int) -> Tensor:
    """How many of ``length`` places each cell of ``step`` holds; the last may hold fewer."""
    return (torch.arange(0, length, step, device="cpu") - length).neg().clamp(max=step)


def _passed(columns: Tensor, step: int, edges: Tensor, rank: Tensor | None) -> Tensor:
    """How far each edge lies past the columns before it, summed over the rows of a line.

    Args:
        columns: ``(lines, rows)``.
        step: columns between two edges.
        edges: ``(edges,)``, counted in kept columns.
        rank: kept columns before each column, where not all are.

    Returns:
        ``(lines, edges)``.
    """
    cell = columns // step
    many, sums = columns.new_zeros(2, len(columns), len(edges) + 1)
    many.scatter_add_(1, cell + 1, torch.ones_like(cell))
    sums.scatter_add_(1, cell + 1, columns if rank is None else rank[columns])
    passed: Tensor = edges * many.cumsum(1)[:, :-1] - sums.cumsum(1)[:, :-1]
    return passed
