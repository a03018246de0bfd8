"""Threads that call at once: many may run what is compiled, but only one may compile, and alone.

torch's compiler keeps what it does in global variables. A thread that enters a compiled callable
while another compiles is taken for a part of the other's work: "Detected that you are using FX to
symbolically trace a dynamo-optimized function" (torch 2.11 to 2.13).
"""

import os
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class Gate:
    """Lets callers pass together, or one of them alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = False

    def together(self, call: Callable[[], Result]) -> Result:
        """``call()``, while others may pass together."""
        with self._changed:
            while self._alone:
                self._changed.wait()
            self._inside += 1
        try:
            return call()
        finally:
            with self._changed:
                self._inside -= 1
                if not self._inside:
                    self._changed.notify_all()

    def alone(self, call: Callable[[], Result]) -> Result:
        """``call()``, once nobody else is inside."""
        with self._changed:
            while self._alone or self._inside:
                self._changed.wait()
            self._alone = True
        try:
            return call()
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


GATE = Gate()
"""Of all compiled callables."""


def _open_again() -> None:
    GATE.__init__()  # type: ignore[misc]  # threads that were inside are not in a forked child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open_again)
