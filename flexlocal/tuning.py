"""Which sparse blocks and kernel options a call takes, from a table of measurements.

``tuned.json`` holds, by GPU architecture and head size, the fastest of the candidates that
``profiling/tune.py`` swept over windows of several reaches. A call takes the entry whose reach
is nearest in ratio; where the table knows nothing of the GPU or the dtype, FlexAttention's own
options stand.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .masks import Window

STOCK_BLOCK = 128
"""FlexAttention's own sparse block, and the length whose multiples its kernels need not check."""


@dataclass(frozen=True)
class Tuning:
    """How a kernel works through a mask.

    Attributes:
        block: queries, and keys, in a sparse block.
        options: ``kernel_options`` of ``flex_attention``, as sorted pairs.
    """

    block: int
    options: tuple[tuple[str, Any], ...]


STOCK = Tuning(STOCK_BLOCK, ())


@dataclass(frozen=True)
class Entry:
    """A line of the table: what was fastest for ``reach`` keys on ``capability``."""

    capability: tuple[int, int]
    head_size: int
    reach: int
    tuning: Tuning


def _table() -> tuple[Entry, ...]:
    lines = json.loads((Path(__file__).parent / "tuned.json").read_text())["entries"]
    return tuple(
        Entry(
            tuple(line["capability"]),
            line["head_size"],
            line["reach"],
            Tuning(line["block"], tuple(sorted(line["options"].items()))),
        )
        for line in lines
    )


TABLE = _table()


def tuning(
    capability: tuple[int, int], dtype: torch.dtype, head_size: int, window: Window
) -> Tuning:
    """The table's answer for 16-bit tensors, ``STOCK`` where it has none.

    Args:
        capability: of the GPU, ``(9, 0)`` for an H100.
        dtype: of query, key and value.
        head_size: the larger of the key's and the value's.
        window: the rule; its reach is ``window.most_seen``.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return STOCK
    fits = [e for e in TABLE if e.capability == capability and e.head_size >= head_size]
    if not fits:
        return STOCK
    nearest = min(
        fits, key=lambda e: (e.head_size, abs(math.log(e.reach) - math.log(window.most_seen)))
    )
    return nearest.tuning
