"""Labels of the layer's own steps, for a profiler to show.

>>> with labelled(), torch.profiler.profile() as profiler:
...     with region("attention"):
...         x = torch.ones(2) + 1
>>> "flexlocal::attention" in {event.name for event in profiler.events()}
True
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_labelling = False


@contextmanager
def labelled() -> Iterator[None]:
    """Labels the layer's steps while it is open, in all threads.

    Labels are off otherwise: even without a profiler they cost a few percent of a short call.
    """
    global _labelling
    before, _labelling = _labelling, True
    try:
        yield
    finally:
        _labelling = before


def region(name: str) -> AbstractContextManager[Any]:
    """Labels what is executed inside ``flexlocal::name``, where labels are on.

    Compiled graphs get no labels, because a compiler fuses operators of several steps.
    """
    # `is_compiling` comes first, so that no graph depends on whether labels are on.
    if torch.compiler.is_compiling() or not _labelling:
        return nullcontext()
    return torch.profiler.record_function(f"flexlocal::{name}")
