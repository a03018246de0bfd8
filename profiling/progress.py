"""How far a script is, for who watches it in a terminal."""

import sys


class Progress:
    """One line at the foot of a terminal; nothing elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def show(self, words: str) -> None:
        """What is at work now."""
        bar = ("#" * (20 * self.done // self.total)).ljust(20, ".")
        self._write(f"[{bar}] {self.done + 1}/{self.total} {words}"[:99])

    def clear(self) -> None:
        """Leaves the line to others."""
        self._write("")

    def _write(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
