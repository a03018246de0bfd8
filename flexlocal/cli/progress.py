"""What a command says on stderr while it works: a bar, and what a pause is for."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

WIDEST = 80  # columns


class Progress:
    """One line that is written over where ``stream`` is a terminal, plain lines elsewhere.

    Elsewhere the bar is a line at every tenth of the way.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._terminal, self._tenths = stream, stream.isatty(), 0

    def show(self, done: float, text: str) -> None:
        """Show the fraction ``done`` of the way and ``text``, as wide as the terminal."""
        said = f"{done:4.0%}  {text}"
        if self._terminal:
            room = max(0, self._columns() - len(said) - 3)
            bar = ("#" * int(room * done)).ljust(room, ".")
            self._over(f"[{bar}] {said}")
            if done >= 1:
                self._stream.write("\n")
        elif int(10 * done) > self._tenths:
            self._tenths = int(10 * done)
            self._stream.write(f"  {said}\n")
        self._stream.flush()

    @contextmanager
    def doing(self, text: str) -> Iterator[None]:
        """Say what goes on, and on a terminal take it away when it is done."""
        if self._terminal:
            self._over(f"{text} ...")
        else:
            self._stream.write(f"  {text}\n")
        self._stream.flush()
        try:
            yield
        finally:
            if self._terminal:
                self._over("")
                self._stream.flush()

    def _over(self, line: str) -> None:
        self._stream.write(f"\r{line[: self._columns()]}\033[K")

    def _columns(self) -> int:
        """The last column stays free: a terminal may wrap once it is filled."""
        try:
            width = os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):  # it stands for a terminal, and is none
            width = 0
        return min(width or WIDEST, WIDEST) - 1
