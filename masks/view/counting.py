"""Rows that each see one interval of columns, counted row by row and cell by cell.

A query sees an interval of keys, a block of queries touches an interval of key blocks. Both are
counted here, from the ends of the intervals and never from a dense mask. Where a key mask hides
columns, an end counts as the number of kept columns before it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...torch_limits.sizes import at_least, at_most
from ..arguments import check_count
from ..rule import Rule

_ROWS_AT_A_TIME = 2**15
"""Bounds the memory. torch starts no threads for so few, which would cost more than they save."""


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
        """``cells`` for the lines from ``start`` up to ``stop``: ``step`` rows make a line."""
        rows = torch.arange(start * step, stop * step, device="cpu")
        begin, end = self._clipped(at_most(rows, self.rows - 1))
        end = torch.where(rows < self.rows, end, begin)  # rows past the last one see no column
        # Columns seen left of an edge: max(edge - begin, 0) - max(edge - end, 0), summed over the
        # line's rows.
        after_begin, after_end = (
            _passed(x.view(-1, step), step, edges, rank) for x in (begin, end)
        )
        return (after_begin - after_end).diff(dim=1)

    def _clipped(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The first column that each row sees and the column after the last, in the grid."""
        first, last = self.bounds(rows)
        first = at_most(at_least(first, 0), self.columns)
        return first, at_least(at_most(last + 1, self.columns), first)

    def _ranks(self) -> Tensor | None:
        """How many kept columns lie before each column, ``(columns + 1,)``."""
        if self.kept is None:
            return None
        return F.pad(self.kept.cumsum(0), (1, 0))


def bounds_of(rule: Rule, query: Tensor, batch: int = 0, head: int = 0) -> tuple[Tensor, Tensor]:
    """First and last key slot that each query sees, on the CPU.

    Args:
        rule: the mask rule.
        query: integer, of any shape, on the CPU.
        batch, head: the entry that is asked for.

    Returns:
        Both int64, of the shape of ``query``.
    """
    first, last = rule.keys(batch, head, query)
    return _on_cpu(first, query), _on_cpu(last, query)


def _on_cpu(bound: Tensor | int, query: Tensor) -> Tensor:
    return torch.as_tensor(bound, dtype=torch.int64, device="cpu").expand_as(query)


def step_of(lengths: tuple[int, int], cells: int) -> int:
    """Places on a side of a picture's cell: the least power of two that ``cells`` allow.

    Args:
        lengths: places down and across.
        cells: cells down and across at most, at least 1.

    Raises:
        ValueError: ``cells`` is below 1.
        TypeError: ``cells`` is no int.
    """
    cells = check_count("cells", cells)
    wanted = -(-max(lengths) // cells)
    return 1 << (wanted - 1).bit_length()


def sides_of(length: int, step: int) -> Tensor:
    """How many of ``length`` places each cell of ``step`` holds; the last may hold fewer."""
    return (torch.arange(0, length, step, device="cpu") - length).neg().clamp(max=step)


def _passed(columns: Tensor, step: int, edges: Tensor, rank: Tensor | None) -> Tensor:
    """``max(edge - column, 0)`` for each edge, summed over the rows of a line.

    Args:
        columns: int64 ``(lines, rows)``, one end of the rows' intervals.
        step: columns between two edges.
        edges: int64 ``(edges,)``, counted in kept columns.
        rank: int64 ``(columns + 1,)``, kept columns before each column; ``None`` where all are
            kept.

    Returns:
        int64 ``(lines, edges)``.
    """
    # The sum over the columns left of an edge is `edge` times their number less their sum. Both
    # are running sums over cells: a column in cell c lies left of edge c + 1 and those after it.
    cell = columns // step
    number, total = columns.new_zeros(2, len(columns), len(edges) + 1)
    number.scatter_add_(1, cell + 1, torch.ones_like(cell))
    total.scatter_add_(1, cell + 1, columns if rank is None else rank[columns])
    passed: Tensor = edges * number.cumsum(1)[:, :-1] - total.cumsum(1)[:, :-1]
    return passed
