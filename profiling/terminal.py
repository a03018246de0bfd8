"""What a script shows in a terminal: one progress bar and one kind of table."""

import shutil
import sys
import textwrap
from collections.abc import Sequence
from io import StringIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

_UNLIMITED = 10_000
"""Columns of a table that goes to a file or a pipe, which wraps nothing."""


class Bar:
    """A bar at the foot of the terminal, as wide as it; nothing where nobody watches.

    >>> with Bar(2) as bar:
    ...     for name in ("one", "two"):
    ...         bar.show(name)
    ...         bar.advance()
    """

    def __init__(self, total: int) -> None:
        stderr = sys.stderr
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            console=Console(file=stderr),
            disable=not stderr.isatty(),
            expand=True,
            transient=True,
            auto_refresh=False,  # which is a thread of its own, and disturbs what is timed
            # Otherwise rich would send what is printed to the terminal, past a file or a pipe.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, words: str) -> None:
        """Says what is at work now."""
        self._bar.update(self._task, description=words, refresh=True)

    def advance(self) -> None:
        """One more is done."""
        self._bar.update(self._task, advance=1, refresh=True)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    words: Sequence[str] = (),
    width: int | None = None,
) -> str:
    """A table of text, without a line's end behind it.

    Args:
        columns: their titles. The first column and those of ``words`` are set to the left.
        rows: cells, as many in each as there are columns.
        words: titles of columns of running text, which may go on in the next line.
        width: columns to stay within; by default the terminal's, without limit elsewhere.
    """
    if width is None:
        tty = sys.stdout.isatty()
        width = shutil.get_terminal_size().columns if tty else _UNLIMITED
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False)
    for place, title in enumerate(columns):
        left = place == 0 or title in words
        made.add_column(
            title,
            justify="left" if left else "right",
            no_wrap=not left,
            overflow="fold",
            vertical="top",
        )
    for row in rows:
        made.add_row(*row)
    text = StringIO()
    console = Console(file=text, width=width, markup=False, highlight=False, color_system=None)
    console.print(made)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def paragraph(text: str) -> str:
    """Lines as long as the terminal is wide, broken between words; as it is elsewhere."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _UNLIMITED
    return "\n".join(textwrap.fill(line, width) for line in text.splitlines())


def number(value: float | None) -> str:
    """Three digits, or a dash where there is nothing."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
