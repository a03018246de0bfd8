"""What a script shows in a terminal: one progress bar and one kind of table."""

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

PIPED = 80  # columns of a table that no terminal shows


def watched(items: Iterable[Any], total: int, words: str) -> Iterator[Any]:
    """The items, under a bar that counts them; without it where nobody watches."""
    shown = {"console": Console(file=sys.stderr), "disable": not sys.stderr.isatty()}
    # By itself the bar is drawn by a thread of its own, which disturbs what is timed.
    yield from track(items, words, total, **shown, auto_refresh=False, transient=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str] = ()) -> str:
    """A table of text, without a line's end behind it: as wide as the terminal, 80 in a pipe.

    The first column and those with titles in ``words`` are set to the left, and are wrapped.
    """
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False)
    for place, title in enumerate(columns):
        left = place == 0 or title in words
        justify = "left" if left else "right"
        made.add_column(title, justify=justify, no_wrap=not left, overflow="fold")
    for row in rows:
        made.add_row(*row)
    text = StringIO()
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPED
    Console(file=text, width=width, markup=False, highlight=False, color_system=None).print(made)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def number(value: float | None) -> str:
    """Three digits, or a dash where there is nothing."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
